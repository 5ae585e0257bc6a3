"""Cases that take turns, round after round, within limits of time and memory: the run of `step` and of `scaling`.

A visit to a case makes its optimizer anew, runs one step to warm up, times `steps` in a row, and frees it, so that no
case's states take memory from another's. The first visit is not timed: it measures the memory of the first step, from the
optimizer's construction on, beyond that of a forward alone. Weights go on from where the case before left them: a step's
time does not depend on them, and the learning rate is tiny.

The file is written anew after every visit. What time or memory did not allow is in it too, with the reason.
"""

from __future__ import annotations

import functools
import gc
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zokern._checks import ZokernWarning
from zokern.bench import split
from zokern.bench.budget import Budget, peak_bytes
from zokern.bench.step_cases import Case, Limits, make, needed_bytes, optimizer_of, state_bytes


@dataclass
class Entry:
    """A case at work. forward: bytes of a forward alone."""

    case: Case
    model: nn.Module
    closure: Callable[[], Tensor]
    forward: int = 0


class Turns(ABC):
    """One run; `results`, by the cases' names, grow while it goes on.

    A result's "status" is "timed", "does not fit" (with "needed_bytes" and "free_bytes"), "left out" (the time limit) or
    "not captured" (with "why").
    A case that was timed for fewer rounds than wanted says so by its number of rounds.
    """

    name: str
    weighs: tuple[str, ...]  # what is recorded of the memory

    def __init__(self, settings: Limits, path: Path, tick: Callable[[str], None] = lambda name: None) -> None:
        self.settings, self.path, self.tick = settings, path, tick
        self.device = torch.device(settings.device)
        self.results: dict[str, dict[str, Any]] = {}
        self._rounds: dict[Case, list[dict[str, float]]] = {}
        self.budget = Budget(self.device, settings.time_limit, settings.memory_limit)
        self.not_timed: dict[str, str] = {}  # ways that this run has not, and why
        self.about: dict[str, dict[str, Any]] = {}  # of each model; among it "weights_bytes"

    @property
    def visits(self) -> int:
        """How often `tick` is called where nothing is left out."""
        return self.cases_at_most * (self.settings.rounds + 1)

    def run(self) -> Any:
        gc.freeze()  # what is there stays: each visit ends with a collection, which need not look at all of transformers
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error", ZokernWarning)  # a skipped update would be timed as if it were one
            try:
                self._all()
            finally:
                gc.unfreeze()
                self._save(last=True)
        return self.stored()

    # ----------------------------------------------------------------------------------------- what each benchmark says

    @property
    @abstractmethod
    def cases_at_most(self) -> int: ...

    @abstractmethod
    def _all(self) -> None:
        """Makes models, and lets groups of cases take turns."""

    @abstractmethod
    def facts(self, case: Case) -> dict[str, Any]:
        """What a result says of its case, timed or not."""

    @abstractmethod
    def summary(self, case: Case, rounds: Sequence[Mapping[str, float]], counts: Mapping[str, float]) -> dict[str, Any]:
        """What is recorded of the times so far."""

    def said(self) -> dict[str, Any]:
        """For the record, beside the settings."""
        return {}

    def stored(self) -> Any:
        return self.results

    def instead(self, entry: Entry) -> list[Entry]:
        """What takes the place of a case that did not fit."""
        return []

    # -------------------------------------------------------------------------------------------------------- the turns

    def put(self, cases: Collection[Case], **status: Any) -> None:
        for case in cases:
            self.results[case.name] = {**self.facts(case), **status}

    def fits(self, cases: Collection[Case], needed: int) -> bool:
        """Whether `needed` bytes can be had; where not, the results of `cases` say so."""
        fits = needed <= self.budget.free
        if not fits:
            self.put(cases, **self.budget.unfit(needed))
        return fits

    def attempt(self, call: Callable[[], int | None]) -> int | None:
        """What call() returns, or None if the device's memory did not suffice."""
        try:
            return call()
        except torch.OutOfMemoryError:
            return None
        finally:
            gc.collect()  # optimizers are parts of cycles

    def take_turns(self, running: list[Entry]) -> None:
        for number in range(self.settings.rounds + 1):
            turn = list(running)
            for entry in turn:
                if self.budget.spent:
                    return
                self.tick(f"{entry.case.name}, round {number} of {self.settings.rounds}")
                try:
                    done = self.attempt(functools.partial(self._visit, entry))
                except split.NotCaptured as error:
                    running.remove(entry)
                    self.put([entry.case], status="not captured", why=str(error))
                else:
                    if done is None:
                        running.remove(entry)
                        needed = entry.forward + needed_bytes(entry.case, entry.model)
                        self.put([entry.case], **self.budget.unfit(needed))
                        instead = self.instead(entry)
                        turn += instead
                        running += instead
                self._save()

    def _visit(self, entry: Entry) -> int | None:
        """None where it does not fit."""
        if "extra_bytes" in self.results[entry.case.name]:
            return self._time(entry)
        fits = entry.forward + needed_bytes(entry.case, entry.model) <= self.budget.free
        return self._weigh(entry) if fits else None

    def _weigh(self, entry: Entry) -> int:
        """The memory of the first step beyond that of a forward."""

        def first_step() -> None:
            stepper = make(entry.case, entry.model)
            stepper.step(entry.closure)
            kept.append(state_bytes(stepper, entry.model))

        kept: list[int] = []
        extra = peak_bytes(first_step, self.device, entry.model.parameters()) - entry.forward
        share = extra / self.about[entry.case.model]["weights_bytes"]
        found = {"forward_bytes": entry.forward, "extra_bytes": extra, "extra_share": share, "state_bytes": kept[0]}
        self.put([entry.case], status="left out", **{name: found[name] for name in self.weighs})
        return extra

    def _time(self, entry: Entry) -> int:
        """Returns how many rounds there were."""
        stepper, case = make(entry.case, entry.model), entry.case
        for _ in range(split.Graphed.WARM_UP if isinstance(stepper, split.Graphed) else 1):
            stepper.step(entry.closure)
        before = dict(stepper.counters)
        seconds = split.measure(stepper, entry.closure, self.device, self.settings.steps)
        optimizer = optimizer_of(stepper)
        if optimizer is not None and optimizer.skipped_steps:
            raise RuntimeError(
                f"{case.name}: a loss was not finite, so an update was skipped and its time means nothing"
            )
        rounds = self._rounds.setdefault(case, [])
        rounds.append(seconds)
        self.results[case.name] |= {
            "status": "timed", **self.summary(case, rounds, split.counted(stepper, before)),
        }  # fmt: skip
        return len(rounds)

    def _save(self, *, last: bool = False) -> None:
        said = {**asdict(self.settings), **self.said()}
        self.budget.save(self.name, said, self.stored(), self.path, last=last)
