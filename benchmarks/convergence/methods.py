"""The methods of run.py: how each is built, what a step of it costs, and which settings are tried."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import zokern

Settings = dict[str, Any]
BACKPROPAGATION = 3  # forwards that one forward and backward count as


@dataclass
class Method:
    """A way to build an optimizer, and what a step of it costs.

    settings: beside lr, eps and seed. trials: other settings, tried at the best size of `settings` and at the one below.
    """

    label: str
    build: Callable[..., Any]
    forwards: int
    settings: Settings = field(default_factory=dict)
    trials: list[Settings] = field(default_factory=list)
    sign: float = 1.0  # of the closure's value: ES maximises


def lezo(model: torch.nn.Module, share: float, **options: Any) -> Any:
    blocks = len(zokern.layers.find_blocks(model))
    return zokern.LeZO(model, num_dropped=round(share * blocks), **options)


def low_rank(model: torch.nn.Module, rank: int, method: Callable[..., Any] = zokern.MeZO, **options: Any) -> Any:
    return method(model, distribution=zokern.LowRank(rank), placement="forward", **options)


def adam(model: torch.nn.Module, lr: float, eps: float, seed: int) -> torch.optim.Adam:
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)


ES_N = 8
ES = {"num_directions": ES_N, "antithetic": True, "maximize": True}
METHODS: dict[str, Method] = {
    "mezo": Method("MeZO", zokern.MeZO, 2),
    "mezo-onesided": Method("MeZO, one-sided, n=4", zokern.MeZO, 5, {"num_samples": 4, "one_sided": True}),
    "lezo": Method("LeZO", lezo, 2, {"share": 0.7}),
    "hizoo": Method("HiZOO", zokern.HiZOO, 3, {"smoothing": 1e-6}, [{"smoothing": 1e-8}, {"smoothing": 1e-4}]),
    "helene": Method("HELENE", zokern.HELENE, 2, {"floor": 1.0}, [{"floor": 30.0}, {"floor": 1e3}]),
    "mezo-gv": Method("MeZO-GV", zokern.MeZOGV, 6),
    "mezo-greedy": Method("MeZO-Greedy", zokern.MeZOGreedy, 5),
    "fzoo": Method("FZOO", zokern.FZOO, 9),
    "es": Method(f"ES, N={ES_N} antithetic", zokern.ES, 2 * ES_N, ES, sign=-1.0),
    "mezo-momentum": Method("MeZO, momentum", zokern.MeZO, 2, {"update": "momentum"}),
    "mezo-adam": Method("MeZO, Adam", zokern.MeZO, 2, {"update": "adam"}),
    "mezo-adamezo": Method("MeZO, AdaMeZO", zokern.MeZO, 2, {"update": "adamezo"}),
    "mezo-sign": Method("MeZO, sign", zokern.MeZO, 2, {"update": "sign"}),
    "mezo-rademacher": Method("MeZO along signs", zokern.MeZO, 2, {"distribution": "rademacher"}),
    "lowrank": Method("MeZO along rank 1, folded every 8", low_rank, 2, {"rank": 1, "fold_every": 8}),
    "lowrank-onesided": Method(
        "MeZO, one-sided, n=4, rank 1", low_rank, 5, {"rank": 1, "num_samples": 4, "one_sided": True}
    ),
    "lowrank-es": Method(
        f"ES, N={ES_N} antithetic, rank 1",
        functools.partial(low_rank, method=zokern.ES),
        2 * ES_N,
        {"rank": 1, **ES},
        sign=-1.0,
    ),
    "adam": Method("Adam (backpropagation)", adam, BACKPROPAGATION),
}
