"""Times whole optimizer steps: methods x placements x token shapes x models, and their peers, in turn, in one run.

One model serves all its cases; those of one token shape take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zokern.bench import models, split
from zokern.bench.budget import peak_bytes
from zokern.bench.step_cases import Case, Settings, plan, smaller
from zokern.bench.turns import Entry, Turns


class Run(Turns):
    name = "step"
    weighs = ("forward_bytes", "extra_bytes", "extra_share", "state_bytes")
    settings: Settings

    def __init__(self, settings: Settings, path: Path, tick: Callable[[str], None] = lambda name: None) -> None:
        super().__init__(settings, path, tick)
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self._groups, self.not_timed = plan(settings)

    @property
    def cases_at_most(self) -> int:
        return sum(len(group) for shapes in self._groups.values() for group in shapes.values())

    def facts(self, case: Case) -> dict[str, Any]:
        return {**case.facts(), "dtype": self.settings.dtype, **self.about[case.model]}

    def summary(self, case: Case, rounds: Sequence[Mapping[str, float]], counts: Mapping[str, float]) -> dict[str, Any]:
        return {**split.summary(rounds), **counts, "each": rounds}

    def said(self) -> dict[str, Any]:
        left_out = [name for name, result in self.results.items() if result["status"] == "left out"]
        return {"left_out": left_out, "not_timed": self.not_timed, "attention": models.attention()}

    def _all(self) -> None:
        for name in self.settings.models:
            self._model(name)

    def _model(self, name: str) -> None:
        parameters = models.parameters(name)
        weights = parameters * self.dtype.itemsize
        self.about[name] = {"parameters": parameters, "weights_bytes": weights}
        every = [case for group in self._groups[name].values() for case in group]
        self.put(every, status="left out")  # until it is timed
        if self.budget.spent or not self.fits(every, weights):
            return
        model = models.build(name, self.dtype, self.device)
        for (rows, length), group in self._groups[name].items():
            self._group(group, model, models.closure(name, model, rows, length, self.device))

    def _group(self, group: list[Case], model: nn.Module, closure: Callable[[], Tensor]) -> None:
        first = group[0]
        logits = models.logits_bytes(first.model, first.rows, first.length, self.dtype.itemsize)
        if not self.fits(group, logits):
            return
        forward = self.attempt(lambda: self._forward(closure))
        if forward is None:
            self.put(group, **self.budget.unfit(logits))
        else:
            self.take_turns([Entry(case, model, closure, forward) for case in group])

    def _forward(self, closure: Callable[[], Tensor]) -> int:
        """The peak of a forward alone, after one whose lasting allocations are not the activations'."""
        closure()
        return peak_bytes(closure, self.device)

    def instead(self, entry: Entry) -> list[Entry]:
        """The same with its curvature in bfloat16, if that takes less."""
        other = smaller(entry.case, entry.model)
        if other is None:
            return []
        self.put([other], status="left out")  # until it is timed
        return [replace(entry, case=other)]
