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
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zokern._checks import ZokernWarning
from zokern.bench import models, split
from zokern.bench.budget import Budget
from zokern.bench.memory import peak_bytes
from zokern.bench.step_cases import Case, Settings, make, needed_bytes, optimizer_of, plan, smaller, state_bytes
from zokern.bench.step_graphed import GRAPHED_WARM_UP, Graphed, NotCaptured

Results = dict[str, dict[str, Any]]
Tick = Callable[[str], None]


class Run:
    """One run of the benchmark; `results` grows while it goes on.

    A result's "status" is "timed", "does not fit" (with "needed_bytes" and "free_bytes"), "left out" (the time limit) or
    "not captured" (with "why").
    A case that was timed for fewer rounds than wanted says so by step.rounds.
    """

    def __init__(self, settings: Settings, path: Path, tick: Tick = lambda name: None) -> None:
        self.settings, self.path, self.tick = settings, path, tick
        self.device = torch.device(settings.device)
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.results: Results = {}
        self._rounds: dict[str, list[dict[str, float]]] = {}
        self.budget = Budget(self.device, settings.time_limit, settings.memory_limit)
        self._facts: dict[str, Any] = {}
        self._plan = plan(settings)

    @property
    def visits(self) -> int:
        """How often `tick` is called where nothing is left out."""
        return self._plan.visits * (self.settings.rounds + 1)

    @property
    def not_timed(self) -> dict[str, str]:
        """Ways that this run has not, and why."""
        return self._plan.not_timed

    def run(self) -> Results:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ZokernWarning)  # a skipped update would be timed as if it were one
            try:
                for name in self.settings.models:
                    self._model(name)
            finally:
                self._save(last=True)
        return self.results

    # ----------------------------------------------------------------------------------------------------- the levels

    def _model(self, name: str) -> None:
        parameters = models.parameters(name)
        self._facts[name] = {"parameters": parameters, "weights_bytes": parameters * self.dtype.itemsize}
        shapes = self._plan.groups[name]
        every = [case for _, group in shapes for case in group]
        for case in every:
            self._put(case, {"status": "left out"})  # until it is timed
        if self.budget.spent:
            return
        if len(self._fitting(every, parameters * self.dtype.itemsize)) < len(every):
            return
        model = models.build(name, self.dtype, self.device)
        gc.freeze()  # what is there stays: each visit ends with a collection, which need not look at all of transformers
        try:
            for (rows, length), group in shapes:
                with torch.no_grad():
                    self._group(group, model, models.closure(name, model, rows, length, self.device))
        finally:
            gc.unfreeze()

    def _group(self, group: list[Case], model: nn.Module, closure: Callable[[], Tensor]) -> None:
        first = group[0]
        logits = models.logits_bytes(first.model, first.rows, first.length, self.dtype.itemsize)
        if len(self._fitting(group, logits)) < len(group):
            return
        forward = self._attempt(lambda: self._forward(closure))
        if forward is None:
            self._put_unfit(group, logits)
            return
        running = [fitting for case in group for fitting in self._that_fit(case, model, forward)]
        for number in range(self.settings.rounds + 1):
            turn = list(running)
            for case in turn:
                if self.budget.spent:
                    continue
                self.tick(f"{case.name}, round {number} of {self.settings.rounds}")
                weighed = "forward_bytes" in self.results[case.name]
                visit = self._time if weighed else functools.partial(self._weigh, forward=forward)
                try:
                    done = self._attempt(functools.partial(visit, case, model, closure))
                except NotCaptured as error:
                    running.remove(case)
                    self._put(case, {"status": "not captured", "why": str(error)})
                else:
                    if done is None:
                        running.remove(case)
                        instead = self._smaller(case, model, forward)
                        turn += instead
                        running += instead
                self._save()

    def _attempt(self, call: Callable[[], int]) -> int | None:
        """What call() returns, or None if the device's memory did not suffice."""
        try:
            return call()
        except torch.OutOfMemoryError:
            return None
        finally:
            gc.collect()  # optimizers are parts of cycles

    # ------------------------------------------------------------------------------------------------------- the visits

    def _forward(self, closure: Callable[[], Tensor]) -> int:
        """The peak of a forward alone, after one whose lasting allocations are not the activations'."""
        closure()
        return peak_bytes(closure, self.device)

    def _weigh(self, case: Case, model: nn.Module, closure: Callable[[], Tensor], forward: int) -> int:
        """The memory of the first step beyond `forward`."""

        def first_step() -> None:
            stepper = make(case, model)
            stepper.step(closure)
            kept.append(state_bytes(stepper, model))

        kept: list[int] = []
        extra = peak_bytes(first_step, self.device, model.parameters()) - forward
        weights = self._facts[case.model]["weights_bytes"]
        self._put(
            case,
            {
                "status": "left out",
                "forward_bytes": forward,
                "extra_bytes": extra,
                "extra_share": extra / weights,
                "state_bytes": kept[0],
            },
        )
        return extra

    def _time(self, case: Case, model: nn.Module, closure: Callable[[], Tensor]) -> int:
        """One visit to a case. Returns how many there were."""
        stepper = make(case, model)
        for _ in range(GRAPHED_WARM_UP if isinstance(stepper, Graphed) else 1):
            stepper.step(closure)
        before = dict(stepper.counters)
        seconds = split.measure(stepper, closure, self.device, self.settings.steps)
        optimizer = optimizer_of(stepper)
        if optimizer is not None and optimizer.skipped_steps:
            raise RuntimeError(
                f"{case.name}: a loss was not finite, so an update was skipped and its time means nothing"
            )
        rounds = self._rounds.setdefault(case.name, [])
        rounds.append(seconds)
        counts = split.counted(stepper, before)
        self.results[case.name] |= {"status": "timed", **split.summary(rounds), **counts, "each": rounds}
        return len(rounds)

    # -------------------------------------------------------------------------------------------------------- the limits

    def _that_fit(self, case: Case, model: nn.Module, forward: int) -> list[Case]:
        """The case, or what can be timed in its place; both are in the results."""
        fits = forward + needed_bytes(case, model) <= self.budget.free
        return [case] if fits else self._smaller(case, model, forward)

    def _smaller(self, case: Case, model: nn.Module, forward: int) -> list[Case]:
        """In the place of a case that did not fit."""
        self._put_unfit([case], forward + needed_bytes(case, model))
        other = smaller(case, model)
        if other is None:
            return []
        self._put(other, {"status": "left out"})  # until it is timed
        return self._that_fit(other, model, forward)

    def _put_unfit(self, group: list[Case], needed: int) -> None:
        for case in group:
            self._put(case, self.budget.unfit(needed))

    def _fitting(self, group: list[Case], needed: int) -> list[Case]:
        """`group` if `needed` bytes can be had; else none, and the results say so."""
        if needed <= self.budget.free:
            return group
        self._put_unfit(group, needed)
        return []

    def _put(self, case: Case, facts: dict[str, Any]) -> None:
        self.results[case.name] = {**case.facts(), "dtype": self.settings.dtype, **self._facts[case.model], **facts}

    def _save(self, *, last: bool = False) -> None:
        left_out = [name for name, result in self.results.items() if result["status"] == "left out"]
        said = {
            **asdict(self.settings),
            "left_out": left_out,
            "not_timed": self.not_timed,
            "attention": models.attention(),
        }
        self.budget.save("step", said, self.results, self.path, last=last)
