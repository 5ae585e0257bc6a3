"""HiZOO (Zhao et al. 2024, arXiv 2402.15173): MeZO with a diagonal curvature from one further forward.

c_k = (L+ - L-) / (2 eps), kappa_k = |L+ + L- - 2 L0| / (2 eps^2), L+- at theta +- eps z_k / sqrt(h), L0 at theta
h' = (1 - a) h + a h 1/n sum_k kappa_k z_k^2;  theta <- (1 - lr*weight_decay) theta - lr 1/n sum_k c_k z_k / sqrt(h')
"""

from __future__ import annotations

import torch
from torch import Tensor

from zokern import _checks
from zokern.layers import RandomBlocks
from zokern.optim import curvature
from zokern.optim.base import ZerothOrderOptimizer
from zokern.optim.drivers import Rounds
from zokern.optim.update import Estimate, Rates
from zokern.passes.update import Seed, Update


class HiZOO(ZerothOrderOptimizer):
    """Hessian-informed zeroth-order SGD: 2n + 1 forwards, 2n + 1 passes, the last of which updates h and the weights.

    Args:
        params, lr, eps, weight_decay, num_samples, distribution, seed, rounding, placement, pipelined, layers, backend: as
            :class:`zokern.MeZO`. Published: lr 1e-6, eps 1e-3.
        smoothing: a in [0, 1), the weight of a step's curvature. Published: 1e-8 (1e-6 in an earlier version). 0 keeps h.
        curvature_dtype: of h, torch.float32, or torch.bfloat16, rounded stochastically: half the memory, and h still
            moves on average by what it should.

    State for each parameter: "h" > 0, shaped like it, starts at 1 and stays within 2^-64 .. 2^64. The old h scales the
    probes, the new one the update. The released code keeps h in the weights' dtype, in which a = 1e-8 never changes it.

    Raises:
        TypeError, ValueError: naming the argument, or the parameter, and the remedy.
    """

    def __init__(
        self,
        params: object,
        lr: float | Tensor,
        *,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        num_samples: int = 1,
        smoothing: float = 1e-8,
        curvature_dtype: torch.dtype = torch.float32,
        distribution: str = "normal",
        seed: int = 0,
        rounding: str = "auto",
        placement: str = "auto",
        pipelined: bool = False,
        layers: RandomBlocks | None = None,
        backend: str = "auto",
    ) -> None:
        self.num_samples = _checks.check_integer(num_samples, "num_samples", 1, 1 << 20)
        self.smoothing, states = curvature.check(smoothing, curvature_dtype)
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
            options={"num_samples": num_samples, "smoothing": smoothing, "curvature_dtype": str(curvature_dtype)},
            states=states,
            scaled=True,
        )

    def rounds(self) -> Rounds:
        n = self.num_samples
        seeds = [self.numbers.seed(k) for k in range(n)]
        here, *losses = yield [{}, *({seed: sign} for seed in seeds for sign in (1.0, -1.0))]
        terms: dict[Seed, Tensor] = {}
        kappa: dict[Seed, Tensor] = {}
        for seed, plus, minus in zip(seeds, losses[::2], losses[1::2], strict=True):
            terms[seed] = (plus - minus) / (2 * n)
            kappa[seed] = curvature.second_difference(plus, minus, here) / n
        return Estimate(terms, torch.stack(list(terms.values())).sum(), kappa)

    def update(self, estimate: Estimate, rates: Rates) -> Update:
        return curvature.update(estimate, rates, self.smoothing)
