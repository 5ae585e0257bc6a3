"""One process of benchmarks.steps.host: has the `zokern` that PYTHONPATH finds, does steps, says how long they took.

Reads the name of a way from each line, and answers with the seconds of a step, the mean of WINDOW.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zokern

WINDOW, TENSORS, POLLS = 100, 60, 2


def model_and_closure(forwards: bool) -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(TENSORS // 2)])
    x, losses = torch.randn(4, 16), [torch.tensor(1.0 + i * 1e-3) for i in range(7)]
    calls = [0]

    def given() -> Tensor:
        calls[0] += 1
        return losses[calls[0] % len(losses)]

    return model, (lambda: model(x).square().mean()) if forwards else given


class Late:
    """Stands for a copy from a device: it is here when it has been asked for a few times."""

    asked = 0

    def __init__(self, there: Tensor) -> None:
        self.values, self.since = there, Late.asked

    def here(self) -> Tensor | None:
        Late.asked += 1
        return self.values if Late.asked - self.since > POLLS else None

    def wait(self) -> Tensor:
        return self.values


def as_on_a_device() -> None:
    """From now on a step takes the operations that it has where its losses are on a device, and no number is at hand."""
    from zokern.journal import behind
    from zokern.optim import losses, told
    from zokern.placement import inplace

    told.is_far = lambda t: True
    told.is_here = lambda event: False
    behind.Arriving = Late  # type: ignore[assignment,misc]
    inplace.is_known = lambda ok, gate: False  # type: ignore[attr-defined]
    finite = losses.Losses.finite
    losses.Losses.finite = lambda self, captured=False: finite(self, captured=True)  # type: ignore[assignment,method-assign]


def main(method: str, forwards: bool, device: bool) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if device:
        as_on_a_device()
    made: dict[str, Any] = {}
    with contextlib.ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
        for way in ("plain", "journal"):
            model, closure = model_and_closure(forwards)
            opt = getattr(zokern, method)(model, lr=1e-6)
            if way == "journal":
                held.enter_context(zokern.journal.write(opt, folder / "run.zkj"))
            made[way] = opt, closure
            for _ in range(2 * WINDOW):
                opt.step(closure)
        print("ready", flush=True)
        for line in sys.stdin:
            opt, closure = made[line.strip()]
            start = time.perf_counter()
            for _ in range(WINDOW):
                opt.step(closure)
            print((time.perf_counter() - start) / WINDOW, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "forwards", sys.argv[3] == "device")
