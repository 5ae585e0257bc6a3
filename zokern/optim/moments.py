"""What Adam's updates remember between steps besides their states; all of it on the device, so that nothing waits.

Rows are (parameter group, block): a block that LeZO leaves out has seen fewer updates than others. Block None stands for
all that lies outside the blocks, and for everything where there are no layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from zokern import _checks
from zokern.optim.ledger import Ledger
from zokern.optim.numbers import Rows
from zokern.optim.told import is_far
from zokern.optim.update import Estimate, Rates, adam
from zokern.passes.update import CPU, Update, sent


class Memory(ABC):
    """What an update remembers."""

    @abstractmethod
    def commit(self, ok: Tensor, ledger: Ledger) -> None:
        """Called before the pass; ok says whether it is done or skipped. `ledger` takes back what was never done."""

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
        self._now: set[int] = set()

    def update(self, estimate: Estimate, rates: Rates, rows: Rows, betas: tuple[float, float], delta: float) -> Update:
        """Adam's pass, with each row's count."""
        keys = [-1 if block is None else cast(int, block) for _, block in rows]
        self._now = set(keys)
        for key in self._now:
            self.counts.setdefault(key, torch.zeros((), dtype=torch.float64, device=rates.lr.device))
        n = torch.stack([sent(self.counts[key], rates.lr.device) for key in keys]) + 1.0
        return adam(estimate, rates, betas, delta, n)

    def commit(self, ok: Tensor, ledger: Ledger) -> None:
        for key in self._now:
            self.counts[key] = sent(self.counts[key], ok.device)
            ledger.add(self.counts[key], ok)

    def save(self) -> list[Any]:
        return [[key, count.clone()] for key, count in self.counts.items()]

    def remember(
        self, seed: int, numbers: list[float], dropped: set[int], blocks: Sequence[int | None], ok: bool
    ) -> None:
        for block in blocks:
            if block not in dropped:
                key = -1 if block is None else block
                self.counts[key] = self.counts.get(key, torch.zeros((), dtype=torch.float64, device=CPU)) + ok

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
        self.counts = counts


class AdaMeZOHistory(Memory):
    """Seeds and projected gradients of the last `horizon` steps: both moments are made again from these, no state is kept.

    M = (1-b1) sum_i b1^i c_{t-i} z_{t-i}, V = (1-b2) sum_i b2^i c_{t-i}^2 z_{t-i}^2, theta <- ... - lr M / sqrt(V + delta)
    (arXiv 2605.00650, equations of the truncated moments). A block has no terms of the steps that left it out.

    released: without (1-b1) and (1-b2), times 100; V = 1 where b2 is 0 (shawnnn3di/AdaMeZO,
    MeZO/medium_models/src/trainer.py, a1d160f, which adds 1e-5 to the root where delta is under it).
    """

    def __init__(self, horizon: int, *, released: bool = False) -> None:
        self.released = released
        self.entries: deque[tuple[int, list[int], Tensor]] = deque(maxlen=horizon)  # seed, dropped blocks, c [groups]
        self._now: tuple[int, list[int], Tensor] | None = None

    def update(
        self,
        estimate: Estimate,
        rates: Rates,
        rows: Rows,
        betas: tuple[float, float],
        delta: float,
        dropped: set[int],
        eps: Tensor,
    ) -> Update:
        """The pass over the last steps' directions, newest first; eps [groups] is of all groups, active or not."""
        device = rates.lr.device
        seed = cast(int, next(iter(estimate.gradient)))
        self._now = (seed, sorted(dropped), estimate.projected / sent(eps, device))
        steps = [self._now, *list(self.entries)[: cast(int, self.entries.maxlen) - 1]]
        known = [sent(c, device) for _, _, c in steps]
        for i, c in enumerate(known):
            if len(c) < len(eps):  # a group has come since
                known[i] = torch.cat([c, c.new_zeros(len(eps) - len(c))])
        c = torch.stack(known, dim=1)
        if [g for g, _ in rows] != list(range(len(eps))):
            c = torch.stack([c[g] for g, _ in rows])
        if any(left_out for _, left_out, _ in steps):
            seen = [[float(block not in left_out) for _, left_out, _ in steps] for _, block in rows]
            c = c * sent(torch.tensor(seen, dtype=torch.float64, device=CPU), device)
        age = torch.arange(len(steps), dtype=torch.float64, device=device)
        b1, b2 = betas
        first, second = (100.0, float(b2 > 0.0)) if self.released else (1.0 - b1, 1.0 - b2)
        return Update(
            [seed for seed, _, _ in steps],
            {"G": first * b1**age * c, "V": second * b2**age * c * c},
            {"decay": rates.decay, "step": -rates.lr, "delta": torch.full_like(rates.lr, delta if second else 1.0)},
            "adamezo",
            {"step": 0.0},
        )

    def commit(self, ok: Tensor, ledger: Ledger) -> None:
        assert self._now is not None
        seed, dropped, c = self._now
        entry = seed, dropped, torch.where(ok, c, 0.0)  # a skipped step is a step without gradient
        before = self.entries
        ledger.undo(lambda: setattr(self, "entries", before))
        self.entries = deque([entry, *before][: before.maxlen], before.maxlen)

    def save(self) -> list[Any]:
        return [list(entry) for entry in self.entries]

    def numbers(self) -> list[float | Tensor]:
        c = self.entries[0][2]
        return list(c.clone().unbind()) if is_far(c) else c.tolist()

    def remember(
        self, seed: int, numbers: list[float], dropped: set[int], blocks: Sequence[int | None], ok: bool
    ) -> None:
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
        if len(entries) > cast(int, self.entries.maxlen):
            raise ValueError(f"state_dict: history has {len(entries)} steps, and horizon is {self.entries.maxlen}")
        self.entries = deque(entries, self.entries.maxlen)


def _entries(history: list[Any], size: int) -> list[Any]:
    for i, entry in enumerate(history):
        if not isinstance(entry, (list, tuple)) or len(entry) != size:
            raise ValueError(f"state_dict: history[{i}] is {entry!r}; it must be a list of {size}")
    return history
