"""MeZO-GV and MeZO-Greedy (Jin, Cen, Tan 2026, arXiv 2601.04710): M candidate directions, tried before one is taken.

l_j = L(theta + eps z_j).  GV: v = mean of the lowest floor(elite*M) candidates' z minus mean of the others',
c = (L(theta + eps v) - L(theta - eps v)) / (2 eps).  Greedy: the lowest candidate's z, whose l_j is L+ already.
theta <- (1 - lr*weight_decay) theta - lr c v
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from zokern.kinds import SHARE, Integer, Number
from zokern.optim import curvature, state
from zokern.optim.base import ZerothOrderOptimizer
from zokern.optim.drivers import Rounds
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
        self.curvature_dtype = None if self.smoothing is None else self.curvature_dtype or torch.float32
        self.options["curvature_dtype"] = None if self.smoothing is None else str(self.curvature_dtype)

    def states(self) -> state.Spec:
        return {} if self.smoothing is None else curvature.states(self.curvature_dtype or torch.float32)

    def rounds(self) -> Rounds:
        seeds = [self.numbers.seed(j) for j in range(self.candidates)]
        at_theta: list[Terms] = [] if self.smoothing is None else [{}]
        losses = yield [*at_theta, *({seed: 1.0} for seed in seeds)]
        here = None if self.smoothing is None else losses[0]
        return (yield from self.choose(seeds, torch.stack(losses[-len(seeds) :]), here))

    @abstractmethod
    def choose(self, seeds: list[Seed], losses: Tensor, here: Tensor | None) -> Rounds:
        """The rounds along the direction that the candidates' losses [M] select."""

    def update(self, estimate: Estimate, rates: Rates) -> Update:
        if self.smoothing is None:
            return super().update(estimate, rates)
        return curvature.update(estimate, rates, self.smoothing)


class MeZOGV(_Candidates):
    """MeZO along a guiding vector: M + 2 forwards, M + 3 passes; v is a weighted sum of seeds and never stored.

    With `smoothing`: v has variance s = 1/n_top + 1/n_bottom, and h takes kappa v^2 / s^2, which for s = 1 is HiZOO's
    kappa z^2. The released trainer seeds anew for each tensor in its loop, so most of its v was never evaluated; here v is
    what was.
    """

    elite: float = setting(
        default=0.5,
        kind=Number(0.0, 1.0),
        help="Share of the candidates in the top group, floor(elite*M) of them; both groups need one. Published: 0.5.",
    )

    def settle(self) -> None:
        super().settle()
        self.num_top = int(self.elite * self.candidates)
        if not 1 <= self.num_top < self.candidates:
            raise ValueError(
                f"elite is {self.elite:g}, which puts {self.num_top} of {self.candidates} candidates in the top group; "
                f"both groups need one, so it must be in [{1 / self.candidates:g}, 1)"
            )

    def forwards(self) -> int:
        return self.candidates + 2 + self.scaled

    def choose(self, seeds: list[Seed], losses: Tensor, here: Tensor | None) -> Rounds:
        top, bottom = self.num_top, self.candidates - self.num_top
        ranks = torch.argsort(torch.argsort(losses, stable=True))
        weights = torch.where(ranks < top, 1.0 / top, -1.0 / bottom).to(torch.float64)
        v: dict[Seed, Tensor] = dict(zip(seeds, weights.unbind(), strict=True))
        plus, minus = yield [v, {seed: -weight for seed, weight in v.items()}]
        c = (plus - minus) / 2
        gradient = {seed: c * weight for seed, weight in v.items()}
        if here is None:
            return Estimate(gradient, c)
        root = curvature.second_difference(plus, minus, here).sqrt() / (1.0 / top + 1.0 / bottom)
        return Estimate(gradient, c, {seed: root * weight for seed, weight in v.items()}, square_of_sum=True)


class MeZOGreedy(_Candidates):
    """MeZO along the best of M candidate directions: M + 1 forwards, M + 2 passes."""

    def forwards(self) -> int:
        return self.candidates + 1 + self.scaled

    def choose(self, seeds: list[Seed], losses: Tensor, here: Tensor | None) -> Rounds:
        best = losses.argmin(dim=0, keepdim=True)
        # Losses on a GPU choose the seed there, and by gathering, which unlike an index [best] does not wait for them.
        if losses.device.type == "cpu" and all(isinstance(seed, int) for seed in seeds):
            seed = seeds[int(best)]
        else:
            seed = sent(seed_tensor(seeds), losses.device).gather(0, best).reshape(())
        plus = losses.gather(0, best).reshape(())
        (minus,) = yield [{seed: -1.0}]
        c = (plus - minus) / 2
        if here is None:
            return Estimate({seed: c}, c)
        return Estimate({seed: c}, c, {seed: curvature.second_difference(plus, minus, here)})
