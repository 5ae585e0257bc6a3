"""What GraphedStep needs of an optimizer: whether its steps can be captured, on what they work, and their count."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import Tensor

from zokern.directions import rank
from zokern.optim.parameters import Active
from zokern.optim.ranked import Ranked
from zokern.placement.inplace import InPlace
from zokern.placement.shadow import Shadow
from zokern.sweep import Counters


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
        if self.pipelined:
            return "pipelined=True fills a step's first copies in the step before"
        if self.listeners:
            return "a journal is written, which needs each step's numbers on the host"
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

    def launched_again(self, metrics: dict[str, Tensor], cost: dict[str, int], active: Active) -> None:
        """A captured step has been launched: takes note of it as `step` would have, counting first. metrics: what the
        launch fills, which the next one overwrites; cost, active: of the step that was captured."""
        self.launched(self._passes.counters.steps)
        if active.gated is not None:
            cost = active.gated.cost(cost, self.dropped(self._passes.counters.steps))
        self.set_counters({name: value + cost[name] for name, value in self.counters.items()})
        self._opt_called = True  # torch's schedulers look for it: here `step` itself was not called
        self.metrics = {name: value.clone() for name, value in metrics.items()}
        self._skips.warn()
        self._skips.look()
        self._moves.tell(self.advice)
        self._moves.look()
        self._guards.tell(self)
