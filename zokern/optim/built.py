"""How an optimizer is built: its constructor, and what it tells of what it holds."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor

from zokern import deltas
from zokern import placement as placements
from zokern.directions import Direction, rank
from zokern.distributed import finding
from zokern.interrupts import HeldInterrupts
from zokern.optim import carried, causes, parameters, reach, state
from zokern.optim.batched import Batched
from zokern.optim.can_wait import refuse_folding
from zokern.optim.common import Common
from zokern.optim.events import Listener
from zokern.optim.folding import Folding
from zokern.optim.guards import Guards, has_sixteen_bit
from zokern.optim.losses import Reduce, Skips
from zokern.optim.method import Method
from zokern.optim.moves import Moves, mean_square
from zokern.optim.parameters import Parameters
from zokern.optim.ranks import Ranks
from zokern.optim.turn import Turn
from zokern.placement import fsdp
from zokern.settings import REQUIRED, Setting, takes_settings
from zokern.sweep import Passes


class Built(Common, Method, torch.optim.Optimizer):
    """options: what a saved state must agree on. listeners: called with a StepEvent after every step. reduce: a round's
    losses on this process -> those that all processes work with. step_done: the step of a loop that calls step() without a
    closure has been done, so that this call, once, is nothing.
    """

    reserved = frozenset(
        {"module", "options", "metrics", "listeners", "reduce", "step_done", "param_groups", "state", "defaults"}
    )

    @takes_settings
    def __init__(self, *args: Any, **named: Any) -> None:
        values = self.take(args, named)
        direction: Direction = values["distribution"]
        self._wrapper = finding.wrapper(values["params"])
        if self._wrapper is not None:
            values["params"] = self._wrapper.module  # whose names are those of every other run
        groups, self.module, registry = parameters.parse(values["params"], values["module"])
        self.layers = copy.copy(self.layers)  # it learns this module's blocks; the user's stays a setting
        self.options = {"distribution": direction.name, "rounding": self.rounding, **self.stored(self.own_settings())}
        self._turn = Turn()
        self.metrics: dict[str, Tensor] = {}  # of the last step, on the device: loss, projected_gradient
        self.listeners: list[Listener] = []
        self.reduce: Reduce | None = None
        self.step_done = False
        self._ranks: Ranks | None = None
        self._decided = False  # who takes part
        self._parameters = Parameters(registry, self.states())
        self._passes = Passes(direction, values["backend"])
        self._skips = Skips()
        self._moves = Moves()
        self._batched = Batched()
        self._looked = 0  # at which of the groups' numbers
        rates = {name: values[name] for name in parameters.RATES}
        torch.optim.Optimizer.__init__(self, cast("Iterable[Tensor]", groups), {**rates, carried.KEY: None})
        parameters.refuse_frozen(self.param_groups)
        parameters.refuse_without_matrix(self.param_groups, rank(direction), values["placement"])
        self.settle()
        finding.find(self.process_group, self.parallel, self._wrapper, self.module, self._tensors())  # or raises
        self.options["maximize"] = self.maximize
        self.options["fold_every"] = self.fold_every
        self.options["layers"] = None
        if self.layers is not None:
            self.layers.bind(self.module)
            self.options["layers"] = {"num_dropped": self.layers.num_dropped, "blocks": self.layers.names}
        for _, p in self._parameters.trainable(self):
            self.check_writable(p)
        sixteen_bit = has_sixteen_bit(self.param_groups)
        self._placement = placements.make(
            values["placement"], self.module, sixteen_bit, self._passes, scaled=self.scaled, pipelined=self.pipelined,
            prefetch=self.prefetch, waits=self.fold_every != 1,
        )  # fmt: skip
        self._folding: Folding | None = None
        if self.fold_every != 1:
            self._folding = Folding(self.fold_every, refuse_folding(self, self._placement))
            self._folding.entries.owner = weakref.ref(self)
        if self.module is not None:
            causes.announce_quantised(self.module)
        all_of_it = isinstance(values["params"], torch.nn.Module)
        self._guards = Guards(self.module, values["placement"], sixteen_bit, all_of_it=all_of_it)

    @property
    def counters(self) -> dict[str, int]:
        """ "steps", "forwards", "passes", "launches" and "elements_moved" of this run so far."""
        return asdict(self._passes.counters)

    @property
    def skipped_steps(self) -> int:
        """Steps whose update was skipped because a loss was not finite. Waits for the device."""
        return int(self._skips.count)

    @property
    def large_steps(self) -> int:
        """Steps since this optimizer was made that moved the trained weights by more than a quarter of their rms (of those
        that are not 0). The first is warned of. Waits for the device."""
        return int(self._moves.seen[0])

    @property
    def flat_steps(self) -> int:
        """Steps whose losses were all finite and equal to the last bit, which say nothing of the weights. A `state_dict()`
        has it; a run that is taken up from a journal counts from there. Waits for the device."""
        return self._guards.flats.count

    @property
    def placement(self) -> str:
        """The name of the placement in use: what "auto" is for the weights as they are now."""
        if self._guards.wanted == "auto" and "numbers" not in vars(self):
            self._guards.decide(self)
        return self._placement.name

    @property
    def testing_rows(self) -> bool:
        """Whether the forward under way is no probe's, but tests if the rows of a batched one keep apart."""
        return self._batched.testing

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

    @classmethod
    def completed(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options that a run left. An earlier version had fewer settings: what became one later was at its default."""
        new = {name: one for name, one in cls.own_settings().items() if name not in options}
        return {
            **options,
            **{name: one.stored(one.default) for name, one in new.items() if one.default is not REQUIRED},
            "maximize": options.get("maximize", cls.takes_rewards),
            "fold_every": options.get("fold_every", 1),
        }

    def check_writable(self, param: Tensor) -> None:
        """
        Raises:
            ValueError: for one of `zokern.add_deltas` in an optimizer that would write to it.
        """
        deltas.check(param, self._parameters.registry.names[id(param)], self.fold_every, rank(self._passes.direction))

    def compare_anew(self) -> None:
        """Ranks compare their weights before the next step: those of this one may be others now."""
        if self._ranks is not None:
            self._ranks.compared = False

    def ask_listeners(self) -> None:
        """Before a step or a fold changes anything: those who are told of it may refuse it."""
        for listener in self.listeners:
            if hasattr(listener, "before_step"):  # asked of a Protocol this takes as long as a pass' preparation
                listener.before_step()

    def keep_ranks(self) -> None:
        """
        Raises:
            ValueError: where the ranks have been found.
        """
        if self._decided:
            raise ValueError(
                "process_group and parallel cannot change after the first step: save state_dict(), and load it into a new "
                "optimizer"
            )

    def place_anew(self) -> None:
        """`prefetch` has changed.

        Raises:
            ValueError: for a placement that does not go block by block.
            RuntimeError: inside a step.
        """
        with self._turn.of("prefetch"):
            self._guards.place_anew(self)

    def _tensors(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def weights(self) -> dict[str, Tensor]:
        """All parameters by name: the module's, or those of its groups."""
        if self.module is not None:
            fsdp.let_go(fsdp.modules_of(self.module))
            return dict(self.module.named_parameters())
        names = self._parameters.names(self)
        return {name: p for own, group in zip(names, self.param_groups, strict=True)
                for name, p in zip(own, group["params"], strict=True)}  # fmt: skip

    def _begin_moves(self) -> None:
        """Before a step: the weights' size, where it is not known."""
        trained = (p for _, p in self._parameters.trainable(self))
        self._moves.begin(self._parameters.version, trained, self.active)

    def check_way_back(self, wait: bool = True) -> None:
        """Whether what eps z adds in place can be taken away again. Each step asks where the groups' numbers are new.

        wait: for the weights' size, where a device has it.

        Raises:
            ValueError: for an eps that would leave nothing of the weights.
        """
        if isinstance(self._placement, placements.InPlace):
            rms = self._moves.rms
            if wait:
                rms = math.sqrt(float(mean_square(p for _, p in self._parameters.trainable(self))))
            for g, group in enumerate(self.param_groups):
                reach.check_way_back(group, rms, f" of group {g}" if g else "")

    def layout(self) -> dict[str, Any]:
        """What a replay has to know of the parameters as they are: ids, shapes, dtypes, groups, rows and blocks."""
        return self._parameters.layout(self, anew=True)

    def resumed(self, steps: int, skipped: int) -> None:
        """Weights, states and what the method remembers are those of after this many steps."""
        self._passes.counters.steps = steps
        self._skips.load(skipped)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch's. Raises what a constructor does for what is in the group, and leaves the optimizer as it was then."""
        with HeldInterrupts(), self._turn.of("add_param_group"):
            before, registry = list(self.param_groups), self._parameters.registry
            known = list(registry.ids)
            try:
                super().add_param_group(param_group)
                group = self.param_groups[-1]
                fsdp.refuse_alone(group["params"], self.module)
                for p in group["params"]:
                    registry.add(p)
                    parameters.check_parameter(p, f"params: {registry.names[id(p)]}")
                parameters.check_group(group, len(self.param_groups) - 1)
                self.compare_anew()
            except BaseException:
                self.param_groups[:] = before
                registry.keep(known)
                raise
