"""How a step's passes scale with the model: time for a parameter, and memory, from ten million parameters to a billion.

Models are tensors only, in the shapes of a transformer: an embedding that holds a tenth of the parameters, and blocks of
width d with four d x d matrices, two of d x 4d and four vectors. Their forward calls every block and computes nothing, so
a step is its passes and what Python does around them. All sizes of a dtype are in memory together and take turns, so
that a drift of the machine's speed meets all of them.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import zokern
from zokern.bench.models import making
from zokern.bench.step_cases import Case, Limits, resolve
from zokern.bench.timing import spread
from zokern.bench.turns import Entry, Turns

STD = 0.02


@dataclass(frozen=True)
class Settings(Limits):
    """Of `scaling`. sizes: parameters wanted, met to a few per cent from ten million on."""

    sizes: tuple[int, ...]
    dtypes: tuple[str, ...]
    methods: tuple[str, ...]
    placements: tuple[str, ...]


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        shapes = [(d, d)] * 4 + [(4 * d, d), (d, 4 * d)] + [(d,)] * 4
        self.tensors = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Tensors(nn.Module):
    """About `parameters` parameters of a transformer whose width is about 64 times its number of blocks."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        width = max(8, round((0.9 * parameters * 64 / 12) ** (1 / 3) / 8) * 8)
        blocks = max(2, round(0.9 * parameters / (12 * width**2)))
        self.embedding = nn.Parameter(torch.zeros(max(1, round(0.1 * parameters / width)), width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def build(parameters: int, dtype: torch.dtype, device: torch.device) -> Tensors:
    """A model with normal weights of standard deviation 0.02, made in place."""
    with making(dtype, device, seed=0):
        model = Tensors(parameters)
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
    """Results are a list of rows. "other" is the time of a step that is not in its passes, in seconds."""

    name = "scaling"
    weighs = ("extra_bytes", "state_bytes")
    settings: Settings

    @property
    def cases_at_most(self) -> int:
        wanted = self.settings
        return len(wanted.sizes) * len(wanted.dtypes) * len(wanted.methods) * len(wanted.placements)

    def facts(self, case: Case) -> dict[str, Any]:
        return {**self.about[case.model], "method": case.method, "placement": case.way}

    def summary(self, case: Case, rounds: Sequence[Mapping[str, float]], counts: Mapping[str, float]) -> dict[str, Any]:
        each = [1e9 * s["passes"] / self.about[case.model]["parameters"] for s in rounds]
        return {
            "ns_per_parameter": spread(each),
            "passes_per_step": counts["passes_per_step"],
            "other": statistics.median(s["step"] - s["passes"] for s in rounds),
            "each": each,
        }

    def stored(self) -> list[dict[str, Any]]:
        return list(self.results.values())

    def _all(self) -> None:
        for name in self.settings.dtypes:
            self.take_turns([entry for size in self.settings.sizes for entry in self._entries(size, name)])

    def _entries(self, size: int, name: str) -> list[Entry]:
        """The cases of one size, which share its weights."""
        dtype: torch.dtype = getattr(torch, name)
        shape, called = build(size, dtype, torch.device("meta")), f"{size:,} x {name}"
        parameters = sum(p.numel() for p in shape.parameters())
        weights = parameters * dtype.itemsize
        tensors = len(list(shape.parameters()))
        self.about[called] = {
            "parameters": parameters, "tensors": tensors, "dtype": name, "weights_bytes": weights,
        }  # fmt: skip
        ways = itertools.product(self.settings.methods, resolve(self.settings.placements, shape, dtype))
        cases = [Case(called, 0, 0, method, way) for method, way in ways]
        self.put(cases, status="left out")  # until it is timed
        if self.budget.spent or not self.fits(cases, weights):
            return []
        model = build(size, dtype, self.device)
        return [Entry(case, model, closure_of(model, self.device)) for case in cases]
