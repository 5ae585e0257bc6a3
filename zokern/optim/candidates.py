"""MeZO-GV and MeZO-Greedy (Jin, Cen, Tan 2026, arXiv 2601.04710): M candidate directions, tried before one is taken.

l_j = L(theta + eps z_j).  GV: v = mean of the lowest floor(elite*M) candidates' z minus mean of the others',
c = (L(theta + eps v) - L(theta - eps v)) / (2 eps).  Greedy: the lowest candidate's z, whose l_j is L+ already.
theta <- (1 - lr*weight_decay) theta - lr c v
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from zokern._checks import ZokernWarning
from zokern.contract.streams import derive_seed
from zokern.kinds import SHARE, Flag, Integer, Number
from zokern.optim import callers, curvature, state
from zokern.optim.base import ZerothOrderOptimizer
from zokern.optim.drivers import Rounds
from zokern.optim.ledger import Ledger
from zokern.optim.lookback import enter, one_of
from zokern.optim.told import is_far
from zokern.optim.update import Estimate, Rates
from zokern.passes.update import Seed, Terms, Update, seed_tensor, sent
from zokern.settings import setting


class _Candidates(ZerothOrderOptimizer):
    candidates: int = setting(
        default=4,
        kind=Integer(2, 1 << 16),
        help="Directions tried before one is taken, M. Published: 4 (2 for the largest models).",
    )
    smoothing: float | None = setting(
        default=None,
        kind=SHARE,
        help="None, or HiZOO's weight a of a step's curvature: h then scales all directions, for one forward more.",
    )
    curvature_dtype: torch.dtype | None = setting(
        default=None, kind=curvature.DTYPES, help="Storage of that curvature, as HiZOO's. None is float32."
    )

    def settle(self) -> None:
        self.scaled = self.smoothing is not None
        if self.curvature_dtype is not None and self.smoothing is None:
            warnings.warn(
                f"curvature_dtype is {self.curvature_dtype}, and without smoothing there is no curvature: give smoothing=, "
                "as 1e-8, or leave curvature_dtype out",
                ZokernWarning,
                stacklevel=callers.level(),
            )
        self.curvature_dtype = None if self.smoothing is None else self.curvature_dtype or torch.float32
        self.options["curvature_dtype"] = None if self.smoothing is None else str(self.curvature_dtype)

    def states(self) -> state.Spec:
        return {} if self.smoothing is None else curvature.states(self.curvature_dtype or torch.float32)

    def candidate_seeds(self) -> list[Seed]:
        """The directions to try; a new one is the first."""
        return [self.numbers.seed(j) for j in range(self.candidates)]

    def rounds(self) -> Rounds:
        seeds = self.candidate_seeds()
        at_theta: list[Terms] = [] if self.smoothing is None else [{}]
        losses = yield [*at_theta, *({seed: 1.0} for seed in seeds)]
        here = None if self.smoothing is None else losses[0]
        return (yield from self.choose(seeds, torch.stack(losses[-len(seeds) :]), here))

    @abstractmethod
    def choose(self, seeds: list[Seed], losses: Tensor, here: Tensor | None) -> Rounds:
        """The rounds along the direction that the candidates' losses [M] select."""

    def plain_updates(self) -> bool:
        return self.smoothing is None

    def update(self, estimate: Estimate, rates: Rates) -> Update:
        if self.smoothing is None:
            return super().update(estimate, rates)
        return curvature.update(estimate, rates, self.smoothing)


class MeZOGV(_Candidates):
    """MeZO along a guiding vector: M + 2 forwards, M + 3 passes; v is a weighted sum of seeds and never stored.

    With `smoothing`: v has variance s = 1/n_top + 1/n_bottom, and h takes kappa v^2 / s^2, which for s = 1 is HiZOO's
    kappa z^2. The released trainers seed anew for each tensor where they make v, so most of their v was never evaluated;
    here v is what was (stan-anony/MeZO-GV, large_models/trainer.py and trainer_fwa_mem_eff.py, 33c2d3f).
    """

    elite: float = setting(
        default=0.5,
        kind=Number(0.0, 1.0),
        help="Share of the candidates in the top group, floor(elite*M) of them; both groups need one. Published: 0.5.",
    )
    keep_best: bool = setting(
        default=False,
        kind=Flag(),
        help="The candidate with the lowest loss is one of the next step's too, tried again on its batch, beside M - 1 new "
        "ones. With candidates=2 that is the released code's default trainer, repaired: it makes v anew from other noise "
        "than it tried.",
        flags=("--keep-best/--all-new",),
    )

    def settle(self) -> None:
        super().settle()
        # Where the last step's best direction was drawn, step << 16 | number; with its seed, where that is known.
        self._best: Seed | None = None
        self._best_seed: Seed | None = None
        self._now: tuple[Seed, Seed] | None = None
        self._there: Tensor | None = None  # both, int64 [2], where captured steps read and write them
        self.num_top = int(self.elite * self.candidates)
        if not 1 <= self.num_top < self.candidates:
            raise ValueError(
                f"elite is {self.elite:g}, which puts {self.num_top} of {self.candidates} candidates in the top group; "
                f"both groups need one, so it must be in [{1 / self.candidates:g}, 1)"
            )

    def forwards(self) -> int:
        return self.candidates + 2 + self.scaled

    def candidate_seeds(self) -> list[Seed]:
        seeds = super().candidate_seeds()
        if self._best is not None:
            if self._best_seed is None:
                drawn = int(self._best)
                self._best_seed = derive_seed(self.seed, drawn >> 16, drawn & 0xFFFF)
            if self.numbers.gate is not None and self._there is None:
                self._there = torch.stack(
                    [one_of(x, self.numbers.gate, torch.int64) for x in (self._best, self._best_seed)]
                )
                self._see_there()
            # A copy: another may be written there before the last pass reads this one.
            seeds[-1] = self._best_seed if self._there is None else self._there[1].clone()
        return seeds

    def structure(self) -> Hashable:
        return self.keep_best and self._best is not None

    def once(self) -> bool:
        """The first step has nothing to keep."""
        return self.keep_best and self._best is None

    def _see_there(self) -> None:
        assert self._there is not None
        self._best, self._best_seed = self._there.unbind()

    def choose(self, seeds: list[Seed], losses: Tensor, here: Tensor | None) -> Rounds:
        top, bottom = self.num_top, self.candidates - self.num_top
        order = torch.argsort(losses, stable=True)
        if self.keep_best:
            self._note_best(seeds, order[:1])
        ranks = torch.argsort(order)
        weights = torch.where(ranks < top, 1.0 / top, -1.0 / bottom).to(torch.float64)
        v: dict[Seed, Tensor] = dict(zip(seeds, weights.unbind(), strict=True))
        plus, minus = yield [v, {seed: -weight for seed, weight in v.items()}]
        c = (plus - minus) / 2
        gradient = {seed: c * weight for seed, weight in v.items()}
        if here is None:
            return Estimate(gradient, c)
        root = curvature.second_difference(plus, minus, here).sqrt() / (1.0 / top + 1.0 / bottom)
        return Estimate(gradient, c, {seed: root * weight for seed, weight in v.items()}, square_of_sum=True)

    def _note_best(self, seeds: list[Seed], best: Tensor) -> None:
        """Of this step; `note` makes it the last one's. Of losses on a device, only that knows which it is."""
        drawn: list[Seed] = [self.numbers.step << 16 | j for j in range(len(seeds))]
        if self._best is not None:
            drawn[-1] = self._best
        self._now = _picked(drawn, best), _picked(seeds, best)

    def note(self, ok: Tensor, ledger: Ledger) -> None:
        super().note(ok, ledger)
        if self._now is None:
            return
        gate = self.numbers.gate
        if gate is not None or self._there is not None:
            if self._there is None:
                self._there = torch.zeros(2, dtype=torch.int64, device=ok.device)
            enter(self._there, torch.stack([one_of(x, self._there) for x in self._now]), gate, ledger)
        if gate is None:
            before = self._best, self._best_seed
            ledger.undo(lambda: self._take(*before))
            self._take(*self._now)
            if self._there is not None:
                self._see_there()
        self._now = None

    def _take(self, drawn: Seed | None, seed: Seed | None) -> None:
        self._best, self._best_seed = drawn, seed

    def launched(self, step: int) -> None:
        if self._there is not None:
            self._see_there()

    def captured_tensors(self) -> list[Tensor]:
        return [*super().captured_tensors(), *(() if self._there is None else (self._there,))]

    def history(self) -> list[Any]:
        return [] if self._best is None else [int(self._best)]

    def load_history(self, history: list[Any]) -> None:
        if not self.keep_best:
            super().load_history(history)
            return
        if len(history) > 1 or any(
            isinstance(d, bool) or not isinstance(d, int) or not 0 <= d < 1 << 62 for d in history
        ):
            raise ValueError(f"state_dict: history is {history!r}; keep_best remembers one direction, a number")
        self._there = None
        self._take(history[0] if history else None, None)

    def memory(self) -> list[float | Tensor]:
        captured = self._there is not None and self.numbers.gate is not None
        best = self._there[0] if captured and self._there is not None else self._best
        if best is None:
            return []
        stays = isinstance(best, Tensor) and (captured or is_far(best))
        return [best.to(torch.float64) if stays and isinstance(best, Tensor) else float(best)]

    def remember(self, step: int, memory: list[float], dropped: set[int], ok: bool) -> None:
        if memory:
            if not 0 <= memory[0] < 1 << 53 or memory[0] != int(memory[0]):
                raise ValueError(f"step {step} remembers the direction {memory[0]!r}, which is none")
            self._there = None
            self._take(int(memory[0]), None)


def _picked(values: list[Seed], at: Tensor) -> Seed:
    """values[at], at [1]. On a GPU by gathering, which unlike an index does not wait for it."""
    if at.device.type == "cpu" and all(isinstance(value, int) for value in values):
        return values[int(at)]
    return sent(seed_tensor(values), at.device).gather(0, at).reshape(())


class MeZOGreedy(_Candidates):
    """MeZO along the best of M candidate directions: M + 1 forwards, M + 2 passes."""

    def forwards(self) -> int:
        return self.candidates + 1 + self.scaled

    def choose(self, seeds: list[Seed], losses: Tensor, here: Tensor | None) -> Rounds:
        best = losses.argmin(dim=0, keepdim=True)
        seed = _picked(seeds, best)
        plus = losses.gather(0, best).reshape(())
        (minus,) = yield [{seed: -1.0}]
        c = (plus - minus) / 2
        if here is None:
            return Estimate({seed: c}, c)
        return Estimate({seed: c}, c, {seed: curvature.second_difference(plus, minus, here)})
