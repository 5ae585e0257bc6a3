"""The step that all methods share.

A method says what it wants to know in `rounds()`: it yields the probes of a round, each {seed: a} for the weights
theta + eps * sum_k a_k z(seed_k), is sent their losses, and returns what they say about the gradient. `update` makes of
that the one pass that the step ends with, by default

    theta <- (1 - lr*weight_decay) theta - lr * sum_k (g_k / eps) z(seed_k)

with each parameter group's own lr, eps and weight_decay. Everything between the losses and the pass stays on the device:
the host never waits. A loss that is not finite makes the step skip itself on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from zokern import placement as placements
from zokern.interrupts import HeldInterrupts
from zokern.optim import drivers
from zokern.optim.captured import Captured
from zokern.optim.events import StepEvent
from zokern.optim.guards import primed
from zokern.optim.losses import Closure, Losses
from zokern.optim.numbers import HostNumbers, StepNumbers
from zokern.optim.saving import Saving
from zokern.optim.update import Estimate, Rates
from zokern.passes.spec import PassNumbers, PassSpec
from zokern.passes.update import CPU, Terms, sent


class ZerothOrderOptimizer(Saving, Captured):
    """Base class of the methods. Subclasses declare their settings (zokern/settings.py) and have `rounds` (method.py).

    The constructor is in built.py, state_dicts in saving.py, what a graph of a step needs in captured.py.
    """

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Closure | None = None,
        batches: Iterable[Any] | None = None,
        *,
        batch_weights: Iterable[float] | None = None,
        reduction: str = "mean",
        loss_weights: Mapping[str, float] | None = None,
    ) -> Tensor:
        """One step.

        Args:
            closure: returns the scalar loss of the current batch, or a dict of losses by name; it is called several times
                under torch.no_grad() and must compute the same function each time (same batch; dropout: see
                paired_randomness). Without one nothing is done where torch's checkpoint functions call, with lr 0 and
                gradients of zeros that they have made themselves; everywhere else that is an error.
            batches: gradient accumulation. If given, each evaluation calls closure(batch) for every entry under the same
                perturbation and takes the mean, so a perturbation is made once however many micro-batches there are.
            batch_weights: of each entry, >= 0, for example its number of tokens; None means equal ones.
            reduction: "mean", the weighted mean of the entries, or "sum".
            loss_weights: of losses by name; those that are not listed weigh 1.

        Returns:
            The loss, 0-d, on the closure's device: the mean over the step's forwards. Nothing waits for the device.

        Raises:
            TypeError: if closure is missing or does not return one number. Whatever is raised, also from inside the
                closure, KeyboardInterrupt included, the weights are clean afterwards.
        """
        if closure is None and primed(self):
            return torch.zeros((), device=CPU)
        losses = Losses(
            closure, batches, batch_weights, reduction, loss_weights,
            vectors=self.takes_vector_losses, reduce=self.reduce, maximize=self.maximize,
        )  # fmt: skip
        if self._skips.seen is not None:
            self._skips.warn()
        self._parameters.check_groups(self, self.pipelined)
        with HeldInterrupts() as interrupts:
            numbers = HostNumbers(self.param_groups, self.seed, self._passes.counters.steps, self.schedule)
            self._step(losses, numbers, interrupts)
        if self._guards.due:
            self._guards.tell(self)
        return self.metrics["loss"]

    @torch.no_grad()
    def step_with(self, numbers: StepNumbers, closure: Closure) -> None:
        """A step with numbers from another source: a device's make it one that waits for nothing and can be captured."""
        if numbers.device is not None:
            self._skips.count = sent(self._skips.count, numbers.device)
            self._guards.flats.on(numbers.device)
        with HeldInterrupts() as interrupts:
            losses = Losses(
                closure, vectors=self.takes_vector_losses, reduce=self.reduce, maximize=self.maximize
            )  # fmt: skip
            self._step(losses, numbers, interrupts)

    def _step(self, losses: Losses, numbers: StepNumbers, interrupts: HeldInterrupts) -> None:
        if "numbers" in vars(self):
            raise RuntimeError("step was called inside a step of the same optimizer; a closure returns a loss instead")
        self.numbers = numbers
        try:
            watch = self._guards.watch
            if watch is not None and watch.changed():
                watch.take_in(self)
            self.active = self._parameters.active(self, self.seed, self._passes.counters.steps)
            self._guards.begin(self, losses)
            rates = Rates(*numbers.rates(self.active.rows))
            try:
                self._placement.begin(self.active.sweep, rates.eps, scaled=self.scaled)
                self._evaluate_and_update(losses, rates, interrupts)
            except placements.Refused as refusal:
                self._guards.give_way(self, refusal)  # or raises it
                losses.forget()
                self._guards.begin(self, losses)
                self._placement.begin(self.active.sweep, rates.eps, scaled=self.scaled)
                self._evaluate_and_update(losses, rates, interrupts)
        finally:
            del self.numbers

    def _evaluate_and_update(self, losses: Losses, rates: Rates, interrupts: HeldInterrupts) -> None:
        told: list[tuple[PassSpec, PassNumbers]] = []
        ok: Tensor | None = None
        step, sweep = self._passes.counters.steps, self.active.sweep
        layout = self._parameters.layout(self) if self.listeners else {}
        self._passes.gate = self.numbers.gate
        self._passes.listener = (lambda *one: told.append(one)) if self.listeners else None

        def evaluate(terms: Terms) -> Tensor:
            with self._placement.present(terms):
                try:
                    interrupts.release()
                    return losses.evaluate(self._passes.counters, self.numbers.device)
                finally:
                    interrupts.hold()
                    if self._guards.busy:
                        self._guards.probed()
                    addresses = list(map(Tensor.data_ptr, sweep.params))
                    if addresses != sweep.addresses:  # the closure has moved weights: what was there may be freed
                        sweep.addresses = addresses
                        sweep.forget()
                        self._parameters.look_again()

        try:
            ok = self._apply(drivers.in_turn(self.rounds(), evaluate, losses.gather), losses, rates)
        finally:
            self._placement.end()
            if self._guards.busy:
                self._guards.end(self, ok is not None)
            self._passes.gate = self._passes.listener = None
            if ok is not None:  # done, whatever those who are told of it raise
                self._passes.counters.steps += 1
            if self.listeners:
                self._tell(step, told, ok, layout)

    def _apply(self, estimate: Estimate, losses: Losses, rates: Rates) -> Tensor:
        """The step's last pass; returns whether it did anything."""
        numbers = self.numbers
        every, ok = losses.finite(captured=numbers.gate is not None)
        self.metrics = {
            "loss": every.mean().to(torch.float32),
            "projected_gradient": (estimate.projected / numbers.first_eps()).to(torch.float32),
            **(losses.metrics() if losses.named else {}),
        }
        update = self.update(estimate, rates.on(every.device))
        ok = self._skips.note(ok & torch.isfinite(update.values()).all(), numbers.gate)
        rounding = placements.Rounding(  # of 16-bit weights; sweep.launch leaves float32 as it is
            "nearest" if self.rounding == "nearest" else "stochastic", numbers.rounding_seeds()
        )
        self._placement.update(update, ok, rounding, self._ahead() if self.pipelined else None)
        self.applied(ok)
        self._guards.note(self, losses, every, numbers.gate)
        return ok

    def _ahead(self) -> placements.Ahead:
        """Every method's first probe of perturbed weights is along direction 0."""
        step = self._passes.counters.steps + 1
        active = self._parameters.active(self, self.seed, step)
        seed = HostNumbers(self.param_groups, self.seed, step, self.schedule).seed(0)
        return placements.Ahead(active.sweep, {seed: 1.0})

    def _tell(
        self, step: int, told: list[tuple[PassSpec, PassNumbers]], ok: Tensor | None, layout: Mapping[str, Any]
    ) -> None:
        event = StepEvent(
            step,
            ok,
            tuple(told),
            self.numbers.drawn,
            None if ok is None else self.metrics["loss"],
            tuple(float(group["lr"]) for group in self.param_groups),
            () if ok is None else tuple(self.memory()),
            layout,
        )
        for listener in self.listeners:
            listener(event)
