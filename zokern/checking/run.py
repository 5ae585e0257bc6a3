"""`zokern.check`: each trainable tensor is perturbed alone, to see whether the loss reacts."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from zokern import _checks
from zokern.checking import eager, telling, verdict
from zokern.checking.around import Around
from zokern.checking.cost import cost, members_of
from zokern.checking.perturbed import Perturbed, refused_by
from zokern.checking.progress import Progress
from zokern.checking.result import NO_EFFECT, NOT_LOOKED_AT, REACTS, Finding, Result, Row
from zokern.checking.runs import Reacting, Runs
from zokern.checking.subject import Subject, Tried
from zokern.deltas import Delta
from zokern.interrupts import HeldInterrupts
from zokern.optim import MeZO, ZerothOrderOptimizer
from zokern.optim.losses import Closure
from zokern.parts import is_dtensor
from zokern.placement import Forward

GROWTH = 10.0
LIMIT = 1.0  # largest perturbation, as a share of the tensor's rms
GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
LEAST = 100.0  # but at least this many eps: a tensor of zeros has no rms


@torch.no_grad()
def check(
    model: object,
    closure: Closure,
    batches: Iterable[Any] | None = None,
    *,
    batch_weights: Iterable[float] | None = None,
    reduction: str = "mean",
    loss_weights: Mapping[str, float] | None = None,
    eps: float | None = None,
    placement: object = None,
    max_seconds: float | None = 60.0,
    max_tensors: int | None = None,
    progress: bool = True,
) -> Result:
    """Perturbs each trainable tensor alone and says which ones the closure does not react to, and what a step will cost.

    theta_i + s z_i with s = eps, 10 eps, ... until the loss changes, at most max(rms(theta_i), 100 eps): one forward a
    tensor where all react at once. z and eps are those of the first step, and the perturbation is shown as the
    optimizer's placement shows it. The verdict is "no effect seen", with what may be the reason. docs/check.md has what
    each verdict means.

    Weights, buffers, random states and training flags are what they were to the bit afterwards, whatever is raised, Ctrl-C
    included.

    Args:
        model: an optimizer of zokern; or what one takes (an nn.Module, tensors, groups), which is looked at as
            zokern.MeZO(model) would train it.
        closure, batches, batch_weights, reduction, loss_weights: as in `step`.
        eps: size of the first perturbation, for what is no optimizer. Default: that of zokern.MeZO, 1e-3.
        placement: likewise. Default: "auto".
        max_seconds: no further tensor is looked at after this many seconds; those that were lie evenly in the model. None
            is no limit.
        max_tensors: look at this many, evenly spread. None means all.
        progress: show a bar, where standard error is a terminal.

    Returns:
        A `Result`: rows, verdicts, `ok`; `print` shows it as a table.

    Raises:
        TypeError, ValueError: what the optimizer's constructor and its `step` would refuse, in their words; for shards.
        RuntimeError: inside a step of this optimizer, or inside its `folded()`.

    Memory: a copy of one tensor at a time (16-bit weights: two), and of the model's buffers, quantised ones left out.
    """
    optimizer = _optimizer(model, eps, placement)
    if max_seconds is not None:
        _checks.check_number(max_seconds, "max_seconds", 0.0)
    if max_tensors is not None:
        _checks.check_integer(max_tensors, "max_tensors", 1)
    if not callable(closure):
        raise TypeError(
            "check needs a closure that returns the loss, for example zokern.check(model, lambda: model(x).loss)"
        )
    eager.refuse_scripts(optimizer.module)
    _refuse_shards(optimizer)
    subject = Subject(optimizer)
    devices = {one.tensor.device for one in subject.tried}
    with HeldInterrupts() as interrupts:
        around = Around(optimizer.module, sorted(devices, key=str))
        try:
            runs = Runs(
                around, interrupts, closure, batches, vectors=optimizer.takes_vector_losses or model is not optimizer,
                batch_weights=batch_weights, reduction=reduction, loss_weights=loss_weights,
            )  # fmt: skip
            with Progress(len(subject.tried), progress) as shown:
                return _Check(subject, runs, max_seconds, max_tensors, shown).run()
        finally:
            around.rewind(closely=True)


def _optimizer(model: object, eps: float | None, placement: object) -> ZerothOrderOptimizer:
    if isinstance(model, ZerothOrderOptimizer):
        if "numbers" in vars(model):
            raise RuntimeError("check was called inside a step of this optimizer; call it before the step")
        if model._turn.lock.locked():
            raise RuntimeError(f"check was called inside {model._turn.taken[0]}() of this optimizer; call it outside")
        for name, value in (("eps", eps), ("placement", placement)):
            if value is not None:
                raise ValueError(f"{name} is the optimizer's own here; leave it out, or give the model instead")
        return model
    if isinstance(model, torch.optim.Optimizer):
        raise TypeError(f"model is a {type(model).__name__}; give an optimizer of zokern, or the model")
    given: dict[str, Any] = {"eps": eps, "placement": placement}
    return MeZO(model, lr=0.0, **{name: value for name, value in given.items() if value is not None})


def _refuse_shards(optimizer: ZerothOrderOptimizer) -> None:
    """Ranks would not stop after the same tensor: a check ends after some time, and looks at values."""
    found = next((p for group in optimizer.param_groups for p in group["params"] if is_dtensor(p)), None)
    if found is not None:
        name = optimizer._parameters.registry.names[id(found)]
        raise ValueError(
            f"check: {name} is a DTensor, cut up over ranks, and check looks at whole tensors: call it on one "
            "process, with the model before it is sharded, or a smaller one of the same modules"
        )


def spread(count: int) -> list[int]:
    """0 .. count - 1, each once, so that the first of them lie evenly, however many are taken: in the order of their
    multiples of the golden ratio, modulo 1. Layers of equal numbers of tensors are not in step with it."""
    return sorted(range(count), key=lambda i: i * GOLDEN % 1.0)


class _Check:
    """One check, of a subject with at least a loss to evaluate."""

    def __init__(
        self, subject: Subject, runs: Runs, max_seconds: float | None, max_tensors: int | None, shown: Progress
    ) -> None:
        self.subject, self.runs, self.shown = subject, runs, shown
        self.optimizer, self.module = subject.optimizer, subject.optimizer.module
        self.max_seconds, self.max_tensors = max_seconds, max_tensors
        self.begun = time.perf_counter()
        self.perturbed = Perturbed(self.optimizer)
        self.watched = verdict.Watched(None, set())

    def run(self) -> Result:
        self.reacting = Reacting(self.runs)
        rows: dict[int, Row] = {}
        if self.reacting.finite:
            self.watched = self._watch()
            limit = len(self.subject.tried) if self.max_tensors is None else self.max_tensors
            for i in spread(len(self.subject.tried)):
                late = self.max_seconds is not None and time.perf_counter() - self.begun > self.max_seconds
                if len(rows) == limit or (rows and late):
                    break
                rows[i] = self._row(self.subject.tried[i])
                self.shown.advance(rows[i].name)
        return self._result(rows)

    def _watch(self) -> verdict.Watched:
        reads = eager.Reads([one.tensor for one in self.subject.tried])
        with eager.Calls(self.module) as calls, eager.forced():
            try:
                with reads:
                    self.runs()
            except Exception:  # not everything runs under a dispatch mode
                calls.seen.clear()
                self.runs()
                return verdict.Watched(None, calls.seen)
        return verdict.Watched(reads.seen, calls.seen)

    def _row(self, one: Tried) -> Row:
        moved = self.perturbed.moved(one)
        about = (one.names, tuple(one.tensor.shape), one.tensor.dtype)
        size, seen, refusal = self._grow(one)
        if seen is not None:
            return Row(*about, REACTS, size, self.reacting.change(seen), moved)
        suspicious, why = self._why(one, size, refusal)
        return Row(*about, NO_EFFECT, size, 0.0 if self.reacting.exact else None, moved, suspicious, why)

    def _grow(self, one: Tried) -> tuple[float, Tensor | None, str]:
        """The size of the last perturbation, the loss if it reacted, and why it was not shown, if so."""
        size, largest = one.eps, max(LEAST * one.eps, LIMIT * _rms(one.tensor))
        while True:
            try:
                with self.perturbed.shown(one, size):
                    loss = self.runs()
            except RuntimeError as error:
                if self.perturbed.placement is None or not refused_by(error):
                    raise
                return size, None, str(error).split(";")[0]
            if self.reacting(loss):
                return size, loss, ""
            if size >= largest:
                return size, None, ""
            size = min(size * GROWTH, largest)

    def _why(self, one: Tried, size: float, refusal: str) -> tuple[bool, str]:
        read = self.watched.reads is not None and id(one.tensor) in self.watched.reads
        read = read and not isinstance(one.tensor, Delta)  # which cannot be perturbed in place
        if self.perturbed.placement is not None and (read or refusal) and not isinstance(one.tensor, Delta):
            with self.perturbed.in_place(one, size):
                loss = self.runs()
            if self.reacting(loss):
                shown = verdict.SHOWN.format(placement=self.optimizer.placement)
                return True, f"{refusal}: {shown}" if refusal else shown
        if read:
            with self.perturbed.in_place(one, size), eager.forced():
                loss = self.runs()
            if self.reacting(loss):
                return True, verdict.COMPILED
        suspicious, why = verdict.explain(one, self.module, self.watched)
        return (True, f"{refusal}: {why}") if refusal else (suspicious, why)

    def _result(self, rows: dict[int, Row]) -> Result:
        tried, reacting, runs = self.subject.tried, self.reacting, self.runs
        if runs.coarse is not None:
            rows = {
                i: dataclasses.replace(row, why=verdict.COARSE) if row.why == verdict.READ else row
                for i, row in rows.items()
            }
        findings = [*telling.of_loss(reacting, runs, self.module), *self.subject.findings]
        flat = bool(rows) and all(row.state == NO_EFFECT for row in rows.values())
        findings += telling.of_tensors(list(rows.values()), flat, reacting, runs)
        if isinstance(self.perturbed.placement, Forward):
            findings.append(telling.of_forward(self.perturbed.placement, members_of(self.optimizer)))
        if rows and len(rows) < len(tried):
            limit = "max_tensors" if len(rows) == self.max_tensors else f"max_seconds={self.max_seconds:g}"
            text = f"{len(rows)} of {len(tried)} tensors were looked at, evenly spread ({limit})"
            findings.append(Finding("time", text))
        every = [
            rows.get(i) or Row(one.names, tuple(one.tensor.shape), one.tensor.dtype, NOT_LOOKED_AT)
            for i, one in enumerate(tried)
        ]
        seconds = runs.seconds if runs.seconds < float("inf") else runs.first or 0.0
        return Result(
            rows=[*every, *self.subject.untrained],
            verdicts=findings,
            loss=float(reacting.base.mean()),
            same_twice=reacting.same_twice,
            noise=reacting.noise,
            placement=self.optimizer.placement,
            eps=float(self.optimizer.param_groups[0]["eps"]),
            looked_at=len(rows),
            trainable=len(tried),
            forwards=runs.counters.forwards,
            seconds=time.perf_counter() - self.begun,
            cost=cost(self.optimizer, runs.batches, seconds),
        )


def _rms(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t, dtype=torch.float32)) / math.sqrt(t.numel())
