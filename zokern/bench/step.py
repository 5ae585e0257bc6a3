"""Times whole optimizer steps: methods x placements x token shapes x models, and their peers, in turn, in one run.

One model serves all its cases. Weights go on from where the case before left them: a step's time does not depend on them,
and the learning rate is tiny. A visit to a case makes its optimizer anew, runs one step to warm up, times `steps` in a
row, and frees it, so that no case's states take memory from another's. The first visit is not timed: it measures the
memory of the first step, from the optimizer's construction on, beyond that of a forward alone.

The file is written anew after every visit. What time or memory did not allow is in it too, with the reason.
"""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zokern._checks import ZokernWarning
from zokern.bench import models, split
from zokern.bench.budget import Budget, DoesNotFit, peak_bytes
from zokern.bench.step_cases import Case, Limits, Settings, make, needed_bytes, optimizer_of, plan, smaller, state_bytes


@dataclass
class Entry:
    """A case at work. forward: bytes of a forward alone."""

    case: Case
    model: nn.Module
    closure: Callable[[], Tensor]
    forward: int = 0

    @property
    def needed(self) -> int:
        return self.forward + needed_bytes(self.case, self.model)


class Turns:
    """Cases that take turns, round after round, within limits of time and memory; `results` grow while it goes on.

    A result's "status" is "timed", "does not fit" (with the bytes of budget.DoesNotFit), "left out" (the time limit) or
    "not captured" (with "why").
    A case that was timed for fewer rounds than wanted says so by step.rounds.
    """

    name: str
    visits: int  # how often `tick` is called where nothing is left out

    def __init__(self, settings: Limits, path: Path, tick: Callable[[str], None] = lambda name: None) -> None:
        self.settings, self.path, self.tick = settings, path, tick
        self.device = torch.device(settings.device)
        self.results: dict[str, dict[str, Any]] = {}
        self.budget = Budget(self.device, settings.time_limit, settings.memory_limit)
        self.about: dict[str, dict[str, Any]] = {}  # of each model: "dtype", "parameters", "weights_bytes" and more

    def run(self) -> Any:
        ours = gc.get_freeze_count() == 0  # else the caller's, which unfreeze() would take with it
        gc.freeze()  # what is there stays: each visit ends with a collection, which need not look at all of transformers
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error", ZokernWarning)  # a skipped update would be timed as if it were one
            try:
                self._all()
            finally:
                if ours:
                    gc.unfreeze()
                self._save(last=True)
        return self.stored()

    def _all(self) -> None:
        """Makes models, and lets groups of cases take turns."""
        raise NotImplementedError

    def stored(self) -> Any:
        return self.results

    def said(self) -> dict[str, Any]:
        """What the record says of the run."""
        return asdict(self.settings)

    def _save(self, *, last: bool = False) -> None:
        self.budget.save(self.name, self.said(), self.stored(), self.path, last=last)

    def _put(self, cases: Iterable[Case], **status: Any) -> None:
        for case in cases:
            self.results[case.name] = {**case.facts(), **self.about[case.model], **status}

    def _fits(self, cases: Iterable[Case], needed: int) -> bool:
        """Whether `needed` bytes can be had; where not, the results of `cases` say so."""
        try:
            self.budget.require(needed)
        except DoesNotFit as error:
            self._put(cases, **error.facts)
            return False
        return True

    def _take_turns(self, running: list[Entry]) -> None:
        for number in range(self.settings.rounds + 1):
            turn = list(running)
            for entry in turn:
                if self.budget.spent:
                    return
                self.tick(f"{entry.case.name}, round {number} of {self.settings.rounds}")
                try:
                    self.budget.attempt(functools.partial(self._visit, entry), entry.needed)
                except split.NotCaptured as error:
                    running.remove(entry)
                    self._put([entry.case], status="not captured", why=str(error))
                except DoesNotFit as error:
                    running.remove(entry)
                    self._put([entry.case], **error.facts)
                    instead = self._instead(entry)
                    turn += instead
                    running += instead
                self._save()

    def _instead(self, entry: Entry) -> list[Entry]:
        """What takes the place of a case that did not fit."""
        return []

    def _visit(self, entry: Entry) -> None:
        """Raises DoesNotFit where it needs more than there is."""
        if "extra_bytes" in self.results[entry.case.name]:
            self._time(entry)
        else:
            self.budget.require(entry.needed)
            self._weigh(entry)

    def _weigh(self, entry: Entry) -> None:
        """The memory of the first step beyond that of a forward."""

        def first_step() -> None:
            stepper = make(entry.case, entry.model)
            stepper.step(entry.closure)
            kept.append(state_bytes(stepper, entry.model))

        kept: list[int] = []
        replaced = entry.model.parameters() if entry.case.is_peer else ()
        extra = peak_bytes(first_step, self.device, replaced) - entry.forward
        self._put(
            [entry.case],
            status="left out",
            forward_bytes=entry.forward,
            extra_bytes=extra,
            extra_share=extra / self.about[entry.case.model]["weights_bytes"],
            state_bytes=kept[0],
        )

    def _time(self, entry: Entry) -> None:
        stepper, result = make(entry.case, entry.model), self.results[entry.case.name]
        for _ in range(split.Graphed.WARM_UP if split.is_graphed(stepper) else 1):
            stepper.step(entry.closure)
        before = dict(stepper.counters)
        seconds = split.measure(stepper, entry.closure, self.device, entry.case.whole(self.settings.steps))
        optimizer = optimizer_of(stepper)
        if optimizer is not None and optimizer.skipped_steps:
            raise RuntimeError(
                f"{entry.case.name}: a loss was not finite, so an update was skipped and its time means nothing"
            )
        rounds = [*result.get("each", ()), seconds]
        result |= {"status": "timed", **split.summary(rounds), **split.counted(stepper, before), "each": rounds}


class Run(Turns):
    """One run of `zokern bench step`. not_timed: ways that it has not, and why."""

    name = "step"
    settings: Settings

    def __init__(self, settings: Settings, path: Path, tick: Callable[[str], None] = lambda name: None) -> None:
        super().__init__(settings, path, tick)
        self.groups, self.not_timed = plan(settings)
        each_round = sum(len(group) for shapes in self.groups.values() for group in shapes.values())
        self.visits = each_round * (settings.rounds + 1)

    def said(self) -> dict[str, Any]:
        left_out = [name for name, result in self.results.items() if result["status"] == "left out"]
        more = {"left_out": left_out, "not_timed": self.not_timed, "attention": models.attention()}
        return super().said() | more

    def _all(self) -> None:
        for name in self.settings.models:
            self._model(name, getattr(torch, self.settings.dtype))

    def _model(self, name: str, dtype: torch.dtype) -> None:
        parameters = models.parameters(name)
        weights = parameters * dtype.itemsize
        self.about[name] = {"dtype": self.settings.dtype, "parameters": parameters, "weights_bytes": weights}
        every = [case for group in self.groups[name].values() for case in group]
        self._put(every, status="left out")  # until it is timed
        if self.budget.spent or not self._fits(every, weights):
            return
        model = models.build(name, dtype, self.device)
        for (rows, length), group in self.groups[name].items():
            logits = models.logits_bytes(name, rows, length, dtype.itemsize)
            if self._fits(group, logits):
                self._group(group, model, models.closure(name, model, rows, length, self.device), logits)

    def _group(self, group: list[Case], model: nn.Module, closure: Callable[[], Tensor], logits: int) -> None:
        try:
            forward = self.budget.attempt(lambda: self._forward(closure), logits)
        except DoesNotFit as error:
            self._put(group, **error.facts)
        else:
            self._take_turns([Entry(case, model, closure, forward) for case in group])

    def _forward(self, closure: Callable[[], Tensor]) -> int:
        """The peak of a forward alone, after one whose lasting allocations are not the activations'."""
        closure()
        return peak_bytes(closure, self.device)

    def _instead(self, entry: Entry) -> list[Entry]:
        """The same with its curvature in bfloat16, if that takes less."""
        other = smaller(entry.case, entry.model)
        if other is None:
            return []
        self._put([other], status="left out")  # until it is timed
        return [replace(entry, case=other)]
