"""The methods of protocol.py: how each is built, what a step of it costs, and which lr are tried first.

lr means another thing to each method, so the grids are matched by distance: an lr of one grid moves a weight about as far
in as many forwards as the lr at the same place of MeZO's. FZOO and ES divide by a spread, so their lr is smaller; HELENE
divides by its floor, so it is larger.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import zokern
from benchmarks.convergence.methods import BACKPROPAGATION, ES, ES_N, adam, lezo, low_rank
from zokern.optim.base import ZerothOrderOptimizer

EPS = 1e-3
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Method:
    """build(model, lr=, eps=, seed=, **settings) gives an optimizer.

    forwards: that a step costs. grid: lr to begin with, in half-decades. adapter: "lora" or "prefix", of which alone the
    weights are tuned; "": the whole model. sign: of the closure's value; ES climbs.
    """

    label: str
    build: Callable[..., Any]
    forwards: int
    grid: tuple[float, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    adapter: str = ""
    eps: float = EPS
    sign: float = 1.0

    @property
    def backward(self) -> bool:
        """Whether a step is a forward and a backward."""
        return self.build is adam

    def optimizer(self, model: nn.Module, lr: float, seed: int) -> Any:
        return self.build(model, lr=lr, eps=self.eps, seed=seed, **self.settings)


def step(method: Method, optimizer: Any, loss: Callable[[], torch.Tensor]) -> None:
    """One step on a batch, whose loss is given."""
    if not method.backward:
        optimizer.step(lambda: method.sign * loss())
        return
    optimizer.zero_grad(set_to_none=True)
    with torch.enable_grad():
        loss().backward()
    optimizer.step()


def states(optimizer: Any) -> dict[str, dict[str, float]]:
    """Of each state that a method of ours keeps for all weights, as HiZOO's h: its least, mean and largest value."""
    if not isinstance(optimizer, ZerothOrderOptimizer):
        return {}
    kept: dict[str, list[torch.Tensor]] = {}
    for state in optimizer.state.values():
        for name, values in state.items():
            kept.setdefault(name, []).append(values)
    return {
        name: {
            "least": min(float(t.min()) for t in tensors),
            "mean": sum(float(t.sum(dtype=torch.float64)) for t in tensors) / sum(t.numel() for t in tensors),
            "largest": max(float(t.max()) for t in tensors),
        }
        for name, tensors in kept.items()
    }


METHODS: dict[str, Method] = {
    "mezo": Method("MeZO, two-sided", zokern.MeZO, 2, (1e-5, 3e-5, 1e-4)),
    "mezo-onesided": Method(
        "MeZO, one-sided, n=4", zokern.MeZO, 5, (3e-5, 1e-4, 3e-4), {"num_samples": 4, "one_sided": True}
    ),
    "lezo": Method("LeZO, 3/4 of the blocks dropped", lezo, 2, (3e-5, 1e-4, 3e-4), {"share": 0.75}),
    "hizoo": Method("HiZOO", zokern.HiZOO, 3, (1e-5, 3e-5, 1e-4)),
    "helene": Method("HELENE, floor 1000", zokern.HELENE, 2, (1e-3, 3e-3, 1e-2), {"floor": 1e3, "batch_size": 16}),
    "mezo-gv": Method("MeZO-GV, M=4", zokern.MeZOGV, 6, (1e-5, 3e-5, 1e-4), {"candidates": 4}),
    "mezo-greedy": Method("MeZO-Greedy, M=4", zokern.MeZOGreedy, 5, (1e-5, 3e-5, 1e-4), {"candidates": 4}),
    "fzoo": Method("FZOO, N=8", zokern.FZOO, 9, (1e-6, 3e-6, 1e-5), {"candidates": 8}),
    "es": Method(
        f"ES, N={ES_N} antithetic", zokern.ES, 2 * ES_N, (1e-6, 3e-6, 1e-5), ES, sign=-1.0
    ),
    "lowrank": Method(
        "MeZO along rank 1, folded every 8", low_rank, 2, (1e-5, 3e-5, 1e-4), {"rank": 1, "fold_every": 8}
    ),
    "lora-mezo": Method("MeZO on LoRA", zokern.MeZO, 2, (1e-3, 3e-3, 1e-2), adapter="lora", eps=1e-2),
    "prefix-mezo": Method("MeZO on a prefix", zokern.MeZO, 2, (3e-3, 1e-2, 3e-2), adapter="prefix", eps=1e-1),
    "lora-adam": Method("LoRA, Adam (backpropagation)", adam, BACKPROPAGATION, (3e-4, 1e-3, 3e-3), adapter="lora"),
    "adam": Method("Adam (backpropagation)", adam, BACKPROPAGATION, (1e-5, 3e-5, 1e-4)),
}  # fmt: skip
