"""The step that all methods share.

A method says what it wants to know in `rounds()`: it yields the probes of a round, each {seed: a} for the weights
theta + eps * sum_k a_k z(seed_k), is sent their losses, and returns what they say about the gradient. `update` makes of
that the one pass that the step ends with, by default

    theta <- (1 - lr*weight_decay) theta - lr * sum_k (g_k / eps) z(seed_k)

with each parameter group's own lr, eps and weight_decay. Everything between the losses and the pass stays on the device:
the host never waits. A loss that is not finite makes the step skip itself on the device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor

from zokern import directions
from zokern import placement as placements
from zokern.interrupts import HeldInterrupts
from zokern.optim import drivers, parameters, state
from zokern.optim.common import Common
from zokern.optim.events import Listener, StepEvent
from zokern.optim.losses import Closure, Losses, Reduce, Skips
from zokern.optim.method import Method
from zokern.optim.numbers import HostNumbers, StepNumbers
from zokern.optim.parameters import Active, Parameters
from zokern.optim.update import Estimate, Rates
from zokern.passes.spec import PassNumbers, PassSpec
from zokern.passes.update import Terms, sent
from zokern.settings import Setting
from zokern.sweep import NOTHING, Counters, Passes


class ZerothOrderOptimizer(Common, Method, torch.optim.Optimizer):
    """Base class of the methods. Subclasses declare their settings (zokern/settings.py) and have `rounds` (method.py).

    options: what a saved state must agree on. listeners: called with a StepEvent after every step. reduce: a round's losses
    on this process -> those that all processes work with.
    """

    def __init__(self, params: object, lr: float | Tensor, **given: Any) -> None:
        values = self.take({"params": params, "lr": lr, **given})
        direction = directions.parse(values["distribution"])
        groups, self.module, registry = parameters.parse(params)
        self.layers = copy.copy(self.layers)  # it learns this module's blocks; the user's stays a setting
        self.options = {"distribution": direction.name, "rounding": self.rounding, **self.stored(self.own_settings())}
        self.metrics: dict[str, Tensor] = {}  # of the last step, on the device: loss, projected_gradient
        self.listeners: list[Listener] = []
        self.reduce: Reduce | None = None
        self.active: Active  # of the current step
        self.numbers: StepNumbers  # likewise
        self._parameters = Parameters(registry, self.states())
        self._passes = Passes(direction, values["backend"])
        self._skips = Skips()
        rates = {name: values[name] for name in parameters.RATES}
        torch.optim.Optimizer.__init__(self, cast("Iterable[Tensor]", groups), rates)
        self.settle()
        self.options["layers"] = None
        if self.layers is not None:
            self.layers.bind(self.module)
            self.options["layers"] = {"num_dropped": self.layers.num_dropped, "blocks": self.layers.names}
        sixteen_bit = any(p.element_size() == 2 for group in self.param_groups for p in group["params"])
        self._placement = placements.make(
            values["placement"], self.module, sixteen_bit, self._passes, pipelined=self.pipelined
        )

    # ------------------------------------------------------------------------------------------------------- the step

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Closure,
        batches: Iterable[Any] | None = None,
        *,
        batch_weights: Iterable[float] | None = None,
        reduction: str = "mean",
        loss_weights: Mapping[str, float] | None = None,
    ) -> Tensor:
        """One step.

        Args:
            closure: returns the scalar loss of the current batch, or a dict of losses by name; it is called several times
                under torch.no_grad() and must compute the same function each time (no dropout, same batch).
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
        losses = Losses(
            closure, batches, batch_weights, reduction, loss_weights,
            vectors=self.takes_vector_losses, reduce=self.reduce,
        )  # fmt: skip
        if self._skips.seen is not None:
            self._skips.warn()
        self._parameters.check_groups(self, self.pipelined)
        with HeldInterrupts() as interrupts:
            numbers = HostNumbers(self.param_groups, self.seed, self._passes.counters.steps, self.schedule)
            self._step(losses, numbers, interrupts)
        return self.metrics["loss"]

    @torch.no_grad()
    def step_with(self, numbers: StepNumbers, closure: Closure) -> None:
        """A step with numbers from another source: a device's make it one that waits for nothing and can be captured."""
        if numbers.device is not None:
            self._skips.count = sent(self._skips.count, numbers.device)
        with HeldInterrupts() as interrupts:
            losses = Losses(closure, vectors=self.takes_vector_losses, reduce=self.reduce)
            self._step(losses, numbers, interrupts)

    def _step(self, losses: Losses, numbers: StepNumbers, interrupts: HeldInterrupts) -> None:
        if "numbers" in vars(self):
            raise RuntimeError("step was called inside a step of the same optimizer; a closure returns a loss instead")
        self.numbers = numbers
        try:
            self.active = self._parameters.active(self, self.seed, self._passes.counters.steps)
            rates = Rates(*numbers.rates(self.active.rows))
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
                    addresses = list(map(Tensor.data_ptr, sweep.params))
                    if addresses != sweep.addresses:  # the closure has moved weights: what was there may be freed
                        sweep.addresses = addresses
                        sweep.forget()
                        self._parameters.look_again()

        try:
            ok = self._apply(drivers.in_turn(self.rounds(), evaluate, losses.gather), losses, rates)
        finally:
            self._placement.end()
            self._passes.gate = self._passes.listener = None
            if ok is not None:  # done, whatever those who are told of it raise
                self._passes.counters.steps += 1
            if self.listeners:
                self._tell(step, told, ok, layout)

    def _apply(self, estimate: Estimate, losses: Losses, rates: Rates) -> Tensor:
        """The step's last pass; returns whether it did anything."""
        every, ok = losses.finite()
        numbers = self.numbers
        self.metrics = {
            "loss": every.mean().to(torch.float32),
            "projected_gradient": (estimate.projected / numbers.first_eps()).to(torch.float32),
            **(losses.metrics() if losses.named else {}),
        }
        update = self.update(estimate, rates.on(every.device))
        ok = self._skips.note(ok & torch.isfinite(update.values()).all(), numbers.gate)
        rounding = placements.Rounding(
            "nearest" if self.rounding == "nearest" else "stochastic", numbers.rounding_seeds()
        )
        self._placement.update(update, ok, rounding, self._ahead() if self.pipelined else None)
        self.applied(ok)
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

    # -------------------------------------------------------------------------------------------------- what it tells

    @property
    def counters(self) -> dict[str, int]:
        """ "steps", "forwards", "passes", "launches" and "elements_moved" of this run so far."""
        return asdict(self._passes.counters)

    @property
    def skipped_steps(self) -> int:
        """Steps whose update was skipped because a loss was not finite. Waits for the device."""
        return int(self._skips.count)

    @property
    def placement(self) -> str:
        """The name of the placement in use: what "auto" has become."""
        return self._placement.name

    @property
    def backend(self) -> str:
        """As it was given."""
        return self._passes.backend

    @property
    def state_spec(self) -> state.Spec:
        """The states that it keeps for each parameter: name -> (dtype, initial value)."""
        return self._parameters.spec

    @classmethod
    def own_settings(cls) -> dict[str, Setting]:
        """Those that make one run of the method differ from another, beside the common ones."""
        return {name: one for name, one in cls.settings.items() if one.kept and name not in Common.settings}

    def completed(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options that a run left. An earlier version had fewer settings: what became one later was at its default."""
        return {**{name: one.stored(one.default) for name, one in self.own_settings().items()}, **options}

    def weights(self) -> dict[str, Tensor]:
        """All parameters by name: the module's, or those of its groups."""
        if self.module is not None:
            return dict(self.module.named_parameters())
        names = self._parameters.names(self)
        return {name: p for own, group in zip(names, self.param_groups, strict=True)
                for name, p in zip(own, group["params"], strict=True)}  # fmt: skip

    def layout(self) -> dict[str, Any]:
        """What a replay has to know of the parameters as they are: ids, shapes, dtypes, groups, rows and blocks."""
        return self._parameters.layout(self, anew=True)

    def resumed(self, steps: int, skipped: int) -> None:
        """Weights, states and what the method remembers are those of after this many steps."""
        self._passes.counters.steps = steps
        self._skips.load(skipped)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"]:
            self._parameters.registry.add(p)
            parameters.check_parameter(p, f"params: {self._parameters.registry.names[id(p)]}")
        parameters.check_group(group, len(self.param_groups) - 1)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled whole: it holds on to its module. Save state_dict() and "
            "load it into a new optimizer"
        )

    def state_dict(self) -> dict[str, Any]:
        """torch's state_dict plus the entry "zokern": what it takes to continue with the same noise."""
        saved = super().state_dict()
        saved["zokern"] = {
            "format": state.FORMAT,
            "contract": "zk1",
            "method": type(self).__name__,
            "seed": self.seed,
            "tensor_ids": self._parameters.ids(self),
            "module": self.module is not None,
            "names": self._parameters.names(self),
            "counters": self.counters,
            "skipped": self.skipped_steps,
            "options": dict(self.options),
            "history": self.history(),
        }
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues a saved run: step, seed, tensor ids, hyper-parameters.

        Raises:
            ValueError: if the state is not zokern's, or of another contract, method, options or parameters.
        """
        if "numbers" in vars(self):
            raise RuntimeError("load_state_dict was called inside a step; load before it or after it")
        saved = dict(state_dict)
        own = saved.pop("zokern", None)
        names = self._parameters.names(self)
        if own is not None:
            own = {**own, "options": self.completed(own["options"])}
        state.check(own, type(self).__name__, self.options, names, self.module is not None)
        kept = state.check_tensors(saved, self.param_groups, self._parameters.spec)
        super().load_state_dict(saved)
        for p, values in kept.items():
            self.state[p] = values  # as they were saved: torch has cast them to the parameter's dtype
        self._parameters.take_ids(self, own["tensor_ids"])
        self.active = Active(NOTHING, [], frozenset())  # it holds states
        self.seed = own["seed"]
        self._passes.counters = Counters(**own["counters"])
        self._skips.load(own["skipped"])
        self.load_history(own["history"])

    # ------------------------------------------------------------------------------------------------ for GraphedStep

    def rows_changed(self) -> None:
        """What rows of numbers go by, `row_key`, is no longer the same."""
        self._parameters.forget()

    def check_groups(self) -> None:
        """The groups' numbers, which users and schedulers change."""
        self._parameters.check_groups(self, self.pipelined)

    def why_not_graphed(self) -> str | None:
        """What keeps a step of this optimizer from being the same launches each time."""
        if self.layers is not None:
            return "layers leaves out other blocks in each step"
        if self.pipelined:
            return "pipelined=True fills a step's first copies in the step before"
        if self.listeners:
            return "a journal is written, which needs each step's numbers on the host"
        return super().why_not_graphed()

    def captured_tensors(self) -> list[Tensor]:
        """What a captured step works on beside the parameters."""
        states = [t for kept in self.state.values() for t in kept.values() if isinstance(t, Tensor)]
        return [self._skips.count, *states, *self._placement.memory(), *super().captured_tensors()]

    def set_counters(self, counters: dict[str, int]) -> None:
        self._passes.counters = Counters(**counters)

    def launched_again(self, metrics: dict[str, Tensor], cost: dict[str, int]) -> None:
        """A captured step has been launched: takes note of it as `step` would have."""
        self._skips.warn()
        self._opt_called = True  # torch's schedulers look for it: here `step` itself was not called
        self.metrics = metrics
        self.set_counters({name: value + cost[name] for name, value in self.counters.items()})
        self._skips.look()
