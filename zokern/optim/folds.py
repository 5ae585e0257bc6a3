"""What a user asks of updates that wait: how many, fold them now, show the weights with them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from zokern.deltas import Delta
from zokern.interrupts import HeldInterrupts
from zokern.optim.events import HearsFolds, StepEvent
from zokern.optim.saving import Saving
from zokern.optim.told import now
from zokern.passes.spec import PassNumbers, PassSpec


class Folds(Saving):
    """Part of every optimizer; with fold_every=1 nothing ever waits."""

    @property
    def pending(self) -> int:
        """Steps whose updates wait to be added to the weights; 0 where none does."""
        return 0 if self._folding is None else self._folding.steps

    def count_waiting(self) -> int:
        """As `pending`, but looks at the weights where a state_dict was loaded: they may have its updates already.

        Raises:
            ValueError: for weights that are not those of a state_dict that was loaded.
        """
        if self._folding is not None:
            self._folding.settle(self)
        return self.pending

    @torch.no_grad()
    def fold(self) -> int:
        """Adds all updates that wait to the weights now, by one pass, whose rounding seeds are those of the last step.

        Between steps only. A journal that is being written has a record of it.

        Returns:
            How many steps the updates were of; 0, and nothing is done, where none waits.

        Raises:
            RuntimeError: inside a step.
            ValueError: for weights that are not those of a state_dict that was loaded.
        """
        if self._folding is None:
            return 0
        with HeldInterrupts(), self._turn.of("fold"):
            self.ask_listeners()
            return self._folding.fold(self, self._tell_fold)

    def _tell_fold(self, passes: tuple[tuple[PassSpec, PassNumbers], ...]) -> None:
        event = self._event(passes)
        for listener in self.listeners:
            if isinstance(listener, HearsFolds):
                listener.folded(event)

    def _event(self, passes: tuple[tuple[PassSpec, PassNumbers], ...]) -> StepEvent:
        lrs = tuple(now(group["lr"]) for group in self.param_groups)
        return StepEvent(self._passes.counters.steps - 1, None, passes, {}, None, lrs, (), {})

    @torch.no_grad()
    def arrived(self) -> StepEvent | None:
        """Until the next step: the fold that folded copies have, which were loaded with a state_dict whose updates wait. A
        journal that the run is written on in has to be told of it. None where there is none.

        Raises:
            ValueError: for weights that are not those of a state_dict that was loaded.
        """
        if self._folding is None:
            return None
        self._folding.settle(self)
        had = self._folding.had
        return self._event(self._folding.told(self, had)) if had.steps else None

    def weights_folded(self) -> Iterator[tuple[str, Tensor]]:
        """`weights()`, with copies in the place of those that updates wait for, of the bits that `fold()` would leave; a
        delta (deltas.py) has none."""
        folding = self._folding
        waits = folding is not None and folding.has_waiting(self)
        members = {id(m.param): m for m in folding.sweep} if folding is not None and waits else {}
        members = {key: m for key, m in members.items() if not isinstance(m.param, Delta)}
        for name, p in self.weights().items():
            member = members.get(id(p))
            yield name, p if folding is None or member is None else folding.copy(self, member)

    def remember_updates(self, step: int, updates: Sequence[PassNumbers], *, folded: bool) -> None:
        """Of a step, when a run is taken up from its journal: those that wait. folded: it is a fold after that step."""
        if self._folding is not None:
            self._folding.remember(self, step, updates, folded=folded)

    @contextlib.contextmanager
    def folded(self) -> Iterator[None]:
        """Inside, between steps, the module computes with the weights as the run has them, waiting updates included:

            with opt.folded():
                answer = model.generate(prompt)

        Nothing is written to the weights, and nothing stops waiting. The module's own entries are stand-ins: their values
        (`p.data`, `p.clone()`) are what a fold would leave, but writing to them changes nothing. A gradient of the
        weights is not computed. Where no update waits, the module is left as it is.

        Raises:
            RuntimeError: inside a step; and a step inside is refused.
        """
        if self._folding is None:
            yield
            return
        with self._turn.of("folded"), self._folding.shown(self):
            yield
