"""What Adam's updates remember between steps besides their states; all of it on the device, so that nothing waits.

Rows are (parameter group, block): a block that LeZO leaves out has seen fewer updates than others. Block None stands for
all that lies outside the blocks, and for everything where there are no layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from zokern import _checks
from zokern.optim.ledger import Ledger
from zokern.optim.lookback import OnDevice
from zokern.optim.numbers import Rows
from zokern.optim.told import is_far
from zokern.optim.update import Estimate, Rates, adam
from zokern.passes.update import CPU, Seed, Update, sent


class Memory(ABC):
    """What an update remembers."""

    @abstractmethod
    def commit(self, ok: Tensor, ledger: Ledger, gate: Tensor | None = None, gates: Tensor | None = None) -> None:
        """Called before the pass; ok says whether it is done or skipped. `ledger` takes back what was never done. gate: of
        a captured step, whose launches enter it; where it is 0 nothing changes. gates: of blocks, as StepNumbers has
        them."""

    @abstractmethod
    def launched(self, seed: int, dropped: Collection[int]) -> None:
        """A captured step has changed what is on the device: the host notes which one it was."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """What a captured step works on."""

    @abstractmethod
    def save(self) -> list[Any]:
        """All of it, as plain values and tensors."""

    @abstractmethod
    def load(self, history: list[Any], groups: int, blocks: int) -> None:
        """Takes back what `save` gave, of a run with as many parameter groups and blocks.

        Raises:
            TypeError, ValueError: before anything is changed, for what it cannot have given.
        """

    def numbers(self) -> list[float | Tensor]:
        """Of the last step, for a journal: those that a replay cannot know."""
        return []

    @abstractmethod
    def remember(
        self, seed: int, numbers: list[float], dropped: set[int], blocks: Sequence[int | None], ok: bool
    ) -> None:
        """A step that was done before, told by a journal."""


class AdamCounts(Memory):
    """How many updates each block has had, for the bias corrections."""

    def __init__(self) -> None:
        self.counts: dict[int, Tensor] = {}
        self.moved: dict[int, None] = {}  # the blocks that a step has come to: captured steps have counts of all
        self._now: set[int] = set()

    def update(self, estimate: Estimate, rates: Rates, rows: Rows, betas: tuple[float, float], delta: float) -> Update:
        """Adam's pass, with each row's count."""
        keys = [-1 if block is None else cast(int, block) for _, block in rows]
        self._now = set(keys)
        for key in self._now:
            self.counts.setdefault(key, torch.zeros((), dtype=torch.float64, device=rates.lr.device))
        n = torch.stack([sent(self.counts[key], rates.lr.device) for key in keys]) + 1.0
        return adam(estimate, rates, betas, delta, n)

    def commit(self, ok: Tensor, ledger: Ledger, gate: Tensor | None = None, gates: Tensor | None = None) -> None:
        for key in self._now:
            self.counts[key] = sent(self.counts[key], ok.device)
            ledger.add(
                self.counts[key], ok if gates is None else ok & gates[key].to(torch.bool)
            )  # the last is block -1's
        if gate is None:
            self.moved.update(dict.fromkeys(self._now))

    def launched(self, seed: int, dropped: Collection[int]) -> None:
        self.moved.update(dict.fromkeys(key for key in self.counts if key not in dropped))

    def tensors(self) -> list[Tensor]:
        return list(self.counts.values())

    def save(self) -> list[Any]:
        return [[key, self.counts[key].clone()] for key in self.moved]

    def remember(
        self, seed: int, numbers: list[float], dropped: set[int], blocks: Sequence[int | None], ok: bool
    ) -> None:
        for block in blocks:
            if block not in dropped:
                key = -1 if block is None else block
                self.counts[key] = self.counts.get(key, torch.zeros((), dtype=torch.float64, device=CPU)) + ok
                self.moved[key] = None

    def load(self, history: list[Any], groups: int, blocks: int) -> None:
        counts: dict[int, Tensor] = {}
        for i, (key, count) in enumerate(_entries(history, 2)):
            name = f"state_dict: history[{i}]"
            _checks.check_integer(key, f"{name}: block", -1, blocks - 1)
            if not (
                isinstance(count, Tensor) and count.shape == () and count.dtype == torch.float64 and 0 <= count < 2**63
            ):
                raise ValueError(f"{name} has {count!r}; it must be how many updates there were, a float64 tensor")
            counts[key] = count.clone()
        self.counts, self.moved = counts, dict.fromkeys(counts)


class AdaMeZOHistory(Memory):
    """Seeds and projected gradients of the last `horizon` steps: both moments are made again from these, no state is kept.

    M = (1-b1) sum_i b1^i c_{t-i} z_{t-i}, V = (1-b2) sum_i b2^i c_{t-i}^2 z_{t-i}^2, theta <- ... - lr M / sqrt(V + delta)
    (arXiv 2605.00650, equations of the truncated moments). A block has no terms of the steps that left it out.

    released: without (1-b1) and (1-b2), times 100; V = 1 where b2 is 0 (shawnnn3di/AdaMeZO,
    MeZO/medium_models/src/trainer.py, a1d160f, which adds 1e-5 to the root where delta is under it).
    """

    def __init__(self, horizon: int, *, released: bool = False) -> None:
        self.released, self.horizon = released, horizon
        self.entries: deque[tuple[int, list[int], Tensor]] = deque(maxlen=horizon)  # seed, dropped blocks, c [groups]
        self.there: OnDevice | None = None  # the same where captured steps read it; c of the entries are its rows then
        self._now: tuple[Seed, list[int], Tensor] | None = None

    def directions(self) -> int:
        """Of the current step's moments: fewer than `horizon` in the first steps."""
        return min(len(self.entries) + 1, self.horizon)

    def measured(self, estimate: Estimate, dropped: Collection[int], eps: Tensor) -> None:
        """What a step has found, for its update and for later ones; eps [groups] is of all groups, active or not."""
        c = estimate.projected / sent(eps, estimate.projected.device)
        seed = next(iter(estimate.gradient))
        if self.entries and len(self.entries[-1][2]) < len(eps):  # a group has come since
            self._leave()
            wide = [(s, d, torch.cat([c, c.new_zeros(len(eps) - len(c))])) for s, d, c in self.entries]
            self.entries = deque(wide, self.horizon)
        if isinstance(seed, Tensor) and self.there is None:
            self.there = OnDevice(self.entries, self.horizon, len(eps), c.device)
            self._see_rows()
        self._now = seed, sorted(dropped), c

    def update(self, rates: Rates, rows: Rows, betas: tuple[float, float], delta: float) -> Update:
        """The pass over the last steps' directions, newest first."""
        assert self._now is not None
        device, (newest, _, now) = rates.lr.device, self._now
        steps = [self._now, *list(self.entries)[: self.horizon - 1]]
        c = torch.stack([sent(c, device) for _, _, c in steps], dim=1)
        if [g for g, _ in rows] != list(range(len(now))):
            c = torch.stack([c[g] for g, _ in rows])
        if any(left_out for _, left_out, _ in steps):
            seen = [[float(block not in left_out) for _, left_out, _ in steps] for _, block in rows]
            c = c * sent(torch.tensor(seen, dtype=torch.float64, device=CPU), device)
        age = torch.arange(len(steps), dtype=torch.float64, device=device)
        b1, b2 = betas
        first, second = (100.0, float(b2 > 0.0)) if self.released else (1.0 - b1, 1.0 - b2)
        seeds: list[Seed] = [seed for seed, _, _ in steps]
        if self.there is not None and isinstance(newest, Tensor):
            seeds[1:] = self.there.seeds[: len(steps) - 1].clone().unbind()  # they shift before the pass
        return Update(
            seeds,
            {"G": first * b1**age * c, "V": second * b2**age * c * c},
            {"decay": rates.decay, "step": -rates.lr, "delta": torch.full_like(rates.lr, delta if second else 1.0)},
            "adamezo",
            {"step": 0.0},
        )

    def commit(self, ok: Tensor, ledger: Ledger, gate: Tensor | None = None, gates: Tensor | None = None) -> None:
        assert self._now is not None
        seed, dropped, c = self._now
        c = torch.where(ok, c, 0.0)  # a skipped step is a step without gradient
        if gate is None:
            before = self.entries
            ledger.undo(lambda: setattr(self, "entries", before))
            self._enter(cast(int, seed), dropped, c)
        if self.there is not None:
            self.there.shift(seed, c, gate, ledger)

    def launched(self, seed: int, dropped: Collection[int]) -> None:
        """A captured step has shifted what is on the device: the host notes which one it was."""
        assert self.there is not None
        self._enter(seed, sorted(dropped), self.there.rows[0])

    def _enter(self, seed: int, dropped: list[int], c: Tensor) -> None:
        self.entries = deque([(seed, dropped, c), *self.entries][: self.horizon], self.horizon)
        if self.there is not None:
            self._see_rows()

    def _see_rows(self) -> None:
        assert self.there is not None
        rows = self.there.rows
        self.entries = deque([(s, d, rows[i]) for i, (s, d, _) in enumerate(self.entries)], self.horizon)

    def _leave(self) -> None:
        """The memory of captured steps is no longer used."""
        if self.there is not None:
            self.entries = deque([(s, d, c.clone()) for s, d, c in self.entries], self.horizon)
            self.there = None

    def tensors(self) -> list[Tensor]:
        return [] if self.there is None else self.there.tensors()

    def save(self) -> list[Any]:
        return [[seed, dropped, c.clone()] for seed, dropped, c in self.entries]

    def numbers(self) -> list[float | Tensor]:
        captured = self._now is not None and isinstance(self._now[0], Tensor)
        c = self.there.rows[0] if captured and self.there is not None else self.entries[0][2]
        return list(c.clone().unbind()) if captured or is_far(c) else c.tolist()

    def remember(
        self, seed: int, numbers: list[float], dropped: set[int], blocks: Sequence[int | None], ok: bool
    ) -> None:
        self._leave()
        self.entries.appendleft((seed, sorted(dropped), torch.tensor(numbers, dtype=torch.float64, device=CPU)))

    def load(self, history: list[Any], groups: int, blocks: int) -> None:
        entries = []
        for i, (seed, dropped, c) in enumerate(_entries(history, 3)):
            name = f"state_dict: history[{i}]"
            _checks.check_seed(seed, f"{name}: seed")
            if not isinstance(dropped, (list, tuple)):
                raise TypeError(f"{name}: dropped blocks are a {type(dropped).__name__}; they must be a list")
            for block in dropped:
                _checks.check_integer(block, f"{name}: dropped block", 0, blocks - 1)
            if not (isinstance(c, Tensor) and c.shape == (groups,) and c.dtype == torch.float64 and c.isfinite().all()):
                raise ValueError(
                    f"{name} has {c!r}; it must be a finite float64 tensor with a number for each of {groups} groups"
                )
            entries.append((seed, list(dropped), c.clone()))
        if len(entries) > self.horizon:
            raise ValueError(f"state_dict: history has {len(entries)} steps, and horizon is {self.horizon}")
        self.there, self.entries = None, deque(entries, self.horizon)


def _entries(history: list[Any], size: int) -> list[Any]:
    for i, entry in enumerate(history):
        if not isinstance(entry, (list, tuple)) or len(entry) != size:
            raise ValueError(f"state_dict: history[{i}] is {entry!r}; it must be a list of {size}")
    return history
