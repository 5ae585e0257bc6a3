"""Evolution strategies at scale (arXiv 2509.24372): N random directions, weighted by how much reward each brought.

theta <- (1 - lr*weight_decay) theta + lr / (N eps) sum_n R_n z_n, R_n the shaped reward of theta + eps z_n
antithetic: + lr / (2 N eps) sum_n (R_n - R'_n) z_n, R'_n that of theta - eps z_n
"""

from __future__ import annotations

import torch
from torch import Tensor

from zokern import _checks
from zokern.layers import RandomBlocks
from zokern.optim.base import ZerothOrderOptimizer
from zokern.optim.drivers import Rounds
from zokern.optim.update import Estimate
from zokern.passes.update import Seed

SHAPINGS = ("standardised", "ranked")


class ES(ZerothOrderOptimizer):
    """Maximises a reward: the closure returns one number, higher is better, and needs no derivative of any kind.

    N forwards and N + 1 passes (antithetic 2N and 2N + 1); all N directions go into one update pass.

    Args:
        params, weight_decay, distribution, seed, rounding, placement, pipelined, layers, backend: as :class:`zokern.MeZO`.
        lr: learning rate. Shaped rewards have no scale, so it does not depend on the reward's.
        eps: standard deviation of the perturbations (sigma in the paper). Published: 1e-3.
        num_directions: N >= 2. Published: about 30.
        shaping: "standardised", (r - mean) / std over the step's rewards, std with 1/N; all equal gives 0. "ranked": ranks
            spread evenly over [-1/2, 1/2] (Salimans et al. 2017), equal rewards sharing theirs: outliers do not count.
        antithetic: try each direction both ways: twice the forwards, less variance.

    `metrics["loss"]` is the mean reward.

    Raises:
        TypeError, ValueError: naming the argument, or the parameter, and the remedy.
    """

    def __init__(
        self,
        params: object,
        lr: float | Tensor,
        *,
        num_directions: int = 30,
        shaping: str = "standardised",
        antithetic: bool = False,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        distribution: str = "normal",
        seed: int = 0,
        rounding: str = "auto",
        placement: str = "auto",
        pipelined: bool = False,
        layers: RandomBlocks | None = None,
        backend: str = "auto",
    ) -> None:
        self.num_directions = _checks.check_integer(num_directions, "num_directions", 2, 1 << 16)
        self.shaping = _checks.check_choice(shaping, "shaping", SHAPINGS)
        self.antithetic = _checks.check_flag(antithetic, "antithetic")
        super().__init__(
            params,
            {"lr": lr, "eps": eps, "weight_decay": weight_decay},
            distribution=distribution,
            seed=seed,
            rounding=rounding,
            placement=placement,
            pipelined=pipelined,
            layers=layers,
            backend=backend,
            options={"num_directions": num_directions, "shaping": shaping, "antithetic": antithetic},
        )

    def rounds(self) -> Rounds:
        seeds = [self.numbers.seed(n) for n in range(self.num_directions)]
        signs = (1.0, -1.0) if self.antithetic else (1.0,)
        each = yield [{seed: sign} for seed in seeds for sign in signs]
        rewards = torch.stack(each).reshape(len(seeds), len(signs))
        shaped = _shape(rewards.flatten(), self.shaping).reshape(rewards.shape)
        ascent = (shaped[:, 0] - shaped[:, 1]) / 2 if self.antithetic else shaped[:, 0]
        terms: dict[Seed, Tensor] = dict(zip(seeds, (-ascent / len(seeds)).unbind(), strict=True))  # the step descends
        return Estimate(terms, -ascent.mean())


def _shape(rewards: Tensor, shaping: str) -> Tensor:
    if shaping == "standardised":
        spread = rewards.max() > rewards.min()  # the standard deviation of equal numbers may round to more than 0
        return torch.where(spread, (rewards - rewards.mean()) / rewards.std(correction=0), 0.0 * rewards)
    below = (rewards[None, :] < rewards[:, None]).sum(dim=1).to(torch.float64)
    equal = (rewards[None, :] == rewards[:, None]).sum(dim=1).to(torch.float64)
    return (below + (equal - 1) / 2) / (len(rewards) - 1) - 0.5
