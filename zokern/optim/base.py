"""The step that all methods share.

A method says what it wants to know in `rounds()`: it yields the probes of a round, each {seed: a} for the weights
theta + eps * sum_k a_k z(seed_k), is sent their losses, and returns what they say about the gradient. `update` makes of
that the one pass that the step ends with, by default

    theta <- (1 - lr*weight_decay) theta - lr * sum_k (g_k / eps) z(seed_k)

with each parameter group's own lr, eps and weight_decay. Everything between the losses and the pass stays on the device:
the host never waits. A loss that is not finite makes the step skip itself on the device.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from zokern import placement as placements
from zokern.interrupts import HeldInterrupts
from zokern.optim import drivers
from zokern.optim.batched import Sharing
from zokern.optim.captured import Captured
from zokern.optim.events import StepEvent
from zokern.optim.examples import PerExample, losses_of
from zokern.optim.folds import Folds
from zokern.optim.guards import primed
from zokern.optim.ledger import Ledger
from zokern.optim.losses import Closure, Losses
from zokern.optim.numbers import HostNumbers, StepNumbers
from zokern.optim.probing import Probing
from zokern.optim.recent import Recent
from zokern.optim.update import Estimate, Rates
from zokern.passes.spec import PassNumbers, PassSpec
from zokern.passes.update import CPU, Update, sent
from zokern.placement.shadow import Exact

ALONE = contextlib.nullcontext()


# The constructor is in built.py, state_dicts in saving.py, what a graph of a step needs in captured.py.
class ZerothOrderOptimizer(Folds, Captured, Recent):
    """Base class of the methods. Subclasses declare their settings (zokern/settings.py) and have `rounds` (method.py)."""

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Closure | None = None,
        batches: Iterable[Any] | None = None,
        *,
        batch_weights: Iterable[float] | None = None,
        reduction: str = "mean",
        loss_weights: Mapping[str, float] | None = None,
        batched: bool | int = False,
    ) -> Tensor:
        """One step.

        Args:
            closure: returns the scalar loss of the current batch, or a dict of losses by name; it is called several times
                under torch.no_grad() and must compute the same function each time (same batch; dropout: see
                paired_randomness). Without one nothing is done where torch's checkpoint functions call, with lr 0 and
                gradients of zeros that they have made themselves, and once after whoever drives the optimizer has set
                `step_done`; everywhere else that is an error.
            batches: gradient accumulation. If given, each evaluation calls closure(batch) for every entry under the same
                perturbation and takes the mean, so a perturbation is made once however many micro-batches there are.
            batch_weights: of each entry, >= 0, for example its number of tokens; None means equal ones.
            reduction: "mean", the weighted mean of the entries, or "sum".
            loss_weights: of losses by name; those that are not listed weigh 1.
            batched: all probes of a round in one forward, or at most that many. Needs placement="forward". The closure
                gets each entry of `batches` repeated along the first dimension, a block of rows for each probe, and
                returns the loss (or reward) of each example, 1-D, or a dict of such: a probe's loss is their mean, with
                reduction="sum" their sum. Where a test finds that rows mix, probes are evaluated one after another,
                with a warning; metrics["probes_per_forward"] tells.

        Returns:
            The loss, 0-d, on the closure's device: the mean over the step's forwards. Nothing waits for the device.

        Raises:
            TypeError: if closure is missing or does not return one number. Whatever is raised, also from inside the
                closure, KeyboardInterrupt included, the weights are clean afterwards.
        """
        if closure is None and (self.step_done or primed(self)):
            self.step_done = False
            return self.metrics.get("loss", torch.zeros((), device=CPU))
        ranks = self._ranks if self._decided else self._take_part()
        with ALONE if ranks is None else ranks.step(self):
            losses = (Losses if batched is False else functools.partial(losses_of, batched))(
                closure, batches, batch_weights, reduction, loss_weights,
                vectors=self.takes_vector_losses, reduce=self.reduce, maximize=self.maximize,
                shared=ranks is not None,
            )  # fmt: skip
            if self._skips.seen is not None:
                self._skips.warn()
            if self._moves.coming is not None:
                self._moves.tell(self.advice)
            self._parameters.check_groups(self, self.pipelined)
            with HeldInterrupts() as interrupts:
                numbers = HostNumbers(self.param_groups, self.seed, self._passes.counters.steps, self.schedule)
                self._step(losses, numbers, interrupts)
                if self._skips.news:
                    self._skips.tell()
            if self._guards.due:
                self._guards.tell(self)
            return self.metrics["loss"]

    @torch.no_grad()
    def step_with(
        self,
        numbers: StepNumbers,
        closure: Closure,
        batches: Iterable[Any] | None = None,
        *,
        weights: Tensor | None = None,
        batched: bool | int = False,
        **how: Any,
    ) -> None:
        """A step with numbers from another source: a device's make it one that waits for nothing and can be captured.
        weights: of the batches, on the device (Losses.weigh). how: reduction and loss_weights."""
        ranks = self._ranks if self._decided else self._take_part()
        losses = losses_of(
            batched, closure, batches, vectors=self.takes_vector_losses, reduce=self.reduce, maximize=self.maximize,
            shared=ranks is not None, **how,
        )  # fmt: skip
        if weights is not None:
            losses.weigh(weights)
        with ALONE if ranks is None else ranks.step(self), HeldInterrupts() as interrupts:
            self._step(losses, numbers, interrupts)
            self._skips.tell()

    def _step(self, losses: Losses, numbers: StepNumbers, interrupts: HeldInterrupts) -> None:
        turn = self._turn
        if not turn.lock.acquire(blocking=False):
            turn.refuse("step")
        try:
            turn.taken = "step", threading.get_ident()
            if self.listeners:
                self.ask_listeners()
            if numbers.device is not None:
                self._skips.count = sent(self._skips.count, numbers.device)
                self._guards.flats.on(numbers.device)
            self.numbers = numbers
            watch = self._guards.watch
            if watch is not None and watch.changed():
                watch.take_in(self)
            version = self._parameters.version
            self.active = self._parameters.active(self, self.seed, self._passes.counters.steps, numbers.gates)
            if version != self._parameters.version and isinstance(self._placement, Exact):
                self._placement.forget()  # torch counts no `p.data = other`, which has another address
            self._guards.begin(self, losses)
            if self._folding is not None:
                self._folding.begin(self)
            if self._moves.active() is not self.active or self._moves.version != self._parameters.version:
                self._begin_moves()
            if self._looked != self._parameters.looked:
                self.check_way_back(wait=False)
                self._looked = self._parameters.looked
            rates = Rates(*numbers.rates(self.active.rows))
            try:
                self._evaluate_and_update(losses, rates, interrupts)
            except placements.Refused as refusal:
                self._guards.give_way(self, refusal)  # or raises it
                losses.forget()
                self._guards.begin(self, losses)
                self._evaluate_and_update(losses, rates, interrupts)
        finally:
            vars(self).pop("numbers", None)
            turn.lock.release()

    def _evaluate_and_update(self, losses: Losses, rates: Rates, interrupts: HeldInterrupts) -> None:
        told: list[tuple[PassSpec, PassNumbers]] = []
        counters, sweep, ledger = self._passes.counters, self.active.sweep, Ledger()
        step = counters.steps
        layout = self._parameters.layout(self) if self.listeners else {}
        lrs = self.numbers.lrs() if self.listeners else ()

        probing = Probing(self, losses, rates.eps, interrupts)
        try:
            self._passes.gate = self.numbers.gate
            self._passes.listener = (lambda *one: told.append(one)) if self.listeners else None
            self._placement.begin(sweep, rates.eps, scaled=self.scaled)
            evaluate = Sharing(self._batched, probing) if isinstance(losses, PerExample) else probing.alone
            if self._ranks is not None:
                evaluate = functools.partial(self._ranks.evaluate, self, losses, evaluate)
            self._apply(drivers.at_once(self.rounds(), evaluate, losses.gather), losses, rates, ledger)
        finally:
            interrupts.holding = True  # also where a second signal has come between the closure and here
            done = ledger.returned or ledger.settle(self._passes)
            try:
                try:
                    if self._passes.under_way is not None:
                        self._passes.settle()
                finally:
                    self._placement.end()
            finally:
                try:
                    if self._guards.busy:
                        self._guards.end(self, done)
                finally:
                    self._passes.gate = self._passes.listener = None
                    if done:  # whatever was raised since, and whatever those who are told of it raise
                        counters.steps, self.metrics = step + 1, dict(ledger.metrics)
                    if self.listeners:
                        self._tell(step, told, ledger, layout, lrs)

    def _apply(self, estimate: Estimate, losses: Losses, rates: Rates, ledger: Ledger) -> None:
        """The step's last pass, and before it everything that has to agree with it."""
        numbers = self.numbers
        every, ok = losses.finite(captured=numbers.gate is not None)
        ledger.metrics = {
            "loss": every.mean().to(torch.float32),
            "projected_gradient": (estimate.projected / numbers.first_eps()).to(torch.float32),
            **(losses.metrics() if losses.named or isinstance(losses, PerExample) else {}),
        }
        rates = rates.on(every.device)
        update = self.update(estimate, rates)
        if self.active.gated is not None:
            update = self.active.gated.masked(update)
        if losses.values is None:
            ok = ok & torch.isfinite(update.values()).all()
        elif not update.fits():
            ok = torch.zeros_like(ok)
        ok = self._skips.note(ok, numbers.gate, ledger)
        self._moves.note(update, rates.lr, ok, numbers.gate, self.advice, ledger)
        rounding = placements.Rounding(  # of 16-bit weights; sweep.launch leaves float32 as it is
            "nearest" if self.rounding == "nearest" else "stochastic", numbers.rounding_seeds()
        )
        ahead = self._ahead() if self.pipelined else None
        self._guards.note(self, losses, every, numbers.gate, ledger)
        self.note(ok, ledger)
        later = type(self).applied is not ZerothOrderOptimizer.applied
        if self.listeners and not later:
            ledger.memory = tuple(self.memory())
        whole: Update | None = update
        if self._folding is not None:
            whole = self._folding.take(self, update, ok, ledger)
        ledger.before, ledger.ok = self._passes.done, ok
        if whole is update:
            self._placement.update(update, ok, rounding, ahead)
        elif whole is not None:  # a fold: of other steps too, also where this one is not ok
            self._placement.update(whole, torch.ones_like(ok), rounding)
        ledger.returned = True
        if later:
            self.metrics = dict(ledger.metrics)
            self.applied(ok)

    def _ahead(self) -> placements.Ahead:
        """Every method's first probe of perturbed weights is along direction 0."""
        active = self._parameters.active(self, self.seed, self._passes.counters.steps + 1)
        return placements.Ahead(active.sweep, {self.numbers.next_seed(0): 1.0})

    def _tell(
        self,
        step: int,
        told: list[tuple[PassSpec, PassNumbers]],
        ledger: Ledger,
        layout: Mapping[str, Any],
        lrs: tuple[float | Tensor, ...],
    ) -> None:
        memory: tuple[float | Tensor, ...] = ()
        if ledger.ok is not None:
            memory = tuple(self.memory()) if ledger.memory is None else ledger.memory
        loss = None if ledger.ok is None else ledger.metrics["loss"]
        deferred = ledger.ok is not None and ledger.deferred is not None
        passes = (*told, *([ledger.deferred] if deferred and ledger.deferred else []))
        self.tell_listeners(StepEvent(step, ledger.ok, passes, self.numbers.drawn, loss, lrs, memory, layout, deferred))
