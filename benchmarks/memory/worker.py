"""One measurement of run.py, in a process of its own: what a way of training takes beside the weights.

All ways have one model and one loss, the cross entropy of two words after the last token of each row, so that logits are of
that token alone. `resident` is what is held after loading and one inference forward, what malloc keeps given back; `extra`
the peak beyond that of STEPS steps. The second step has what the first one leaves: Adam's moments, and activations besides.
A tiny model does the same before, so that code which is loaded for it is not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import resident
from benchmarks.memory.formulas import RANK
from benchmarks.memory.shapes import Shape

Made = Callable[[], tuple[Callable[[], Tensor], Callable[[], object]]]  # a model's loss, and its step
STEPS, LR = 2, 1e-6
TINY = Shape(64, 16, 16, 2, 2, 1)


def build(shape: Shape) -> nn.Module:
    """With random weights, in float32."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(shape.configuration()).eval()


def adapted(model: nn.Module) -> nn.Module:
    """With LoRA on queries and values."""
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"])
    return peft.get_peft_model(model, config)  # type: ignore[arg-type]


def closure(model: nn.Module, shape: Shape, rows: int, length: int) -> Callable[[], Tensor]:
    """The loss of a batch of random tokens."""
    ids = torch.randint(shape.vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    targets = torch.arange(rows) % 2

    def loss() -> Tensor:
        logits = model(input_ids=ids, logits_to_keep=1, use_cache=False).logits
        return F.cross_entropy(logits[:, -1, :2].float(), targets)

    return loss


def step_of(way: str, model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], object]:
    """What is measured."""
    import zokern

    if way == "inference":
        return torch.no_grad()(loss)
    if way in ("LoRA, Adam", "Adam"):
        adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], LR)

        def backward() -> None:
            adam.zero_grad(set_to_none=True)
            loss().backward()  # type: ignore[no-untyped-call]
            adam.step()

        return backward
    direction: Any = zokern.LowRank(1) if way == "forward" else "normal"
    optimizer = zokern.MeZO(model, LR, placement=way, distribution=direction)
    return lambda: optimizer.step(loss)


def steps(way: str, shape: Shape, rows: int, length: int) -> tuple[Callable[[], Tensor], Callable[[], object]]:
    """A model's loss, and its step."""
    model = build(shape)
    if way == "LoRA, Adam":
        model = adapted(model)
    loss = closure(model, shape, rows, length)
    return loss, step_of(way, model, loss)


def held(tiny: Made, whole: Made, count: int = STEPS) -> dict[str, int]:
    """Bytes, over so many steps of `whole`; those of `tiny` are done before."""
    tried = tiny()[1]
    for _ in range(count):
        tried()
    loss, step = whole()
    with torch.no_grad():
        loss()
    base = resident.settle()
    for _ in range(count):
        step()
    return {"resident": base, "extra": resident.peak() - base}


def work(to: Connection, threads: int, way: str, shape: Shape, rows: int, length: int) -> None:
    """The whole of the process."""
    torch.set_num_threads(threads)
    to.send(held(partial(steps, way, TINY, 2, 4), partial(steps, way, shape, rows, length)))
