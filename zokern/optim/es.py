"""Evolution strategies at scale (arXiv 2509.24372): N random directions, weighted by how much reward each brought.

theta <- (1 - lr*weight_decay) theta + lr / (N eps) sum_n R_n z_n, R_n the shaped reward of theta + eps z_n
antithetic: + lr / (2 N eps) sum_n (R_n - R'_n) z_n, R'_n that of theta - eps z_n
scale="released": lr / N in place of lr / (N eps), and 1e-8 added to the rewards' standard deviation (VsonicV/
es-fine-tuning-paper, es_at_scale/utils/, d1e3d76)
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from zokern._checks import ZokernWarning
from zokern.kinds import Choice, Flag, Integer
from zokern.optim import callers
from zokern.optim.base import ZerothOrderOptimizer
from zokern.optim.common import RELEASED_LR, SCALES, Common
from zokern.optim.drivers import Rounds
from zokern.optim.update import Estimate, Rates, unscaled
from zokern.passes.update import Seed, Update
from zokern.settings import again, setting

SHAPINGS = ("standardised", "ranked")


class ES(ZerothOrderOptimizer):
    """For rewards: with maximize=True the closure returns one number, higher is better, of whatever kind.

    Without `maximize` it climbs too, and warns: in a later version the default will be to descend, as everywhere else.
    N forwards and N + 1 passes (antithetic 2N and 2N + 1); all N directions go into one update pass. Shaped rewards have no
    scale, so lr does not depend on the reward's. `metrics["loss"]` is the mean reward.
    """

    takes_rewards = True
    measures_slope = False  # shaped rewards have no scale, and standardised ones the mean 0
    maximize: bool | None = again(Common, "maximize", default=None)
    num_directions: int = setting(
        default=30, kind=Integer(2, 1 << 16), help="Directions a step, N. Published: about 30."
    )
    shaping: str = setting(
        default="standardised",
        kind=Choice(SHAPINGS),
        help="How rewards become weights. standardised, as published: (r - mean) / std over the step's rewards, std "
        "with 1/N; all equal gives 0. ranked: ranks spread evenly over [-1/2, 1/2] (Salimans et al. 2017), "
        "equal rewards sharing theirs: outliers do not count.",
    )
    antithetic: bool = setting(
        default=False,
        kind=Flag(),
        help="Try every direction both ways: twice the forwards, less variance.",
        flags=("--antithetic/--not-antithetic",),
    )

    scale: str = setting(
        default="paper",
        kind=SCALES,
        help="Whose lr (no unit): paper has 1/eps in the step; released, as in the published code, has none, and adds 1e-8 "
        "to the rewards' std. The same step takes lr = alpha sigma, alpha and sigma (here eps) the released code's.",
    )

    def settle(self) -> None:
        if self.maximize is None:
            self.maximize = True
            warnings.warn(
                "ES maximizes what the closure returns, and the other methods minimize: pass maximize=True for a reward, "
                "or maximize=False for a loss. In a later version, ES without it will minimize too",
                ZokernWarning,
                stacklevel=callers.level(),
            )

    def forwards(self) -> int:
        return self.num_directions * (1 + self.antithetic)

    def rounds(self) -> Rounds:
        seeds = [self.numbers.seed(n) for n in range(self.num_directions)]
        signs = (1.0, -1.0) if self.antithetic else (1.0,)
        each = yield [{seed: sign} for seed in seeds for sign in signs]
        rewards = -torch.stack(each).reshape(len(seeds), len(signs))
        shaped = _shape(rewards.flatten(), self.shaping, 1e-8 if self.scale == "released" else 0.0)
        shaped = shaped.reshape(rewards.shape)
        ascent = (shaped[:, 0] - shaped[:, 1]) / 2 if self.antithetic else shaped[:, 0]
        terms: dict[Seed, Tensor] = dict(zip(seeds, (-ascent / len(seeds)).unbind(), strict=True))  # the step descends
        return Estimate(terms, -ascent.mean())

    def plain_updates(self) -> bool:
        return True

    def update(self, estimate: Estimate, rates: Rates) -> Update:
        return unscaled(estimate, rates) if self.scale == "released" else super().update(estimate, rates)

    def advice(self) -> str:
        return "" if self.scale == "released" else RELEASED_LR


def _shape(rewards: Tensor, shaping: str, added: float) -> Tensor:
    """added: to the standard deviation."""
    if shaping == "standardised":
        spread = rewards.max() > rewards.min()  # the standard deviation of equal numbers may round to more than 0
        return torch.where(spread, (rewards - rewards.mean()) / (rewards.std(correction=0) + added), 0.0 * rewards)
    below = (rewards[None, :] < rewards[:, None]).sum(dim=1).to(torch.float64)
    equal = (rewards[None, :] == rewards[:, None]).sum(dim=1).to(torch.float64)
    return (below + (equal - 1) / 2) / (len(rewards) - 1) - 0.5
