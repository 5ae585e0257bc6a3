"""MeZO in float64, straight from algorithm 1 of arXiv 2305.17333: every perturbed state is written down, nothing is merged.

Slow and obvious on purpose, and no line of it comes from zokern.optim: only the noise and the seeds are the contract's.
`theta` maps the tensor id (the position among all parameters of the module) to a float64 array.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from zokern.contract import reference

Theta = dict[int, np.ndarray]


@functools.lru_cache(maxsize=256)
def noise(n: int, seed: int, tensor_id: int, distribution: str) -> np.ndarray:
    return reference.noise(n, seed, tensor_id, 0, distribution).astype(np.float64)


@dataclass
class Group:
    """A parameter group: the tensor ids in it and its hyper-parameters."""

    ids: Sequence[int]
    lr: float
    eps: float = 1e-3
    weight_decay: float = 0.0


@dataclass
class MeZO:
    theta: Theta
    groups: Sequence[Group]
    num_samples: int = 1
    distribution: str = "normal"
    seed: int = 0
    step_number: int = 0
    projected: list[float] = field(default_factory=list)

    def z(self, k: int, tensor_id: int) -> np.ndarray:
        seed = reference.derive_seed(self.seed, self.step_number, k)
        return noise(self.theta[tensor_id].size, seed, tensor_id, self.distribution).reshape(
            self.theta[tensor_id].shape
        )

    def perturbed(self, k: int, sign: float) -> Theta:
        """theta + sign * eps * z(s_k), with each group's eps; tensors in no group stay."""
        out = {i: t.copy() for i, t in self.theta.items()}
        for group in self.groups:
            for i in group.ids:
                out[i] = self.theta[i] + sign * group.eps * self.z(k, i)
        return out

    def step(self, loss: Callable[[Theta], float]) -> float:
        """One step; loss is called at theta + eps z and theta - eps z of every sample, in that order."""
        pairs = []
        for k in range(self.num_samples):
            plus = float(loss(self.perturbed(k, +1.0)))
            minus = float(loss(self.perturbed(k, -1.0)))
            pairs.append((plus, minus))
        new = {i: t.copy() for i, t in self.theta.items()}
        for group in self.groups:
            for i in group.ids:
                update = np.zeros_like(self.theta[i])
                for k, (plus, minus) in enumerate(pairs):
                    c = (plus - minus) / (2.0 * group.eps)
                    update += c * self.z(k, i) / self.num_samples
                new[i] = (1.0 - group.lr * group.weight_decay) * self.theta[i] - group.lr * update
        self.theta = new
        self.step_number += 1
        first = self.groups[0].eps
        self.projected.append(float(np.mean([(plus - minus) / (2.0 * first) for plus, minus in pairs])))
        return float(np.mean(pairs))


def theta_of(module: nn.Module) -> Theta:
    """All parameters of a module, tied ones once, numbered in order."""
    return {i: p.detach().cpu().double().numpy().copy() for i, p in enumerate(module.parameters())}


def load(module: nn.Module, theta: Theta) -> None:
    """Writes theta into a module (for example a float64 copy whose losses the oracle uses)."""
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(torch.from_numpy(theta[i]))
