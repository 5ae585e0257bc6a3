"""The step that all methods share: losses, clean-up, counting, state.

A method implements `estimate(probe)`: it asks for losses at theta + eps * sum_k a_k z(seed_k) by calling probe({seed: a}),
and returns what they say about the gradient. `update` makes of that the one pass that the step ends with, by default

    theta <- (1 - lr*weight_decay) theta - lr * sum_k (g_k / eps) z(seed_k)

with each parameter group's own lr, eps and weight_decay. Everything between the losses and the pass stays on the device:
the host never waits. A loss that is not finite makes the step skip itself on the device.
"""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor

from zokern import _checks, backends, placement
from zokern.contract.streams import ROUNDING_STREAM, STATE_STREAM, derive_seed
from zokern.interrupts import HeldInterrupts
from zokern.journal.format import BROKEN_OFF, SKIPPED
from zokern.journal.record import Recorder
from zokern.layers import RandomBlocks
from zokern.optim import parameters, state
from zokern.optim.live import Live
from zokern.optim.update import Ahead, Estimate, Rates, Update, sgd
from zokern.sweep import Counters, Member, Passes, Seed, Terms, sent

Probe = Callable[[Terms], Tensor]
ROUNDINGS = ("auto", "nearest", "stochastic")


class ZerothOrderOptimizer(torch.optim.Optimizer):
    """Base class of the methods. Subclasses set `options` (what a saved state must agree on) and `estimate`.

    states: what the method keeps for each parameter: name -> (dtype, initial value). scaled: directions are divided by the
    root of the state "h".
    """

    takes_vector_losses = False

    def __init__(
        self,
        params: object,
        defaults: dict[str, Any],
        *,
        distribution: str,
        seed: int,
        rounding: str,
        placement_name: str,
        pipelined: bool,
        layers: RandomBlocks | None,
        backend: str,
        options: dict[str, Any],
        states: state.Spec | None = None,
        scaled: bool = False,
    ) -> None:
        _checks.check_choice(distribution, "distribution", _checks.DISTRIBUTIONS)
        _checks.check_choice(rounding, "rounding", ROUNDINGS)
        _checks.check_choice(backend, "backend", ("auto", *backends.BACKENDS))
        _checks.check_choice(placement_name, "placement", placement.PLACEMENTS)
        parameters.check_group(defaults, 0)
        groups, self.module, self._registry = parameters.parse(params)
        self.seed = _checks.check_seed(seed, "seed")
        self.pipelined = _checks.check_flag(pipelined, "pipelined")
        self.rounding = rounding
        self.layers = copy.copy(layers)  # it learns this module's blocks; the user's stays a setting
        self.options = {"distribution": distribution, "rounding": rounding, **options}
        self.metrics: dict[str, Tensor] = {}  # of the last step, on the device: loss, projected_gradient
        self.recorder: Recorder | None = None  # while a journal is written
        self.live: Live | None = None  # while a step is captured: its numbers in device memory
        self._states = states or {}
        self._scaled = scaled
        self._rows: list[tuple[int, Hashable]] = []  # of the current step: the parameter group, and row_key
        self._dropped: set[int] = set()
        self._ok = torch.ones((), dtype=torch.bool)
        self._losses: list[Tensor] = []
        self._passes = Passes(distribution, backend)
        self._skipped = torch.zeros((), dtype=torch.int64)
        self._skipped_seen: tuple[Tensor, torch.cuda.Event] | None = None
        self._warned = False
        super().__init__(cast("Iterable[Tensor]", groups), defaults)
        self.options["layers"] = None
        if self.layers is not None:
            self.layers.bind(self.module)
            self.options["layers"] = {"num_dropped": self.layers.num_dropped, "blocks": self.layers.names}
        sixteen_bit = any(p.element_size() == 2 for group in self.param_groups for p in group["params"])
        self._placement = placement.make(
            placement_name, self.module, sixteen_bit, self._passes, pipelined=self.pipelined
        )

    @abstractmethod
    def estimate(self, probe: Probe) -> Estimate:
        """Asks for the step's losses and says what they tell about the gradient."""

    def update(self, estimate: Estimate, rates: Rates) -> Update:
        """The pass that applies an estimate."""
        return sgd(estimate, rates)

    def schedule(self, step: int) -> list[float]:
        """Numbers that the update of a step takes from the step's number alone, computed on the host."""
        return []

    def structure(self) -> Hashable:
        """Of the current step: steps with equal ones launch the same kernels, which is what a graph can hold."""
        return None

    def _scheduled(self, i: int) -> float | Tensor:
        return self.schedule(self._passes.counters.steps)[i] if self.live is None else self.live.scheduled[i]

    def row_key(self, param: Tensor) -> Hashable:
        """Parameters of one group whose keys differ get rows of coefficients of their own."""
        return None

    # ------------------------------------------------------------------------------------------------------- the step

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[..., Tensor | float], batches: Iterable[Any] | None = None
    ) -> Tensor:
        """One step.

        Args:
            closure: returns the scalar loss of the current batch; it is called several times under torch.no_grad() and
                must compute the same function each time (no dropout, same batch).
            batches: gradient accumulation. If given, each evaluation calls closure(batch) for every entry under the same
                perturbation and takes the mean, so a perturbation is made once however many micro-batches there are.

        Returns:
            The loss, 0-d, on the closure's device: the mean over the step's forwards. Nothing waits for the device.

        Raises:
            TypeError: if closure is missing or does not return one number. Whatever is raised, also from inside the
                closure, KeyboardInterrupt included, the weights are clean afterwards.
        """
        if not callable(closure):
            raise TypeError(
                "step needs a closure that returns the loss, for example opt.step(lambda: model(x, y).loss)"
            )
        micro = None if batches is None else list(batches)
        if micro is not None and not micro:
            raise ValueError("batches is empty")
        self._warn_of_skipped()
        with HeldInterrupts() as interrupts:
            self._step(closure, micro, interrupts)
        return self.metrics["loss"]

    def _step(
        self, closure: Callable[..., Tensor | float], micro: list[Any] | None, interrupts: HeldInterrupts
    ) -> None:
        if self.live is None:
            self.check_groups()
        self._dropped = set() if self.layers is None else self.layers.dropped(self.seed, self._passes.counters.steps)
        members, self._rows = self._members(self._dropped)
        eps = self._of_rows("eps")
        self._losses = []
        self._placement.begin(members, eps, scaled=self._scaled)
        try:

            def probe(terms: Terms) -> Tensor:
                with self._placement.present(terms), interrupts.allowed():
                    if micro is None:
                        loss = self._evaluate(closure)
                    else:
                        losses = [self._evaluate(closure, batch) for batch in micro]
                        loss = torch.cat(losses) if losses[0].dim() else torch.stack(losses).mean()
                self._losses.append(loss.mean())
                return loss

            self._apply(self.estimate(probe), eps)
            flags = 0
        except BaseException:
            flags = BROKEN_OFF
            raise
        finally:
            self._placement.end()
            self._passes.forget()
            if self.recorder is not None:
                self._record(self.recorder, flags)
        self._passes.counters.steps += 1

    # ------------------------------------------------------------------------------------------------ for GraphedStep

    def check_groups(self) -> None:
        """The groups' numbers, which users and schedulers change."""
        for g, group in enumerate(self.param_groups):
            parameters.check_group(group, g)
            if self.pipelined and isinstance(group["eps"], Tensor):
                raise TypeError(f"eps of parameter group {g} is a tensor; pipelined=True needs a number")

    @torch.no_grad()
    def step_live(self, closure: Callable[[], Tensor], live: Live) -> None:
        """A step that reads its numbers from the device and waits for nothing: what can be captured in a graph."""
        self.live, self._passes.gate = live, live.gate
        self._skipped = sent(self._skipped, live.device)
        try:
            with HeldInterrupts() as interrupts:
                self._step(closure, None, interrupts)
        finally:
            self.live, self._passes.gate = None, None

    def why_not_graphed(self) -> str | None:
        """What keeps a step of this optimizer from being the same launches each time."""
        if self.layers is not None:
            return "layers leaves out other blocks in each step"
        if self.pipelined:
            return "pipelined=True fills a step's first copies in the step before"
        if self.recorder is not None:
            return "a journal is written, which needs each step's numbers on the host"
        return None

    def captured_tensors(self) -> list[Tensor]:
        """What a captured step works on beside the parameters."""
        states = [t for kept in self.state.values() for t in kept.values() if isinstance(t, Tensor)]
        return [self._skipped, *states, *self._placement.memory()]

    def set_counters(self, counters: dict[str, int]) -> None:
        self._passes.counters = Counters(**counters)

    def replayed(self, metrics: dict[str, Tensor], cost: dict[str, int]) -> None:
        """A captured step has been launched: takes note of it as `step` would have."""
        self._warn_of_skipped()
        self._opt_called = True  # torch's schedulers look for it: here `step` itself was not called
        self.metrics = metrics
        self.set_counters({name: value + cost[name] for name, value in self.counters.items()})
        if self._skipped.device.type != "cpu":
            self._remember_skipped()

    # ----------------------------------------------------------------------------------------------------- the journal

    def _record(self, recorder: Recorder, flags: int) -> None:
        lrs = [float(group["lr"]) for group in self.param_groups]
        if flags == BROKEN_OFF:
            recorder.finish(self._passes.counters.steps, flags, [], lrs, float("nan"), self.layout())
            return
        flags = 0 if bool(self._ok) else SKIPPED
        memory = self.memory()
        recorder.finish(self._passes.counters.steps, flags, memory, lrs, float(self.metrics["loss"]), self.layout())

    def layout(self) -> dict[str, Any]:
        """What a replay has to know of the parameters: their ids, shapes, dtypes, groups, rows and blocks."""
        params = [
            [
                self._registry.ids[id(p)], self._registry.names[id(p)], list(p.shape),
                str(p.dtype).removeprefix("torch."), g, self.row_key(p),
                None if self.layers is None else self.layers.block_of(p),
            ]
            for g, p in self._trainable()
        ]  # fmt: skip
        layers = None if self.layers is None else [self.layers.num_dropped, len(self.layers.names)]
        return {"params": params, "layers": layers}

    def memory(self) -> list[float]:
        """Numbers of the last step that a method needs again in later ones, for the journal."""
        return []

    def remember(self, step: int, memory: list[float], dropped: set[int], ok: bool) -> None:
        """Takes back what `memory` gave of a step, when a run is taken up from its journal."""

    def _evaluate(self, closure: Callable[..., Tensor | float], *batch: Any) -> Tensor:
        loss = closure(*batch)
        self._passes.counters.forwards += 1
        if self.live is not None and (not isinstance(loss, Tensor) or loss.device != self.live.device):
            raise TypeError(f"closure must return the loss as a tensor on {self.live.device} to be captured")
        if isinstance(loss, (int, float)) and not isinstance(loss, bool):
            loss = torch.tensor(float(loss), dtype=torch.float64)
        if not isinstance(loss, Tensor):
            raise TypeError(f"closure must return the loss as a scalar tensor, got {type(loss).__name__}")
        if self.takes_vector_losses and loss.dim() == 1 and loss.numel() > 0:
            return loss.detach().to(torch.float64)
        if loss.numel() != 1:
            raise TypeError(
                f"closure must return one loss, got a tensor of shape {tuple(loss.shape)}; take its mean"
                + (" or return a vector with the loss of each example" if self.takes_vector_losses else "")
            )
        return loss.detach().reshape(()).to(torch.float64)

    def _of_rows(self, name: str) -> Tensor:
        """A hyper-parameter of each row's group, float64 [R], on the host or on the device of the first that is there."""
        if self.live is not None:
            return torch.stack([self.live.hyper(name, g) for g, _ in self._rows])
        values = [torch.as_tensor(self.param_groups[g][name], dtype=torch.float64).reshape(()) for g, _ in self._rows]
        device = next((v.device for v in values if v.device.type != "cpu"), torch.device("cpu"))
        return torch.stack([sent(v, device) for v in values]) if values else torch.empty(0)

    def _apply(self, estimate: Estimate, eps: Tensor) -> None:
        losses = torch.stack(self._losses)
        device = losses.device
        self.metrics = {
            "loss": losses.mean().to(torch.float32),
            "projected_gradient": (estimate.projected / self._first_eps()).to(torch.float32),
        }
        lr, eps, decay = (sent(x, device) for x in (self._of_rows("lr"), eps, self._of_rows("weight_decay")))
        update = self.update(estimate, Rates(lr, eps, decay))
        ok = torch.isfinite(losses).all()
        for value in (*update.coefs.values(), *update.shared.values()):
            ok = ok & torch.isfinite(value.to(torch.float32)).all()  # as the pass reads it
        if self.live is not None:
            gate = self.live.gate.reshape(()).to(torch.bool)
            self._skipped.add_(~ok & gate)
            ok = ok & gate
        elif device.type == "cpu" and self._skipped.device.type == "cpu":
            self._skipped += int(not ok)
            self._warn_of_skipped()
        else:
            self._skipped = sent(self._skipped, device)
            self._skipped.add_(~ok)
            self._remember_skipped()
        self._placement.update(
            update,
            ok,
            rounding_seeds=self._rounding_seeds(),
            stochastic=self.rounding != "nearest",
            ahead=self._ahead() if self.pipelined else None,
        )
        self._ok = ok
        self.applied(ok)

    def applied(self, ok: Tensor) -> None:
        """Called after the step's last pass; ok (0-d bool, on the device) says whether it did anything."""

    def _first_eps(self) -> float | Tensor:
        """Of the first group, for the metrics: on the device if it is there."""
        eps = self.param_groups[0]["eps"]
        if self.live is not None:
            return self.live.hyper("eps", 0)
        return eps.to(torch.float64) if isinstance(eps, Tensor) else float(eps)

    def _rounding_seeds(self) -> tuple[int, int] | Tensor:
        """Of the weights and of a state."""
        if self.live is not None:
            return torch.stack([self.live.seed(ROUNDING_STREAM), self.live.seed(STATE_STREAM)])
        step = self._passes.counters.steps
        return derive_seed(self.seed, step, ROUNDING_STREAM), derive_seed(self.seed, step, STATE_STREAM)

    def direction_seed(self, k: int) -> Seed:
        """Seed of the current step's direction k."""
        if self.live is not None:
            return self.live.seed(k)
        seed = derive_seed(self.seed, self._passes.counters.steps, k)
        if self.recorder is not None:
            self.recorder.known[seed] = (self._passes.counters.steps, k)
        return seed

    def _trainable(self) -> Iterator[tuple[int, Tensor]]:
        """Each parameter that has something to train, once, with the number of its group; all are registered."""
        seen: set[int] = set()
        for g, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.requires_grad and p.numel() and id(p) not in seen:
                    seen.add(id(p))
                    self._registry.add(p)
                    yield g, p

    def _ahead(self) -> Ahead:
        """Every method's first probe of perturbed weights is along direction 0."""
        step = self._passes.counters.steps + 1
        dropped = set() if self.layers is None else self.layers.dropped(self.seed, step)
        members, _ = self._members(dropped)
        return Ahead(members, {derive_seed(self.seed, step, 0): 1.0})

    def _members(self, dropped: set[int]) -> tuple[list[Member], list[tuple[int, Hashable]]]:
        """The parameters that a step moves, and its rows. Read from param_groups each time: users replace them."""
        members: list[Member] = []
        rows: dict[tuple[int, Hashable], int] = {}
        for g, p in self._trainable():
            if self.layers is not None and not self.layers.is_active(p, dropped):
                continue
            name, kept = self._registry.names[id(p)], state.of(self.state, p, self._states)
            row = rows.setdefault((g, self.row_key(p)), len(rows))
            members.append(Member(p, self._registry.ids[id(p)], row, name, kept))
        return members, list(rows)

    # -------------------------------------------------------------------------------------------------- what it tells

    @property
    def counters(self) -> dict[str, int]:
        """ "steps", "forwards", "passes", "launches" and "elements_moved" of this run so far."""
        return asdict(self._passes.counters)

    @property
    def skipped_steps(self) -> int:
        """Steps whose update was skipped because a loss was not finite. Waits for the device."""
        return int(self._skipped)

    def _remember_skipped(self) -> None:
        """Starts a copy of the count to the host, to be looked at in a later step without waiting."""
        if self._skipped_seen is None and not self._warned:
            host = torch.empty((), dtype=torch.int64, pin_memory=True)
            host.copy_(self._skipped, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._skipped.device))
            self._skipped_seen = (host, event)

    def _warn_of_skipped(self) -> None:
        count = 0
        if self._skipped.device.type == "cpu":
            count = int(self._skipped)
        elif self._skipped_seen is not None:
            host, event = self._skipped_seen
            if event.query():
                count, self._skipped_seen = int(host), None
        if count and not self._warned:
            self._warned = True
            warnings.warn(
                "a loss was not finite, so the update of that step was skipped (weights unchanged). Further skips are "
                "only counted: see skipped_steps. In float16 try bfloat16 or a smaller eps.",
                _checks.ZokernWarning,
                stacklevel=4,
            )

    # ---------------------------------------------------------------------------------------------------------- state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"]:
            self._registry.add(p)
            parameters.check_parameter(p, f"params: {self._registry.names[id(p)]}")
        parameters.check_group(group, len(self.param_groups) - 1)

    def _ids(self) -> list[list[int]]:
        return [[self._registry.ids[id(p)] for p in group["params"]] for group in self.param_groups]

    def _names(self) -> list[list[str]]:
        return [[self._registry.names[id(p)] for p in group["params"]] for group in self.param_groups]

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
            "tensor_ids": self._ids(),
            "module": self.module is not None,
            "names": self._names(),
            "counters": self.counters,
            "skipped": self.skipped_steps,
            "options": dict(self.options),
            "history": self.history(),
        }
        return saved

    def history(self) -> list[Any]:
        """What a method remembers of earlier steps besides its states, as plain values and tensors."""
        return []

    def load_history(self, history: list[Any]) -> None:
        """Takes back what `history` gave."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues a saved run: step, seed, tensor ids, hyper-parameters.

        Raises:
            ValueError: if the state is not zokern's, or of another contract, method, options or parameters.
        """
        saved = dict(state_dict)
        own = saved.pop("zokern", None)
        state.check(own, type(self).__name__, self.options, self._names(), self.module is not None)
        kept = state.check_tensors(saved, self.param_groups, self._states)
        super().load_state_dict(saved)
        for p, values in kept.items():
            self.state[p] = values  # as they were saved: torch has cast them to the parameter's dtype
        for group, ids in zip(self.param_groups, own["tensor_ids"], strict=True):
            for p, tensor_id in zip(group["params"], ids, strict=True):
                self._registry.ids[id(p)] = tensor_id
        self.seed = own["seed"]
        self._passes.counters = Counters(**own["counters"])
        self._skipped = torch.tensor(own["skipped"], dtype=torch.int64)
        self._warned = self._warned or own["skipped"] > 0
        self.load_history(own["history"])
