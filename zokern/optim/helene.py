"""HELENE (Zhao et al. 2024, arXiv 2411.10696): annealed momentum over a curvature with a floor for each layer.

alpha_t = b1 + (1-b1) exp(-t/T);  m <- b1 m + alpha_t g;  every k-th step h <- b2 h + (1-b2) 1/n sum_k s_k z_k^2
theta <- (1 - lr*weight_decay) theta - lr m / (gamma max(h, floor) + delta)
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from zokern import _checks
from zokern.kinds import Betas, Integer, Kind, Number
from zokern.optim import state
from zokern.optim.base import ZerothOrderOptimizer
from zokern.optim.common import NUM_SAMPLES
from zokern.optim.drivers import Rounds
from zokern.optim.update import Estimate, Rates, gradient, stacked
from zokern.passes.update import CPU, Seed, Update, sent
from zokern.settings import setting


@dataclass(frozen=True)
class ByLayer:
    """HELENE's floor as lambda0 / sqrt(d), d the number of the parameter's elements."""

    lambda0: float


class Floor(Kind):
    """A number, a list of numbers, or ByLayer, each at least 0."""

    option = float

    def check(self, value: Any, name: str) -> float | list[float] | ByLayer:
        if isinstance(value, ByLayer):
            _checks.check_number(value.lambda0, f"{name}: lambda0", 0.0, 1e30)
            return value
        if isinstance(value, (list, tuple)):
            return [_checks.check_number(one, f"{name}[{i}]", 0.0, 1e30) for i, one in enumerate(value)]
        return _checks.check_number(value, name, 0.0, 1e30)

    @property
    def allowed(self) -> str:
        return "at least 0, at most 1e+30"

    def stored(self, value: Any) -> Any:
        return {"lambda0": value.lambda0} if isinstance(value, ByLayer) else value


class HELENE(ZerothOrderOptimizer):
    """2n forwards, 2n + 1 passes, the last of which updates m, h and the weights in one sweep.

    State for each parameter, float32: "m" and "h", shaped like it, start at 0. No code was published; the defaults of
    betas, anneal_steps, hessian_interval, gamma, floor and delta are ours. Since alpha_t >= betas[0], |m| is about ten
    times |g|: lr is on its own scale.
    """

    takes_vector_losses = True
    num_samples: int = NUM_SAMPLES
    betas: tuple[float, float] = setting(
        default=(0.9, 0.99),
        kind=Betas(),
        help="Decay of the momentum and of the curvature.",
        parts={"beta1": "Decay of the momentum", "beta2": "Decay of the curvature"},
    )
    anneal_steps: float = setting(
        default=1000.0,
        kind=Number(0.0, open_low=True),
        help="Steps T over which the gradient's weight alpha falls from 1 to betas[0].",
    )
    hessian_interval: int = setting(
        default=10,
        kind=Integer(1, 1 << 40),
        help="Steps from one update of the curvature to the next, k: the steps 0, k, 2k, ... update h.",
    )
    gamma: float = setting(default=1.0, kind=Number(0.0, 1e30), help="Factor of the curvature.")
    floor: float | Sequence[float] | ByLayer = setting(
        default=1.0,
        kind=Floor(),
        help="The curvature counts as this much at least, lambda: one number; in Python also one for each trainable "
        "parameter in the order of param_groups, or ByLayer(lambda0). The paper's layer-wise clipping: no "
        "element is divided by less than gamma*lambda + delta, at least 1e-30.",
        changed="floor_changed",
    )
    delta: float = setting(default=1e-8, kind=Number(0.0, 1e30), help="Added to what the momentum is divided by.")
    batch_size: int = setting(
        default=1,
        kind=Integer(1, 1 << 40),
        help="B of s = B c^2, where the closure returns one loss. Where it returns a vector with the loss of each "
        "example, s is the mean of the squared projected gradients of the examples, and no further forward is "
        "needed.",
        flags=None,
    )

    def settle(self) -> None:
        self._floors: tuple[tuple[tuple[float, ...], torch.device], Tensor] | None = None  # of the rows, on the device
        self._take_floor()

    def floor_changed(self) -> None:
        self._take_floor()
        self.rows_changed()

    def _take_floor(self) -> None:
        trainable = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        if isinstance(self.floor, list) and len(self.floor) != len(trainable):
            raise ValueError(
                f"floor has {len(self.floor)} numbers for {len(trainable)} trainable parameters; give one for each"
            )
        listed = self.floor if isinstance(self.floor, list) else []
        by_id = {id(p): value for p, value in zip(trainable, listed, strict=False)}
        for p in trainable:
            least = self.gamma * self._floor_of(p, by_id) + self.delta
            if least < 1e-30:
                raise ValueError(
                    f"gamma*floor + delta is {least} for a parameter; it must be at least 1e-30, because the momentum is "
                    "divided by it where there is no curvature"
                )
        self._listed = by_id

    def states(self) -> state.Spec:
        return {"m": (torch.float32, 0.0), "h": (torch.float32, 0.0)}

    def forwards(self) -> int:
        return 2 * self.num_samples

    def _floor_of(self, param: Tensor, listed: Mapping[int, float]) -> float:
        if isinstance(self.floor, ByLayer):
            return self.floor.lambda0 / math.sqrt(max(param.numel(), 1))
        if isinstance(self.floor, list):
            if id(param) not in listed:
                raise ValueError(
                    "floor is a list, and a parameter was added after it was given; use a number or ByLayer"
                )
            return listed[id(param)]
        return float(cast(float, self.floor))

    def row_key(self, param: Tensor) -> Hashable:
        return self._floor_of(param, self._listed)

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
            self._floors = key, sent(torch.tensor(key[0], dtype=torch.float64, device=CPU), rates.lr.device)
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
