"""HiZOO (Zhao et al. 2024, arXiv 2402.15173): MeZO with a diagonal curvature from one further forward.

c_k = (L+ - L-) / (2 eps), kappa_k = |L+ + L- - 2 L0| / (2 eps^2), L+- at theta +- eps z_k / sqrt(h), L0 at theta
h' = (1 - a) h + a h 1/n sum_k kappa_k z_k^2;  theta <- (1 - lr*weight_decay) theta - lr 1/n sum_k c_k z_k / sqrt(h')
"""

from __future__ import annotations

import torch
from torch import Tensor

from zokern.kinds import SHARE
from zokern.optim import curvature, state
from zokern.optim.base import ZerothOrderOptimizer
from zokern.optim.common import NUM_SAMPLES
from zokern.optim.drivers import Rounds
from zokern.optim.update import Estimate, Rates
from zokern.passes.update import Seed, Update
from zokern.settings import setting


class HiZOO(ZerothOrderOptimizer):
    """Hessian-informed zeroth-order SGD: 2n + 1 forwards, 2n + 1 passes, the last of which updates h and the weights.

    State for each parameter: "h" > 0, shaped like it, starts at 1 and stays within 2^-64 .. 2^64. The old h scales the
    probes, the new one the update. The released code keeps h in the weights' dtype, in which a = 1e-8 never changes it.
    Published: lr 1e-6, eps 1e-3.
    """

    num_samples: int = NUM_SAMPLES
    smoothing: float = setting(
        default=1e-8,
        kind=SHARE,
        help="Weight a of a step's curvature; 0 keeps h. Published: 1e-8 (1e-6 in an earlier version).",
    )
    curvature_dtype: torch.dtype = curvature.CURVATURE_DTYPE
    scaled = True

    def states(self) -> state.Spec:
        return curvature.states(self.curvature_dtype)

    def forwards(self) -> int:
        return 2 * self.num_samples + 1

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
