"""Updates that wait: for `fold_every` steps they stay terms of the forwards, then one pass adds them to the weights.

Between two folds the weights' own memory holds W, as the last fold has left it, and the run's weights are D W + sum_k c_k
z_k (placement/pending.py). Folds come after the steps t with (t + 1) % fold_every == 0, whether or not a step was skipped,
so that all processes and all replays fold alike. A fold is one pass with one rounding, with that step's rounding seeds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zokern.contract.rules import RULES
from zokern.contract.streams import ROUNDING_STREAM, STATE_STREAM, derive_seed
from zokern.hashing import hash_of
from zokern.optim.ledger import Ledger
from zokern.optim.saved_pending import SavedPending
from zokern.optim.state_hooks import FoldedEntries
from zokern.passes.spec import PassNumbers, PassSpec, pass_spec
from zokern.passes.update import CPU, Update, seed_tensor, sent
from zokern.placement.pending import NONE, ForwardPending, Pending, moves
from zokern.sweep import NOTHING, Member, Sweep

CHANGED = (
    "{name} was changed between two steps while the updates of {steps} steps wait to be added to it, and they still will "
    "be: change weights after opt.fold(), or put them in opt.folded(). What p.data is until then lacks these updates"
)


class Folding:
    """Of one optimizer, which is asked for each time and not held. every: steps to a fold, 0 for no folds but `fold`'s."""

    def __init__(self, every: int, placement: ForwardPending) -> None:
        self.every, self.placement = every, placement
        self.sweep = NOTHING  # that the terms are of
        self.loaded: SavedPending | None = None  # terms of which is not known yet whether the weights have them
        self.had = NONE  # until the next step: what a loaded state_dict said was waiting, and the weights had
        self.entries = FoldedEntries(self)
        self._told = False  # of a changed weight
        self._versions: list[tuple[int, int]] = []  # of the weights, as the last step has left them

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
            if _alike(self.sweep) != _alike(owner.active.sweep):
                raise RuntimeError(
                    f"other parameters are trained than before, and the updates of {pending.steps} steps wait to be added "
                    "to those: call opt.fold() before parameters or groups change"
                )
            versions = _versions(owner.active.sweep)
            if self._versions and versions != self._versions:
                changed = next(i for i, one in enumerate(versions) if one != self._versions[i])
                self._tell(owner, CHANGED.format(name=self.sweep[changed].name, steps=pending.steps))
        self.sweep = owner.active.sweep
        self.placement.room = max(self.placement.room, self.every)  # each step has one direction at least

    def _tell(self, owner: Any, message: str) -> None:
        if not self._told:
            self._told = True
            owner._guards.warn("changed", message)

    def has_waiting(self, owner: Any) -> bool:
        """Whether anything is known to wait for the weights as they are."""
        with contextlib.suppress(ValueError):
            self.settle(owner)
        return self.loaded is None and self.placement.pending.steps > 0

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
        ledger.undo(lambda: setattr(self.placement, "pending", before))
        if self.is_due(owner._passes.counters.steps):
            self.placement.pending = NONE
            return Update(total.seeds, {"A": total.coefs}, {"decay": total.decay})
        spec = pass_spec(RULES["axpy"], owner._passes.direction)
        numbers = PassNumbers(seed_tensor(update.seeds), coefs.unsqueeze(1), decay.unsqueeze(1))
        ledger.deferred = spec, numbers
        self.placement.pending = total
        self.placement.room = self.every * len(update.seeds)
        self.entries.watch(site.owner for site in self.placement.sites)
        self._versions = _versions(self.sweep)
        return None

    # ----------------------------------------------------------------------------------------------------- between steps

    def fold(self, owner: Any) -> tuple[int, tuple[PassSpec, PassNumbers] | None]:
        """Adds what waits to the weights now. How many steps it was of, and the pass, where there was something to do."""
        self.settle(owner)
        pending, passes = self.placement.pending, owner._passes
        if not pending.steps:
            return 0, None
        told, sweep = self.told(owner, pending), Sweep(self.sweep.members)
        done, begun = False, passes.begun
        try:
            torch.clear_autocast_cache()
            if told is not None:
                passes.run(sweep, *told)
            done = True
        finally:
            if done or passes.begun != begun:
                passes.settle()
                self.placement.pending, self._versions = NONE, []
        return pending.steps, told

    def told(self, owner: Any, pending: Pending) -> tuple[PassSpec, PassNumbers] | None:
        """The pass of a fold between steps; None where it changes nothing."""
        spec, seeds = self.rounding(owner)
        numbers = pending.numbers(pending.decay, {}, seeds)
        return (spec, numbers) if moves(numbers) else None

    def rounding(self, owner: Any) -> tuple[PassSpec, Tensor]:
        """How a fold between steps rounds: with the seeds of the last step, which no pass has used."""
        name = "nearest" if owner.rounding == "nearest" else "stochastic"
        step = max(owner._passes.counters.steps - 1, 0)
        seeds = [derive_seed(owner.seed, step, stream) for stream in (ROUNDING_STREAM, STATE_STREAM)]
        spec = pass_spec(RULES["axpy"], owner._passes.direction, name)
        return spec, torch.tensor(seeds, dtype=torch.int64, device=CPU)

    @contextlib.contextmanager
    def shown(self, owner: Any) -> Iterator[None]:
        """Inside, the module is seen with what waits."""
        self.settle(owner)
        with contextlib.ExitStack() as stack:
            if self.placement.pending.steps:
                with torch.inference_mode(False), torch.no_grad():
                    stack.enter_context(self.placement.between(Sweep(self.sweep.members), self.rounding(owner)))
            yield

    @torch.no_grad()
    def copy(self, owner: Any, member: Member) -> Tensor:
        """A weight as a fold would leave it now."""
        p = member.param
        with torch.inference_mode(False):
            made = nn.Parameter(torch.empty_like(p, requires_grad=False), requires_grad=False)
        self.placement.folded(member, self.rounding(owner), made)
        return made.detach()

    # ------------------------------------------------------------------------------------------------- saved and loaded

    def save(self, owner: Any) -> dict[str, Any] | None:
        """What a state_dict holds of what waits. Reads all weights."""
        if self.loaded is not None:
            return self.loaded.entry()
        pending = self.placement.pending
        if not pending.steps:
            return None
        members = list(self.sweep)
        weights = hash_of((str(m.tensor_id), m.param) for m in members)
        folded = hash_of((str(m.tensor_id), self.copy(owner, m)) for m in members)
        return SavedPending(pending, [(m.tensor_id, m.row) for m in members], weights, folded).entry()

    def load(self, saved: SavedPending | None) -> None:
        """Of a state_dict, or of a journal's run: whether the weights have it already is looked at when it is needed."""
        self.loaded, self.placement.pending, self._versions, self.had = saved, NONE, [], NONE

    def remember(self, owner: Any, step: int, updates: Sequence[PassNumbers], *, folded: bool) -> None:
        """A step that a journal tells of, or a fold after it: its updates that wait."""
        if folded or self.is_due(step):
            self.placement.pending = NONE
            return
        for one in updates:
            decays = bool((one.shared != 1).any()) or _decays(owner.param_groups)
            coefs, decay = one.coefs[:, 0], one.shared[:, 0]
            self.placement.pending = self.placement.pending.plus(one.seeds.tolist(), coefs, decay, decays=decays)

    def settle(self, owner: Any) -> None:
        """Finds out whether the weights have what a loaded state_dict says is waiting.

        Raises:
            ValueError: where they are neither those that it was to be added to, nor those to which it was.
        """
        saved = self.loaded
        if saved is None and (not self.placement.pending.steps or self.sweep is not NOTHING):
            return
        active = owner._parameters.active(owner, owner.seed, owner._passes.counters.steps)
        if saved is None:  # of a journal, whose replay has made the weights
            self.sweep = active.sweep
            return
        if [(m.tensor_id, m.row) for m in active.sweep] != saved.members:
            raise ValueError(
                f"state_dict has updates of {saved.pending.steps} steps that wait for other parameters than this optimizer "
                "trains: freeze and group them as the run had them, or save it after opt.fold()"
            )
        found = hash_of((str(m.tensor_id), m.param) for m in active.sweep)
        if found not in (saved.weights, saved.folded):
            raise ValueError(
                f"state_dict has updates of {saved.pending.steps} steps that wait, and the weights are neither those that "
                "they were to be added to (p.data as the optimizer had it) nor those that have them (module.state_dict(), "
                "asked for after the same step): load one of the two, as it was when the optimizer's state_dict was made"
            )
        self.sweep, self.loaded, self._versions = active.sweep, None, []
        found_without = found == saved.weights
        self.placement.pending, self.had = (saved.pending, NONE) if found_without else (NONE, saved.pending)


def _alike(sweep: Iterable[Member]) -> list[object]:
    return [(id(m.param), m.tensor_id, m.row, m.param.shape) for m in sweep]


def _versions(sweep: Sweep) -> list[tuple[int, int]]:
    return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in sweep.params]


def _decays(groups: Iterable[Mapping[str, Any]]) -> bool:
    """Whether any group has a weight decay, as far as the host knows."""
    return any(isinstance(group["weight_decay"], Tensor) or group["weight_decay"] != 0 for group in groups)


def refuse_folding(owner: Any, placement: object) -> ForwardPending:
    """The placement, where updates can wait.

    Raises:
        ValueError: naming what keeps them from it, with the remedy.
    """
    given = f"fold_every is {owner.fold_every}"
    if not isinstance(placement, ForwardPending):
        raise ValueError(
            f"{given}, and placement={getattr(placement, 'name', placement)!r} shows no updates that wait: give "
            "placement='forward' (by its name), or fold_every=1"
        )
    if owner.layers is not None:
        raise ValueError(f"{given}, and layers moves other blocks in each step: leave layers out, or give fold_every=1")
    if not owner.plain_updates():
        raise ValueError(
            f"{given}, and an update of {type(owner).__name__} as it is set needs the weights' states or sums, so that it "
            "cannot wait: give fold_every=1, or a method or rule without states (update='sgd')"
        )
    return placement
