"""What each placement takes of memory beside the weights, for five published models' shapes, and what zokern says it takes.

    python -m benchmarks.memory.placed                    # what is missing of the results
    python -m benchmarks.memory.placed --models GPT-2     # of one model
    python -m benchmarks.pages docs/memory.md             # the page

Measured as benchmarks.memory.run does it, with bfloat16 weights: over inference, the resident set's peak of as many steps
as there are until all has happened that may (two, and one more than a fold waits for). Said: zokern.check's number for the
same optimizer. Stores benchmarks/results/memory-placed-cpu.json after each; all of it takes some 40 minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

import zokern
from benchmarks.memory import run, worker
from benchmarks.memory.models import MODELS, Model
from zokern.checking.cost import needed
from zokern.optim import ZerothOrderOptimizer

DTYPE = torch.bfloat16
INFERENCE = "inference"
LOW = zokern.LowRank(1)
WAYS: dict[str, tuple[type[ZerothOrderOptimizer], dict[str, Any]]] = {
    "inplace": (zokern.MeZO, {"placement": "inplace"}),
    "stream": (zokern.MeZO, {"placement": "stream"}),
    "stream, prefetch": (zokern.MeZO, {"placement": "stream", "prefetch": True}),
    "shadow": (zokern.MeZO, {"placement": "shadow"}),
    "forward, rank 1": (zokern.MeZO, {"placement": "forward", "distribution": LOW}),
    "forward, rank 1, fold_every=4": (zokern.MeZO, {"placement": "forward", "distribution": LOW, "fold_every": 4}),
    "HiZOO, stream": (zokern.HiZOO, {"placement": "stream"}),
}


def optimizer_of(way: str, model: nn.Module) -> ZerothOrderOptimizer:
    method, options = WAYS[way]
    return method(model, worker.LR, **options)


def steps(way: str, model: Model, rows: int, length: int) -> tuple[Callable[[], Tensor], Callable[[], object]]:
    """A model's loss, and its step."""
    made = model.build(DTYPE)
    loss = model.closure(made, rows, length)
    if way == INFERENCE:
        return loss, torch.no_grad()(loss)
    optimizer = optimizer_of(way, made)
    return loss, partial(optimizer.step, loss)


def work(to: Connection, threads: int, way: str, model: Model, rows: int, length: int) -> None:
    """The whole of the process."""
    torch.set_num_threads(threads)
    count = WAYS[way][1].get("fold_every", 1) + 1 if way != INFERENCE else worker.STEPS
    found = worker.held(partial(steps, way, model.tiny(), 2, 4), partial(steps, way, model, rows, length), count)
    if way != INFERENCE:
        found["said"] = needed(optimizer_of(way, model.build(DTYPE)))
    to.send(found)


if __name__ == "__main__":
    run.main(__doc__, "memory-placed", MODELS, (INFERENCE, *WAYS), str(DTYPE).removeprefix("torch."), work)
