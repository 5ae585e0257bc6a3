"""How a step's passes scale with the model: time for a parameter, and memory, from ten million parameters to a billion.

Models are tensors only, in the shapes of a transformer: an embedding that holds a tenth of the parameters, and blocks of
width d with four d x d matrices, two of d x 4d and four vectors. Their forward calls every block and computes nothing, so
a step is its passes and what Python does around them. All sizes of a dtype are in memory together and take turns, so
that a drift of the machine's speed meets all of them.
"""

from __future__ import annotations

import gc
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zokern
from zokern.bench.budget import Budget
from zokern.bench.memory import peak_bytes
from zokern.bench.models import making
from zokern.bench.split import Stepper, measure
from zokern.bench.step_cases import Case, make, needed_bytes, resolve, state_bytes

STD = 0.02
SHAPE = "tensors"  # the model's name in a case


@dataclass(frozen=True)
class Settings:
    """sizes: parameters wanted, met to a few per cent from ten million on. memory_limit: bytes, if below what is free."""

    sizes: tuple[int, ...]
    dtypes: tuple[str, ...]
    methods: tuple[str, ...]
    placements: tuple[str, ...]
    device: str
    rounds: int = 5
    steps: int = 1
    time_limit: float | None = None
    memory_limit: int | None = None


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


@dataclass
class Candidate:
    """One row: a model, its optimizer kept from round to round, what was measured."""

    case: Case
    model: Tensors
    stepper: Stepper
    closure: Callable[[], Tensor]
    facts: dict[str, Any]
    seconds: list[dict[str, float]]

    def row(self) -> dict[str, Any]:
        scale = 1e9 / self.facts["parameters"]
        each = [scale * s["passes"] for s in self.seconds]
        if not each:
            return {**self.facts, "status": "left out"}
        spread = {"median": statistics.median(each), "min": min(each), "max": max(each), "rounds": len(each)}
        around = statistics.median(s["step"] - s["passes"] for s in self.seconds)
        passes = self.stepper.counters["passes"] / self.stepper.counters["steps"]
        return {
            **self.facts,
            "status": "timed",
            "ns_per_parameter": spread,
            "passes_per_step": passes,
            "other": around,
            "each": each,
        }


class Run:
    """One run; `rows` are the results. "other" is the time of a step that is not in its passes, in seconds."""

    def __init__(self, settings: Settings, path: Path, tick: Callable[[str], None] = lambda name: None) -> None:
        self.settings, self.path, self.tick = settings, path, tick
        self.device = torch.device(settings.device)
        self.rows: list[dict[str, Any]] = []
        self.budget = Budget(self.device, settings.time_limit, settings.memory_limit)

    def run(self) -> list[dict[str, Any]]:
        try:
            for name in self.settings.dtypes:
                with torch.no_grad():
                    self._dtype(name)
                gc.collect()
        finally:
            self._save([], last=True)
        return self.rows

    def _dtype(self, name: str) -> None:
        candidates: list[Candidate] = []
        for size in self.settings.sizes:
            candidates += self._candidates(size, name)
        try:
            for number, candidate in itertools.product(range(1, self.settings.rounds + 1), candidates):
                if self.budget.spent:
                    break
                self.tick(f"{candidate.facts['parameters']:,} x {name}, {candidate.case.method}, round {number}")
                seconds = measure(candidate.stepper, candidate.closure, self.device, self.settings.steps)
                candidate.seconds.append(seconds)
                self._save(candidates)
        finally:
            self.rows += [candidate.row() for candidate in candidates]

    def _candidates(self, size: int, name: str) -> Iterator[Candidate]:
        """The cases of one size, which share its weights; rows for those that cannot be."""
        dtype: torch.dtype = getattr(torch, name)
        shape = build(size, dtype, torch.device("meta"))
        parameters = sum(p.numel() for p in shape.parameters())
        weights = parameters * dtype.itemsize
        tensors = len(list(shape.parameters()))
        facts = {"parameters": parameters, "tensors": tensors, "dtype": name, "weights_bytes": weights}
        placements = resolve(self.settings.placements, shape, dtype.itemsize == 2)
        model: Tensors | None = None
        for method, way in itertools.product(self.settings.methods, placements):
            case, its = Case(SHAPE, 0, 0, method, way), {**facts, "method": method, "placement": way}
            if self.budget.spent:
                self.rows.append({**its, "status": "left out"})
                continue
            if model is None and weights <= self.budget.free:
                model = build(size, dtype, self.device)
            needed = weights if model is None else needed_bytes(case, model)
            if model is None or needed > self.budget.free:
                self.rows.append({**its, **self.budget.unfit(needed)})
                continue
            yield self._candidate(case, model, its)

    def _candidate(self, case: Case, model: Tensors, facts: dict[str, Any]) -> Candidate:
        """Makes an optimizer and measures the memory of its first step."""
        kept: list[Stepper] = []
        closure = closure_of(model, self.device)

        def first_step() -> None:
            kept.append(make(case, model))
            kept[0].step(closure)

        extra = peak_bytes(first_step, self.device)
        facts |= {"extra_bytes": extra, "state_bytes": state_bytes(kept[0], model)}
        return Candidate(case, model, kept[0], closure, facts, [])

    def _save(self, running: list[Candidate], *, last: bool = False) -> None:
        rows = [*self.rows, *(candidate.row() for candidate in running)]
        self.budget.save("scaling", asdict(self.settings), rows, self.path, last=last)
