"""FZOO (arXiv 2506.09034): one-sided estimates along random signs, each step scaled by the spread of its losses.

theta <- (1 - lr*weight_decay) theta - lr / (eps N) sum_j (l_j - L0) u_j / sigma, l_j = L(theta + eps u_j), L0 = L(theta),
sigma the standard deviation of the l_j with 1/(N - 1)
scale="released": theta <- ... - lr / N sum_j (l_j - L0) u_j / sigma, sigma with 1/N (DKmiyan/FZOO, trainer.py, d7d50ed)
"""

from __future__ import annotations

from dataclasses import InitVar

import torch
from torch import Tensor

from zokern import directions
from zokern.kinds import Integer
from zokern.optim.base import ZerothOrderOptimizer
from zokern.optim.common import RELEASED_LR, SCALES, Common
from zokern.optim.drivers import Rounds
from zokern.optim.update import Estimate, Rates, unscaled
from zokern.passes.update import Seed, Update
from zokern.settings import again, setting


class FZOO(ZerothOrderOptimizer):
    """N + 1 forwards, N + 1 passes; all N directions go into one update pass.

    The division by sigma takes the losses' scale out of the step: |update| is about 1 / (eps sqrt(N)) for each element
    whatever the loss, so lr is about eps times what MeZO's signs would take. Where all l_j are equal there is no spread to
    divide by: the step moves nothing (weight decay still applies).
    """

    candidates: int = setting(
        default=8, kind=Integer(2, 1 << 16), help="Directions a step, N: all go into one update. Published: 8."
    )
    scale: str = setting(
        default="paper",
        kind=SCALES,
        help="Whose lr (no unit): paper has 1/eps in the step, and sigma with 1/(N - 1); released, as in the published "
        "code, has no 1/eps, and sigma with 1/N. The same step takes lr = LR eps sqrt(N / (N - 1)), LR the released "
        "code's.",
    )
    distribution: InitVar[str | directions.Direction] = again(Common, "distribution", default="rademacher")

    def forwards(self) -> int:
        return self.candidates + 1

    def rounds(self) -> Rounds:
        n = self.candidates
        seeds = [self.numbers.seed(j) for j in range(n)]
        here, *each = yield [{}, *({seed: 1.0} for seed in seeds)]
        losses = torch.stack(each)
        spread = losses.max() > losses.min()  # the standard deviation of equal numbers may round to more than 0
        sigma = losses.std(correction=0 if self.scale == "released" else 1)
        change = torch.where(spread, (losses - here) / sigma, 0.0 * losses)
        terms: dict[Seed, Tensor] = dict(zip(seeds, (change / n).unbind(), strict=True))
        return Estimate(terms, change.mean())

    def plain_updates(self) -> bool:
        return True

    def update(self, estimate: Estimate, rates: Rates) -> Update:
        return unscaled(estimate, rates) if self.scale == "released" else super().update(estimate, rates)

    def advice(self) -> str:
        return "" if self.scale == "released" else RELEASED_LR
