"""FZOO (arXiv 2506.09034): one-sided estimates along random signs, each step scaled by the spread of its losses.

theta <- (1 - lr*weight_decay) theta - lr / (eps N) sum_j (l_j - L0) u_j / sigma, l_j = L(theta + eps u_j), L0 = L(theta),
sigma the standard deviation of the l_j with 1/(N - 1)
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


class FZOO(ZerothOrderOptimizer):
    """N + 1 forwards, N + 1 passes; all N directions go into one update pass.

    Args:
        params, eps, weight_decay, seed, rounding, placement, pipelined, layers, backend: as :class:`zokern.MeZO`.
        lr: learning rate. The division by sigma takes the losses' scale out of the step: |update| is about
            1 / (eps sqrt(N)) for each element whatever the loss, so lr is about eps times what MeZO's signs would take.
        candidates: N >= 2 directions. Published: 8.
        distribution: "rademacher" as published, or "normal".

    Where all l_j are equal there is no spread to divide by: the step moves nothing (weight decay still applies).

    Raises:
        TypeError, ValueError: naming the argument, or the parameter, and the remedy.
    """

    def __init__(
        self,
        params: object,
        lr: float | Tensor,
        *,
        candidates: int = 8,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        distribution: str = "rademacher",
        seed: int = 0,
        rounding: str = "auto",
        placement: str = "auto",
        pipelined: bool = False,
        layers: RandomBlocks | None = None,
        backend: str = "auto",
    ) -> None:
        self.candidates = _checks.check_integer(candidates, "candidates", 2, 1 << 16)
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
            options={"candidates": candidates},
        )

    def rounds(self) -> Rounds:
        n = self.candidates
        seeds = [self.numbers.seed(j) for j in range(n)]
        here, *each = yield [{}, *({seed: 1.0} for seed in seeds)]
        losses = torch.stack(each)
        spread = losses.max() > losses.min()  # the standard deviation of equal numbers may round to more than 0
        change = torch.where(spread, (losses - here) / losses.std(), 0.0 * losses)
        terms: dict[Seed, Tensor] = dict(zip(seeds, (change / n).unbind(), strict=True))
        return Estimate(terms, change.mean())
