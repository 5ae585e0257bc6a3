"""The step that all methods share: losses, clean-up, counting, state.

A method implements `estimate(probe)`: it asks for losses at theta + eps * sum_k a_k z(seed_k) by calling probe({seed: a}),
and returns the multiples g_k of the estimated gradient sum_k (g_k / eps) z(seed_k). The step then makes one pass

    theta <- (1 - lr*weight_decay) theta - lr * sum_k (g_k / eps) z(seed_k)

with each parameter group's own lr, eps and weight_decay. Everything between the losses and the pass stays on the device:
the host never waits. A loss that is not finite makes the step skip itself on the device.
"""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor

from zokern import _checks, backends, placement
from zokern.interrupts import HeldInterrupts
from zokern.layers import RandomBlocks
from zokern.noise import ROUNDING_STREAM, derive_seed
from zokern.optim import parameters
from zokern.passes import Counters, Member, Passes

Probe = Callable[[Mapping[int, float]], Tensor]
STATE_FORMAT = 1
ROUNDINGS = ("auto", "nearest", "stochastic")


class ZerothOrderOptimizer(torch.optim.Optimizer):
    """Base class of the methods. Subclasses set `options` (what a saved state must agree on) and `estimate`."""

    def __init__(
        self,
        params: object,
        defaults: dict[str, Any],
        *,
        distribution: str,
        seed: int,
        rounding: str,
        placement_name: str,
        layers: RandomBlocks | None,
        backend: str,
        options: dict[str, Any],
    ) -> None:
        _checks.check_choice(distribution, "distribution", _checks.DISTRIBUTIONS)
        _checks.check_choice(rounding, "rounding", ROUNDINGS)
        _checks.check_choice(backend, "backend", ("auto", *backends.BACKENDS))
        _checks.check_choice(placement_name, "placement", placement.PLACEMENTS)
        parameters.check_group(defaults, 0)
        groups, self.module, self._registry = parameters.parse(params)
        self.seed = _checks.check_seed(seed, "seed")
        self.rounding = rounding
        self.layers = copy.copy(layers)  # it learns this module's blocks; the user's stays a setting
        self.options = {"distribution": distribution, "rounding": rounding, **options}
        self.metrics: dict[str, Tensor] = {}  # of the last step, on the device: loss, projected_gradient
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
        self._placement = placement.make(placement_name, self.module, sixteen_bit, self._passes)

    @abstractmethod
    def estimate(self, probe: Probe) -> dict[int, Tensor]:
        """Seeds and the multiples g_k (0-d float64) of a step's gradient estimate, unit eps. Sets self.metrics."""

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
        members = self._members()
        eps = torch.tensor([float(group["eps"]) for group in self.param_groups], dtype=torch.float64)
        self._placement.begin(members, eps)
        try:

            def probe(terms: Mapping[int, float]) -> Tensor:
                with self._placement.present(terms), interrupts.allowed():
                    if micro is None:
                        return self._evaluate(closure)
                    return torch.stack([self._evaluate(closure, batch) for batch in micro]).mean()

            gradient = self.estimate(probe)
            self._update(gradient, eps)
        finally:
            self._placement.end()
        self._passes.counters.steps += 1

    def _evaluate(self, closure: Callable[..., Tensor | float], *batch: Any) -> Tensor:
        loss = closure(*batch)
        self._passes.counters.forwards += 1
        if isinstance(loss, (int, float)) and not isinstance(loss, bool):
            loss = torch.tensor(float(loss), dtype=torch.float64)
        if not isinstance(loss, Tensor):
            raise TypeError(f"closure must return the loss as a scalar tensor, got {type(loss).__name__}")
        if loss.numel() != 1:
            raise TypeError(f"closure must return one loss, got a tensor of shape {tuple(loss.shape)}; take its mean")
        return loss.detach().reshape(()).to(torch.float64)

    def _update(self, gradient: Mapping[int, Tensor], eps: Tensor) -> None:
        g = torch.stack(list(gradient.values()))  # [K], float64, on the losses' device
        lr = torch.stack([torch.as_tensor(group["lr"]).to(g.device, torch.float64) for group in self.param_groups])
        decay = torch.tensor([float(group["weight_decay"]) for group in self.param_groups], dtype=torch.float64)
        eps, decay = eps.to(g.device, non_blocking=True), decay.to(g.device, non_blocking=True)
        coefs = -(lr / eps)[:, None] * g
        decays = 1.0 - lr * decay
        as_read = coefs.to(torch.float32), decays.to(torch.float32)  # by the pass
        ok = torch.isfinite(as_read[0]).all()
        # Adding 0*z would turn -0.0 into +0.0: a pass that moves nothing writes nothing.
        moves = (as_read[0] != 0).any() | (as_read[1] != 1).any()
        if g.device.type == "cpu" and self._skipped.device.type == "cpu":
            self._skipped += int(not ok)
            self._warn_of_skipped()
        else:
            self._skipped = self._skipped.to(g.device, non_blocking=True) + (~ok)
            self._remember_skipped()
        rounding_seed = None
        if self.rounding != "nearest":
            rounding_seed = derive_seed(self.seed, self._passes.counters.steps, ROUNDING_STREAM)
        self._placement.update(list(gradient), coefs, decays, (ok & moves).reshape(1), rounding_seed)

    def direction_seed(self, k: int) -> int:
        """Seed of the current step's direction k."""
        return derive_seed(self.seed, self._passes.counters.steps, k)

    def _members(self) -> list[Member]:
        """The parameters that this step moves. Read from param_groups each time: users replace them."""
        dropped = set() if self.layers is None else self.layers.dropped(self.seed, self._passes.counters.steps)
        members, seen = [], set()
        for g, group in enumerate(self.param_groups):
            parameters.check_group(group, g)
            for p in group["params"]:
                if not p.requires_grad or p.numel() == 0 or id(p) in seen:
                    continue
                seen.add(id(p))
                if self.layers is not None and not self.layers.is_active(p, dropped):
                    continue
                self._registry.add(p)
                members.append(Member(p, self._registry.ids[id(p)], g, self._registry.names[id(p)]))
        return members

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
        state = super().state_dict()
        state["zokern"] = {
            "format": STATE_FORMAT,
            "contract": "zk1",
            "method": type(self).__name__,
            "seed": self.seed,
            "tensor_ids": self._ids(),
            "module": self.module is not None,
            "names": self._names(),
            "counters": self.counters,
            "skipped": self.skipped_steps,
            "options": dict(self.options),
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues a saved run: step, seed, tensor ids, hyper-parameters.

        Raises:
            ValueError: if the state is not zokern's, or of another contract, method, options or parameters.
        """
        state = dict(state_dict)
        own = state.pop("zokern", None)
        if own is None:
            raise ValueError("state_dict has no 'zokern' entry: it was not saved by a zokern optimizer")
        if own["format"] != STATE_FORMAT or own["contract"] != "zk1":
            raise ValueError(
                f"state_dict has format {own['format']} and noise contract {own['contract']!r}; this version reads "
                f"format {STATE_FORMAT} and contract 'zk1'"
            )
        if own["method"] != type(self).__name__:
            raise ValueError(f"state_dict is of {own['method']}, and this is {type(self).__name__}")
        for name, value in self.options.items():
            if own["options"].get(name) != value:
                raise ValueError(
                    f"{name} is {own['options'].get(name)!r} in state_dict and {value!r} here; make them agree"
                )
        shapes = [len(ids) for ids in own["tensor_ids"]]
        if shapes != [len(group["params"]) for group in self.param_groups]:
            raise ValueError(
                f"state_dict has groups of {shapes} parameters, this optimizer of "
                f"{[len(group['params']) for group in self.param_groups]}"
            )
        if own["module"] and self.module is not None:
            for theirs, ours in zip(own["names"], self._names(), strict=True):
                for a, b in zip(theirs, ours, strict=True):
                    if a != b:
                        raise ValueError(f"state_dict has parameter {a!r} where this module has {b!r}")
        super().load_state_dict(state)
        for group, ids in zip(self.param_groups, own["tensor_ids"], strict=True):
            for p, tensor_id in zip(group["params"], ids, strict=True):
                self._registry.ids[id(p)] = tensor_id
        self.seed = own["seed"]
        self._passes.counters = Counters(**own["counters"])
        self._skipped = torch.tensor(own["skipped"], dtype=torch.int64)
        self._warned = self._warned or own["skipped"] > 0
