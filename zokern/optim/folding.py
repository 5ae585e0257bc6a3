"""Updates that wait: for `fold_every` steps they stay terms of the forwards, then one pass adds them to the weights.

Between two folds the weights' own memory holds W, as the last fold has left it, and the run's weights are D W + sum_k c_k
z_k (placement/pending.py). Folds come after the steps t with (t + 1) % fold_every == 0, whether or not a step was skipped,
so that all processes and all replays fold alike. A fold is one pass with one rounding, with that step's rounding seeds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zokern import deltas
from zokern.contract.rules import RULES
from zokern.deltas import Delta
from zokern.hashing import hash_of
from zokern.optim.ledger import Ledger
from zokern.optim.saved_pending import SavedPending
from zokern.optim.state_hooks import FoldedEntries
from zokern.optim.waiting import Version, Waiting, alike, refuse_gone, versions
from zokern.passes.spec import PassNumbers, PassSpec, pass_spec
from zokern.passes.update import Update, seed_tensor, sent
from zokern.placement.pending import NONE, ForwardPending, Pending, moves, rounded_by
from zokern.sweep import NOTHING, Member, Sweep


class Folding:
    """Of one optimizer, which is asked for each time and not held. every: steps to a fold, 0 for no folds but `fold`'s."""

    def __init__(self, every: int, placement: ForwardPending) -> None:
        self.every, self.placement = every, placement
        self.sweep = NOTHING  # that the terms are of
        self.loaded: SavedPending | None = None  # terms of which is not known yet whether the weights have them
        self.waiting = Waiting()
        self.entries = FoldedEntries(self, self.waiting)
        self.had = NONE  # until the next step: what a loaded state_dict said was waiting, and the weights had
        self._source: SavedPending | None = None  # what was loaded last, until a step is done with it
        self._unlike: list[Version] | None = None  # weights that what was loaded is not of

    @property
    def steps(self) -> int:
        """How many steps' updates wait."""
        return self.placement.pending.steps if self.loaded is None else self.loaded.pending.steps

    def is_due(self, step: int) -> bool:
        return self.every > 0 and (step + 1) % self.every == 0

    # ----------------------------------------------------------------------------------------------------------- a step

    def begin(self, owner: Any) -> None:
        """Before a step does anything.

        Raises:
            RuntimeError: where other parameters are trained than those that updates wait for.
            ValueError: for weights that are not those of a state_dict that was loaded.
        """
        self.settle(owner)
        pending, self.had = self.placement.pending, NONE
        if pending.steps:
            if self.sweep is not owner.active.sweep and alike(self.sweep) != alike(owner.active.sweep):
                raise RuntimeError(
                    f"other parameters are trained than before, and the updates of {pending.steps} steps wait to be added "
                    "to those: call opt.fold() before parameters or groups change"
                )
            message = self.waiting.news()
            if message:
                owner._guards.warn("changed", message)
        self.sweep, self._source = owner.active.sweep, None
        self.placement.room = max(self.placement.room, self.every)  # each step has one direction at least

    def has_waiting(self, owner: Any) -> bool:
        """Whether anything is known to wait for the weights as they are."""
        with contextlib.suppress(ValueError):
            self.settle(owner)
        if self.loaded is not None or not self.placement.pending.steps:
            return False
        self.waiting.tell()
        return True

    def take(self, owner: Any, update: Update, ok: Tensor, ledger: Ledger) -> Update | None:
        """A step's update, before it is done: what the step's last pass is to do; None where it waits.

        Numbers are rounded to float32 first, as a pass reads them and a journal has them. A step that is not ok has
        coefficients 0 and a decay of 1.
        """
        if update.rule != "axpy":
            raise ValueError(f"fold_every is {self.every}, and an update of the rule {update.rule!r} cannot wait")
        ok = sent(ok, update.coefs["A"].device)
        coefs = torch.where(ok, update.coefs["A"].to(torch.float32), 0.0)
        decay = torch.where(ok, update.shared["decay"].to(torch.float32), 1.0)
        before = self.placement.pending
        total = before.plus(update.seeds, coefs, decay, decays=_decays(owner.param_groups))
        ledger.undo(lambda: self._wait(before))
        if self.is_due(owner._passes.counters.steps):
            self._wait(NONE)
            return Update(total.seeds, {"A": total.coefs}, {"decay": total.decay})
        spec = pass_spec(RULES["axpy"], owner._passes.direction)
        numbers = PassNumbers(seed_tensor(update.seeds), coefs.unsqueeze(1), decay.unsqueeze(1))
        ledger.deferred = spec, numbers
        self.placement.pending = total
        self.placement.room = self.every * len(update.seeds)
        self.entries.watch(site.owner for site in self.placement.sites)
        self.waiting.note(self.sweep, total.steps)
        return None

    def _wait(self, pending: Pending) -> None:
        self.placement.pending, self.waiting.steps = pending, pending.steps

    # ----------------------------------------------------------------------------------------------------- between steps

    def fold(self, owner: Any, tell: Callable[[tuple[tuple[PassSpec, PassNumbers], ...]], None]) -> int:
        """Adds what waits to the weights now. Of how many steps it was. tell: is given the pass, if any, as soon as the
        weights have it, also where something is raised."""
        self.settle(owner)
        pending, passes = self.placement.pending, owner._passes
        if not pending.steps:
            return 0
        refuse_gone(self.placement.module, self.sweep, pending.steps)
        deltas.refuse_fold(self.sweep)
        self.waiting.tell()
        told, sweep = self.told(owner, pending), Sweep(self.sweep.members)
        done, begun = False, passes.begun
        try:
            torch.clear_autocast_cache()
            for spec, numbers in told:
                passes.run(sweep, spec, numbers)
            done = True
        finally:
            if done or passes.begun != begun:
                passes.settle()
                self.placement.pending, self._source = NONE, None
                self.waiting.forget()
                tell(told)
        return pending.steps

    def told(self, owner: Any, pending: Pending) -> tuple[tuple[PassSpec, PassNumbers], ...]:
        """The pass of a fold between steps; none where it changes nothing."""
        spec, seeds = self.rounding(owner)
        numbers = pending.numbers(pending.decay, {}, seeds)
        return ((spec, numbers),) if moves(numbers) else ()

    def rounding(self, owner: Any) -> tuple[PassSpec, Tensor]:
        """How a fold between steps rounds: with the seeds of the last step, which no pass has used."""
        step = max(owner._passes.counters.steps - 1, 0)
        return rounded_by(owner.seed, step, owner.rounding, owner._passes.direction)

    @contextlib.contextmanager
    def shown(self, owner: Any) -> Iterator[None]:
        """Inside, the module is seen with what waits."""
        self.settle(owner)
        with contextlib.ExitStack() as stack:
            if self.placement.pending.steps:
                self.waiting.tell()
                with torch.inference_mode(False), torch.no_grad():
                    stack.enter_context(self.placement.between(Sweep(self.sweep.members), self.rounding(owner)))
            yield

    @torch.no_grad()
    def copy(self, owner: Any, member: Member) -> Tensor:
        """A weight as a fold would leave it now. No counter counts it."""
        p, counters = member.param, owner._passes.counters
        before = counters.launches, counters.elements_moved
        with torch.inference_mode(False):
            made = nn.Parameter(torch.empty_like(p, requires_grad=False), requires_grad=False)
        self.placement.folded(member, self.rounding(owner), made)
        counters.launches, counters.elements_moved = before
        return made.detach()

    # ------------------------------------------------------------------------------------------------- saved and loaded

    def save(self, owner: Any) -> dict[str, Any] | None:
        """What a state_dict holds of what waits. Reads all weights."""
        if self._source is not None:
            self.settle(owner)
        if self.loaded is not None:
            return self.loaded.entry()
        pending = self.placement.pending
        if not pending.steps:
            return None
        self.waiting.tell()
        members = list(self.sweep)
        weights = hash_of((str(m.tensor_id), m.param) for m in members)
        folded = hash_of((str(m.tensor_id), self.copy(owner, m)) for m in members if not isinstance(m.param, Delta))
        return SavedPending(pending, [(m.tensor_id, m.row) for m in members], weights, folded).entry()

    def load(self, saved: SavedPending | None) -> None:
        """Of a state_dict, or of a journal's run: whether the weights have it already is looked at when it is needed."""
        self.loaded, self.placement.pending, self._source, self._unlike = saved, NONE, None, None
        self.had = NONE
        self.waiting.forget()
        self._watch()

    def _watch(self) -> None:
        """A state_dict() of the module may be asked for before the next step."""
        if self.steps:
            self.entries.watch(module for module in self.placement.module.modules() if module._parameters)

    def remember(self, owner: Any, step: int, updates: Sequence[PassNumbers], *, folded: bool) -> None:
        """A step that a journal tells of, or a fold after it: its updates that wait."""
        if folded or self.is_due(step):
            self.placement.pending = NONE
            return
        for one in updates:
            decays = bool((one.shared != 1).any()) or _decays(owner.param_groups)
            self.placement.pending = self.placement.pending.after(one, decays=decays)
        self._watch()

    def settle(self, owner: Any) -> None:
        """Finds out whether the weights have what a loaded state_dict says is waiting.

        Raises:
            ValueError: where they are neither those that it was to be added to, nor those to which it was.
        """
        if self._source is not None and self.waiting.changed():  # other weights were loaded: do they have it?
            self.load(self._source)
        saved = self.loaded
        if saved is None and (not self.placement.pending.steps or self.sweep is not NOTHING):
            return
        active = owner._parameters.active(owner, owner.seed, owner._passes.counters.steps)
        if saved is None:  # of a journal, whose replay has made the weights
            self.sweep = active.sweep
            self.waiting.note(active.sweep, self.placement.pending.steps)
            return
        if [(m.tensor_id, m.row) for m in active.sweep] != saved.members:
            raise ValueError(
                f"state_dict has updates of {saved.pending.steps} steps that wait for other parameters than this optimizer "
                "trains: freeze and group them as the run had them, or save it after opt.fold()"
            )
        here, found = versions(active.sweep.params), ""
        if here != self._unlike:  # else they are those of the last time
            found = hash_of((str(m.tensor_id), m.param) for m in active.sweep)
        if found not in (saved.weights, saved.folded):
            self._unlike = here
            raise ValueError(
                f"state_dict has updates of {saved.pending.steps} steps that wait, and the weights are neither those that "
                "they were to be added to (p.data as the optimizer had it) nor those that have them (module.state_dict(), "
                "asked for after the same step): load one of the two, as it was when the optimizer's state_dict was made"
            )
        self.sweep, self.loaded, self._source = active.sweep, None, saved
        without = found == saved.weights
        self.placement.pending, self.had = (saved.pending, NONE) if without else (NONE, saved.pending)
        self.waiting.note(active.sweep, self.placement.pending.steps)


def _decays(groups: Iterable[Mapping[str, Any]]) -> bool:
    """Whether any group has a weight decay, as far as the host knows."""
    return any(isinstance(group["weight_decay"], Tensor) or group["weight_decay"] != 0 for group in groups)
