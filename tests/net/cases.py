"""Which runs the net has: every method with every placement, dtype and rounding, and what else can happen to a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

import zokern

METHODS: dict[str, tuple[type, dict[str, Any]]] = {
    "mezo": (zokern.MeZO, {"weight_decay": 0.1}),
    "mezo-samples": (zokern.MeZO, {"num_samples": 3, "distribution": "rademacher"}),
    "mezo-one-sided": (zokern.MeZO, {"num_samples": 2, "one_sided": True}),
    "mezo-momentum": (zokern.MeZO, {"update": "momentum", "weight_decay": 0.1}),
    "mezo-adam": (zokern.MeZO, {"update": "adam", "num_samples": 2}),
    "mezo-adamezo": (zokern.MeZO, {"update": "adamezo", "horizon": 3}),
    "mezo-sign": (zokern.MeZO, {"update": "sign"}),
    "lezo": (zokern.LeZO, {"num_dropped": 1}),
    "lezo-adam": (zokern.LeZO, {"num_dropped": 1, "update": "adam"}),
    "lezo-adamezo": (zokern.LeZO, {"num_dropped": 2, "update": "adamezo"}),
    "hizoo": (zokern.HiZOO, {"smoothing": 1e-2, "weight_decay": 0.1}),
    "hizoo-bfloat16": (zokern.HiZOO, {"smoothing": 0.1, "num_samples": 2, "curvature_dtype": torch.bfloat16}),
    "helene": (zokern.HELENE, {"hessian_interval": 2, "num_samples": 2}),
    "helene-by-layer": (zokern.HELENE, {"hessian_interval": 3, "floor": zokern.ByLayer(2.0), "weight_decay": 0.1}),
    "gv": (zokern.MeZOGV, {"candidates": 4}),
    "gv-curvature": (zokern.MeZOGV, {"candidates": 3, "smoothing": 0.1}),
    "greedy": (zokern.MeZOGreedy, {"candidates": 3}),
    "greedy-curvature": (zokern.MeZOGreedy, {"candidates": 3, "smoothing": 0.1}),
    "fzoo": (zokern.FZOO, {"candidates": 3}),
    "es": (zokern.ES, {"num_directions": 4, "maximize": True}),
    "es-antithetic": (zokern.ES, {"num_directions": 3, "antithetic": True, "shaping": "ranked"}),
}
LOW_RANK = {  # with a few cases each
    "mezo-lowrank": (zokern.MeZO, {"weight_decay": 0.1, "num_samples": 2, "distribution": "lowrank:1"}),
    "mezo-adam-lowrank": (zokern.MeZO, {"update": "adam", "distribution": "lowrank:2"}),
    "mezo-adamezo-lowrank": (zokern.MeZO, {"update": "adamezo", "horizon": 3, "distribution": "lowrank:2"}),
    "lezo-lowrank": (zokern.LeZO, {"num_dropped": 1, "distribution": "lowrank:1"}),
    "hizoo-lowrank": (zokern.HiZOO, {"smoothing": 1e-2, "num_samples": 2, "distribution": "lowrank:2"}),
    "helene-lowrank": (zokern.HELENE, {"hessian_interval": 2, "num_samples": 2, "distribution": "lowrank:1"}),
    "gv-lowrank": (zokern.MeZOGV, {"candidates": 3, "smoothing": 0.1, "distribution": "lowrank:1"}),
    "fzoo-lowrank": (zokern.FZOO, {"candidates": 3, "distribution": "lowrank:1"}),
    "es-lowrank": (zokern.ES, {"num_directions": 3, "antithetic": True, "distribution": "lowrank:2"}),
}
FOLDS = {  # updates that wait, with placement="forward"
    "mezo-folds": (
        zokern.MeZO, {"weight_decay": 0.1, "num_samples": 2, "distribution": "lowrank:2", "fold_every": 3},
    ),
    "fzoo-folds": (zokern.FZOO, {"candidates": 3, "distribution": "lowrank:1", "fold_every": 2}),
}  # fmt: skip
ALL = METHODS | LOW_RANK | FOLDS
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STEPS = 4


@dataclass(frozen=True)
class Case:
    """what: "plain", or what else happens to the run (runs.py)."""

    method: str
    placement: str
    dtype: str
    rounding: str = "auto"
    what: str = "plain"
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.method, self.placement, self.dtype, self.rounding, self.what])


def every() -> list[Case]:
    found = [
        Case(method, placement, dtype, rounding)
        for method in METHODS
        for placement in ("inplace", "shadow", "stream")
        for dtype, roundings in (
            ("float32", ["auto"]),
            ("float16", ["auto", "nearest"]),
            ("bfloat16", ["auto", "nearest"]),
        )
        for rounding in roundings
    ]
    exact = ("shadow", "stream")
    for method in METHODS:
        found += [Case(method, p, d, what="pipelined", settings={"pipelined": True}) for p in exact for d in DTYPES]
        found += [Case(method, p, d, what=what) for p, d in (("inplace", "float32"), ("stream", "bfloat16"))
                  for what in ("resumed", "skipped", "broken", "groups", "saved")]  # fmt: skip
        found.append(Case(method, "shadow", "float16", what="batches"))
    found += [Case("mezo", p, "float32", "stochastic") for p in ("inplace", "shadow", "stream")]
    found += [Case("helene", p, d, what="vector") for p in ("inplace", "stream") for d in DTYPES]
    for method in LOW_RANK:
        found += [Case(method, p, d) for p, d in (("inplace", "float32"), ("shadow", "float16"))]
        found += [Case(method, "stream", "bfloat16", what=what) for what in ("resumed", "skipped", "broken", "saved")]
        found.append(Case(method, "shadow", "bfloat16", what="pipelined", settings={"pipelined": True}))
    for method in FOLDS:
        found += [Case(method, "forward", d, what=what) for d, what in (
            ("float32", "plain"), ("bfloat16", "plain"), ("float16", "resumed"), ("bfloat16", "skipped"),
            ("float32", "broken"), ("bfloat16", "saved"), ("float32", "groups"), ("bfloat16", "by-hand"))]  # fmt: skip
    return found
