"""How a step's passes scale with the model: time for a parameter, and memory, from ten million parameters to a billion.

Models are tensors only, in the shapes of a transformer. Their forward calls every block and computes nothing, so a step is
its passes and what Python does around them. All sizes of a dtype are in memory together and take turns, so that a drift of
the machine's speed meets all of them.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zokern
from zokern.bench.models import making
from zokern.bench.shapes import Shape, Shapes, square
from zokern.bench.step import Entry, Turns
from zokern.bench.step_cases import Case, Limits, resolve
from zokern.bench.timing import spread

STD = 0.02
KEPT = ("parameters", "tensors", "dtype", "weights_bytes", "method", "status", "extra_bytes", "state_bytes",
        "passes_per_step", "needed_bytes", "computed_bytes", "held_bytes", "free_bytes")  # fmt: skip


@dataclass(frozen=True)
class Settings(Limits):
    """Of `scaling`. sizes: parameters wanted, met to a few per cent from ten million on."""

    sizes: tuple[int, ...]
    dtypes: tuple[str, ...]
    methods: tuple[str, ...]
    placements: tuple[str, ...]


class Block(nn.Module):
    def __init__(self, shapes: Sequence[Shape]) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Tensors(nn.Module):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(shapes.rest[0]))
        self.blocks = nn.ModuleList(map(Block, shapes.blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def build(parameters: int, dtype: torch.dtype, device: torch.device) -> Tensors:
    """A model with normal weights of standard deviation 0.02, made in place."""
    with making(dtype, device, seed=0):
        model = Tensors(square(parameters))
    weights = [p.detach() for p in model.parameters()]
    if device.type != "meta":
        zokern.add_noise_(weights, tensor_ids=list(range(len(weights))), seeds=[0], coefs=[STD])
    return model


def closure_of(model: Tensors, device: torch.device) -> Callable[[], Tensor]:
    """Losses 1, 1.125, 1, ...: any two that follow each other differ, so no update is left out."""
    losses = itertools.cycle(torch.tensor(loss, device=device) for loss in (1.0, 1.125))
    x = torch.zeros((), device=device)

    def closure() -> Tensor:
        model(x)
        return next(losses)

    return closure


class Run(Turns):
    """One run of `zokern bench scaling`. All sizes of a dtype take turns."""

    name = "scaling"
    settings: Settings

    def __init__(self, settings: Settings, path: Path, tick: Callable[[str], None] = lambda name: None) -> None:
        super().__init__(settings, path, tick)
        lists = (settings.sizes, settings.dtypes, settings.methods, settings.placements)
        self.visits = math.prod(map(len, lists)) * (settings.rounds + 1)

    def stored(self) -> list[dict[str, Any]]:
        return [_row(result) for result in self.results.values()]

    def _all(self) -> None:
        for name in self.settings.dtypes:
            self._take_turns([entry for size in self.settings.sizes for entry in self._entries(size, name)])

    def _entries(self, size: int, name: str) -> list[Entry]:
        """The cases of one size, which share its weights."""
        dtype: torch.dtype = getattr(torch, name)
        shape, called = build(size, dtype, torch.device("meta")), f"{size:,} x {name}"
        counts = [p.numel() for p in shape.parameters()]
        weights = sum(counts) * dtype.itemsize
        self.about[called] = {
            "parameters": sum(counts), "tensors": len(counts), "dtype": name, "weights_bytes": weights,
        }  # fmt: skip
        ways = itertools.product(self.settings.methods, resolve(self.settings.placements, shape, dtype))
        cases = [Case(called, 0, 0, method, way) for method, way in ways]
        self._put(cases, status="left out")  # until it is timed
        if self.budget.spent or not self._fits(cases, weights):
            return []
        model = build(size, dtype, self.device)
        return [Entry(case, model, closure_of(model, self.device)) for case in cases]


def _row(result: dict[str, Any]) -> dict[str, Any]:
    """A result as it is stored: the passes' time is that of a parameter, "other" the rest of a step, in seconds."""
    row = {name: result[name] for name in KEPT if name in result}
    row["placement"] = result["way"]
    if result["status"] == "timed":
        row["each"] = [1e9 * s["passes"] / result["parameters"] for s in result["each"]]
        row["ns_per_parameter"] = spread(row["each"])
        row["other"] = statistics.median(s["step"] - s["passes"] for s in result["each"])
    return row
