"""MeZO (Malladi et al. 2023, arXiv 2305.17333, algorithm 1) and LeZO, which is MeZO on random layers.

c_k = (L(theta + eps z_k) - L(theta - eps z_k)) / (2 eps)
theta <- (1 - lr*weight_decay) theta - lr/n * sum_k c_k z_k
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zokern import _checks
from zokern.layers import RandomBlocks
from zokern.optim.base import Probe, ZerothOrderOptimizer


class MeZO(ZerothOrderOptimizer):
    """Memory-efficient zeroth-order SGD: two forwards per sample, no gradients, no state.

    Args:
        params: an nn.Module (recommended: its trainable parameters, with names and ids that survive freezing), or
            what torch's optimizers take: tensors, (name, tensor) pairs, or groups with their own lr, eps, weight_decay.
        lr: learning rate. Published: 1e-6 or 1e-7 (all parameters), 1e-4 (LoRA).
        eps: perturbation radius, > 0. Published: 1e-3 (LoRA 1e-2, prefix tuning 1e-1).
        weight_decay: decoupled, as in AdamW. Published: 0.
        num_samples: directions averaged in a step, n >= 1; 2n forwards, and one update pass for all.
        distribution: "normal", or "rademacher" for random signs.
        seed: of the run, in [0, 2^63): direction k of step t has the seed derive_seed(seed, t, k).
        rounding: of the update. "auto": to nearest for float32, stochastic for 16-bit weights.
        placement: where the perturbed weights live during a forward: "inplace", "shadow", or "auto" (zokern.placement).
        layers: RandomBlocks(num_dropped) leaves out that many transformer blocks in each step (LeZO).
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Passes over the weights in a step: 2n + 1. After a step, `metrics` holds "loss" and "projected_gradient" (the mean of
    c_k), 0-d tensors on the device.

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
        distribution: str = "normal",
        seed: int = 0,
        rounding: str = "auto",
        placement: str = "auto",
        layers: RandomBlocks | None = None,
        backend: str = "auto",
    ) -> None:
        self.num_samples = _checks.check_integer(num_samples, "num_samples", 1, 1 << 20)
        super().__init__(
            params,
            {"lr": lr, "eps": eps, "weight_decay": weight_decay},
            distribution=distribution,
            seed=seed,
            rounding=rounding,
            placement_name=placement,
            layers=layers,
            backend=backend,
            options={"num_samples": num_samples},
        )

    def estimate(self, probe: Probe) -> dict[int, Tensor]:
        gradient, losses = {}, []
        for k in range(self.num_samples):
            seed = self.direction_seed(k)
            plus, minus = probe({seed: 1.0}), probe({seed: -1.0})
            gradient[seed] = (plus - minus) / (2 * self.num_samples)
            losses += [plus, minus]
        eps = float(self.param_groups[0]["eps"])
        self.metrics = {
            "loss": torch.stack(losses).mean().to(torch.float32),
            "projected_gradient": (torch.stack(list(gradient.values())).sum() / eps).to(torch.float32),
        }
        return gradient


class LeZO(MeZO):
    """MeZO that leaves out `num_dropped` random transformer blocks in each step: MeZO(layers=RandomBlocks(num_dropped))."""

    def __init__(self, model: nn.Module, lr: float | Tensor, *, num_dropped: int, **options: Any) -> None:
        super().__init__(model, lr, layers=RandomBlocks(num_dropped), **options)
