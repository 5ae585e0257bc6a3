"""HELENE (Zhao et al. 2024, arXiv 2411.10696): annealed momentum over a curvature with a floor for each layer.

alpha_t = b1 + (1-b1) exp(-t/T);  m <- b1 m + alpha_t g;  every k-th step h <- b2 h + (1-b2) 1/n sum_k s_k z_k^2
theta <- (1 - lr*weight_decay) theta - lr m / (gamma max(h, floor) + delta)
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from zokern import _checks
from zokern.layers import RandomBlocks
from zokern.optim.base import ZerothOrderOptimizer
from zokern.optim.drivers import Rounds
from zokern.optim.update import Estimate, Rates, gradient, stacked
from zokern.passes.update import Seed, Update, sent


@dataclass(frozen=True)
class ByLayer:
    """HELENE's floor as lambda0 / sqrt(d), d the number of the parameter's elements."""

    lambda0: float


class HELENE(ZerothOrderOptimizer):
    """2n forwards, 2n + 1 passes, the last of which updates m, h and the weights in one sweep.

    Args:
        params, lr, eps, weight_decay, num_samples, distribution, seed, rounding, placement, pipelined, layers, backend: as
            :class:`zokern.MeZO`. Since alpha_t >= betas[0], |m| is about ten times |g|: lr is on its own scale.
        betas: decay of the momentum and of the curvature, in [0, 1).
        anneal_steps: T > 0, the steps over which alpha falls from 1 to betas[0].
        hessian_interval: k >= 1; the steps 0, k, 2k, ... update h.
        gamma: >= 0, scales the curvature.
        floor: lambda >= 0: one number, one for each trainable parameter in the order of param_groups, or ByLayer(lambda0).
            The paper's layer-wise clipping: no element is divided by less than gamma*lambda + delta, at least 1e-30.
        delta: >= 0, added to the denominator.
        batch_size: B of s = B c^2, where the closure returns one loss. Where it returns a vector with the loss of each
            example, s is the mean of the squared projected gradients of the examples, and no further forward is needed.

    State for each parameter, float32: "m" and "h", shaped like it, start at 0. No code was published; the defaults of
    betas, anneal_steps, hessian_interval, gamma, floor and delta are ours.

    Raises:
        TypeError, ValueError: naming the argument, or the parameter, and the remedy.
    """

    takes_vector_losses = True

    def __init__(
        self,
        params: object,
        lr: float | Tensor,
        *,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        num_samples: int = 1,
        betas: tuple[float, float] = (0.9, 0.99),
        anneal_steps: float = 1000,
        hessian_interval: int = 10,
        gamma: float = 1.0,
        floor: float | Sequence[float] | ByLayer = 1.0,
        delta: float = 1e-8,
        batch_size: int = 1,
        distribution: str = "normal",
        seed: int = 0,
        rounding: str = "auto",
        placement: str = "auto",
        pipelined: bool = False,
        layers: RandomBlocks | None = None,
        backend: str = "auto",
    ) -> None:
        self.num_samples = _checks.check_integer(num_samples, "num_samples", 1, 1 << 20)
        self.betas = _checks.check_betas(betas)
        self.anneal_steps = _checks.check_number(anneal_steps, "anneal_steps", 0.0, open_low=True)
        self.hessian_interval = _checks.check_integer(hessian_interval, "hessian_interval", 1, 1 << 40)
        self.gamma = _checks.check_number(gamma, "gamma", 0.0, 1e30)
        self.delta = _checks.check_number(delta, "delta", 0.0, 1e30)
        self.batch_size = _checks.check_integer(batch_size, "batch_size", 1, 1 << 40)
        self.floor = floor
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
            options={
                "num_samples": num_samples,
                "betas": list(self.betas),
                "anneal_steps": self.anneal_steps,
                "hessian_interval": hessian_interval,
                "gamma": self.gamma,
                "floor": {"lambda0": self.floor.lambda0} if isinstance(self.floor, ByLayer) else self.floor,
                "delta": self.delta,
                "batch_size": batch_size,
            },
            states={"m": (torch.float32, 0.0), "h": (torch.float32, 0.0)},
        )
        trainable = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        if isinstance(self.floor, list) and len(self.floor) != len(trainable):
            raise ValueError(
                f"floor has {len(self.floor)} numbers for {len(trainable)} trainable parameters; give one for each"
            )
        listed = self.floor if isinstance(self.floor, list) else []
        self._floors: tuple[tuple[tuple[float, ...], torch.device], Tensor] | None = None  # of the rows, on the device
        self._listed = {id(p): value for p, value in zip(trainable, listed, strict=False)}
        for p in trainable:
            if self.gamma * self._floor_of(p) + self.delta < 1e-30:
                raise ValueError(
                    f"gamma*floor + delta is {self.gamma * self._floor_of(p) + self.delta} for a parameter; it must be at "
                    "least 1e-30, because the momentum is divided by it where there is no curvature"
                )

    def _floor_of(self, param: Tensor) -> float:
        if isinstance(self.floor, ByLayer):
            return self.floor.lambda0 / math.sqrt(max(param.numel(), 1))
        if isinstance(self.floor, list):
            if id(param) not in self._listed:
                raise ValueError(
                    "floor is a list, and a parameter was added after it was given; use a number or ByLayer"
                )
            return self._listed[id(param)]
        return self.floor

    @property
    def floor(self) -> float | list[float] | ByLayer:
        """May be changed between steps."""
        return self._floor

    @floor.setter
    def floor(self, floor: float | Sequence[float] | ByLayer) -> None:
        self._floor = _check_floor(floor)
        if "_parameters" in vars(self):
            self._parameters.forget()  # its rows go by the floor

    def row_key(self, param: Tensor) -> Hashable:
        return self._floor_of(param)

    def schedule(self, step: int) -> list[float]:
        """alpha_t."""
        b1, _ = self.betas
        return [b1 + (1.0 - b1) * math.exp(-step / self.anneal_steps)]

    def structure(self) -> bool:
        """Whether the step updates h."""
        return self._passes.counters.steps % self.hessian_interval == 0

    def captured_tensors(self) -> list[Tensor]:
        return [*super().captured_tensors(), *([self._floors[1]] if self._floors is not None else [])]

    def rounds(self) -> Rounds:
        n = self.num_samples
        seeds = [self.numbers.seed(k) for k in range(n)]
        losses = yield [{seed: sign} for seed in seeds for sign in (1.0, -1.0)]
        terms: dict[Seed, Tensor] = {}
        squares: dict[Seed, Tensor] = {}
        for seed, plus, minus in zip(seeds, losses[::2], losses[1::2], strict=True):
            change = (plus - minus) / 2  # of each example where there are many
            terms[seed] = change.mean() / n
            squares[seed] = (change**2).mean() * (self.batch_size if change.dim() == 0 else 1) / n
        return Estimate(terms, torch.stack(list(terms.values())).sum(), squares)

    def update(self, estimate: Estimate, rates: Rates) -> Update:
        b1, b2 = self.betas
        alpha = self.numbers.scheduled(0)
        with_h = self.structure()
        squares = stacked(estimate.curvature) / rates.eps[:, None] ** 2
        constants = {"beta1": b1, "beta2": b2 if with_h else 1.0, "gamma": self.gamma, "delta": self.delta}
        key = tuple(cast(float, key) for _, key in self.active.rows), rates.lr.device
        if self._floors is None or self._floors[0] != key:
            self._floors = key, sent(torch.tensor(key[0], dtype=torch.float64), rates.lr.device)
        return Update(
            list(estimate.gradient),
            {"G": alpha * gradient(estimate, rates.eps), "V": (1.0 - b2) * squares if with_h else 0.0 * squares},
            {
                "decay": rates.decay,
                "step": -rates.lr,
                "floor": self._floors[1],
                **{name: torch.full_like(rates.lr, value) for name, value in constants.items()},
            },
            "helene",
            {"beta1": 1.0, "beta2": 1.0, "step": 0.0},
            keep_second=not with_h,
        )


def _check_floor(floor: object) -> float | list[float] | ByLayer:
    if isinstance(floor, ByLayer):
        _checks.check_number(floor.lambda0, "floor: lambda0", 0.0, 1e30)
        return floor
    if isinstance(floor, (list, tuple)):
        return [_checks.check_number(value, f"floor[{i}]", 0.0, 1e30) for i, value in enumerate(floor)]
    return _checks.check_number(floor, "floor", 0.0, 1e30)
