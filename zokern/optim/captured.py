"""What GraphedStep needs of an optimizer: whether its steps can be captured, on what they work, and their count."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from zokern.contract.streams import derive_seed
from zokern.directions import rank
from zokern.optim.events import StepEvent
from zokern.optim.parameters import Active
from zokern.optim.ranked import Ranked
from zokern.optim.told import is_far
from zokern.passes.update import Terms
from zokern.placement.inplace import InPlace
from zokern.placement.ready import Copies
from zokern.placement.shadow import Exact, Shadow
from zokern.sweep import Counters


class Telling(Protocol):
    """What a captured step says of itself (zokern/graphs/telling.py)."""

    row: Tensor

    def metrics(self, row: Tensor) -> dict[str, Tensor]: ...

    def event_of(
        self, step: int, run_seed: int, row: Tensor, layout: Mapping[str, Any], rows: tuple[int, ...] | None
    ) -> StepEvent: ...


class Captured(Ranked):
    def rows_changed(self) -> None:
        """What rows of numbers go by, `row_key`, is no longer the same."""
        self._parameters.forget()

    def alone(self, what: str) -> AbstractContextManager[None]:
        """Inside, nobody else steps or changes this optimizer: it is refused."""
        return self._turn.of(what)

    def check_groups(self) -> None:
        """The groups' numbers, which users and schedulers change."""
        self._parameters.check_groups(self, self.pipelined)

    def why_not_graphed(self) -> str | None:
        """What keeps a step of this optimizer from being the same launches each time."""
        if self.fold_every != 1:
            return f"fold_every={self.fold_every} gives each step's forwards further terms"
        if self._guards.pairs(self.paired_randomness):
            return (
                "a module is in training mode and draws, or paired_randomness=True: a graph's forwards cannot start "
                "from the "
                "same generator states; call model.eval(), or give paired_randomness=False"
            )
        return self._why_blocks_cannot() or self._why_ranks_cannot() or super().why_not_graphed()

    def _why_blocks_cannot(self) -> str | None:
        if self.layers is None:
            return None
        if rank(self._passes.direction):
            return "layers leaves out other blocks in each step, and distribution is of low rank"
        if self.pipelined:
            return "layers leaves out other blocks in each step, and pipelined=True fills the next step's copies"
        if not isinstance(self._placement, InPlace | Shadow):
            return (
                "layers leaves out other blocks in each step, and forwards of "
                f"placement={self._placement.name!r} see copies of all: give placement='inplace' or 'shadow'"
            )
        outside = any(p.requires_grad and self.layers.block_of(p) is None for p in self._tensors())
        if self.layers.num_dropped == len(self.layers.names) and not outside:
            return "layers leaves out everything that is trained"
        return None

    def dropped(self, step: int) -> set[int]:
        """The blocks that a step leaves out."""
        return set() if self.layers is None else self.layers.dropped(self.seed, step)

    def _why_ranks_cannot(self) -> str | None:
        found = self._places()
        if found is None:
            return None
        device = next(self._tensors()).device.type
        if found.backend(device) != "nccl":
            return (
                f"its ranks tell each other their losses through {found.backend(device) or 'the host'}, which no graph can "
                'hold: init_process_group("cpu:gloo,cuda:nccl")'
            )
        if self.compare_every:
            return "compare_every reads all weights on the host; leave it out"
        return None

    def captured_tensors(self) -> list[Tensor]:
        """What a captured step works on beside the parameters."""
        states = [t for kept in self.state.values() for t in kept.values() if isinstance(t, Tensor)]
        return [
            self._skips.count,
            *self._moves.tensors(gated=self.layers is not None),
            *states,
            *self._placement.memory(),
            *self._guards.memory(),
            *super().captured_tensors(),
        ]

    def set_counters(self, counters: dict[str, int]) -> None:
        self._passes.counters = Counters(**counters)

    def launched_again(self, telling: Telling, cost: dict[str, int], active: Active, copies: Copies) -> None:
        """A captured step has been launched: takes note of it as `step` would have, counting first. cost, active: of the
        step that was captured; copies: that it has filled for the next one."""
        step = self._passes.counters.steps
        self.launched(step)
        if active.gated is not None:
            cost = active.gated.cost(cost, self.dropped(step))
        self.set_counters({name: value + cost[name] for name, value in self.counters.items()})
        self._opt_called = True  # torch's schedulers look for it: here `step` itself was not called
        if isinstance(self._placement, Exact):
            self._placement.overwritten()
            if copies and not self._eps_is_far():
                self._placement.promise(copies, *self._first_probe())
        row = telling.row.clone()  # the next launch overwrites it
        self.metrics = telling.metrics(row)
        if self.listeners:
            rows = None if active.gated is None else active.gated.rows(self.dropped(step))
            self.tell_listeners(telling.event_of(step, self.seed, row, self._parameters.layout(self), rows))
        self._skips.warn()
        self._skips.look()
        self._moves.tell(self.advice)
        self._moves.look()
        self._guards.tell(self)

    def _first_probe(self) -> tuple[Terms, list[float]]:
        """Of the step that comes next, pipelined: its directions, and each row's eps."""
        seed = derive_seed(self.seed, self._passes.counters.steps, 0)
        return {seed: 1.0}, [float(self.param_groups[g]["eps"]) for g, _ in self.active.rows]

    def _eps_is_far(self) -> bool:
        return any(isinstance(group["eps"], Tensor) and is_far(group["eps"]) for group in self.param_groups)

    def is_ahead(self) -> bool:
        """Whether the step before has filled what the next one's first probe looks at."""
        if not self.pipelined or not isinstance(self._placement, Exact) or self._eps_is_far():
            return False
        active = self._parameters.active(self, self.seed, self._passes.counters.steps)
        return active is getattr(self, "active", None) and self._placement.is_ready(active.sweep, *self._first_probe())

    def trust(self, ahead: bool) -> None:
        """Before a step is tried or captured: whether it is one of those."""
        if self.pipelined and isinstance(self._placement, Exact):
            active = self._parameters.active(self, self.seed, self._passes.counters.steps)
            self._placement.trust(active.sweep, ahead)

    @property
    def copies_ahead(self) -> Copies:
        """What the last step's update has filled for the next one."""
        return self._placement.forked if self.pipelined and isinstance(self._placement, Exact) else []

    def tell_listeners(self, event: StepEvent) -> None:
        """All of them, also where one of them raises."""
        raised: BaseException | None = None
        for listener in tuple(self.listeners):
            try:
                listener(event)
            except BaseException as error:
                raised = raised or error
        if raised is not None:
            raise raised
