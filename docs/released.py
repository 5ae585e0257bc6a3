"""Settings of released code, and the arguments with which our steps are its steps.

Every row was read in the file and commit that it names. tests/optim/test_released.py runs both sides of each against one
another, and docs/from_code.py makes the pages' tables of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

from benchmarks.parts import table


@dataclass(frozen=True)
class Recipe:
    """code: the settings, as they are called there. ours: the constructor's. named: those by the released code's
    convention, where it has one of its own. steps: the file that has the step, where the settings are in another."""

    page: str
    what: str
    code: Mapping[str, Any]
    cls: str
    ours: Mapping[str, Any]
    settings: str
    steps: str
    named: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


def fzoo(lr: float, eps: float, n: int) -> dict[str, Any]:
    """No 1/eps, and s with 1/N: lr / (N s) = ours / (eps N s'), and s' with 1/(N - 1) is s sqrt(N / (N - 1))."""
    common = {"eps": eps, "candidates": n}
    return {
        "code": {"LR": lr, "EPS": eps, "FORWARD_N": n},
        "ours": {"lr": lr * eps * sqrt(n / (n - 1)), **common},
        "named": {"scale": "released", "lr": lr, **common},
    }


def es(sigma: float, alpha: float, n: int) -> dict[str, Any]:
    """No 1/sigma: alpha / N = ours / (N sigma)."""
    common = {"maximize": True, "eps": sigma, "num_directions": n}
    return {
        "code": {"sigma": sigma, "alpha": alpha, "population_size": n},
        "ours": {"lr": alpha * sigma, **common},
        "named": {"scale": "released", "lr": alpha, **common},
    }


def adamezo(lr: float, window: int, beta1: float, beta2: float) -> dict[str, Any]:
    """100 G / sqrt(H), G and H sums: ours has (1 - b1) G / sqrt((1 - b2) H)."""
    common = {"update": "adamezo", "horizon": window, "betas": (beta1, beta2), "delta": 1e-10}
    return {
        "code": {"LR": lr, "HESS_WINDOW": window, "BETA1": beta1, "BETA2": beta2},
        "ours": {"lr": 100 * lr * sqrt(1 - beta2) / (1 - beta1), **common},
        "named": {"scale": "released", "lr": lr, **common},
    }


MEZO, HIZOO, GV = "princeton-nlp/MeZO", "Yanjun-Zhao/HiZOO", "stan-anony/MeZO-GV"
RECIPES = (
    *(
        Recipe(
            "mezo", what, {"LR": lr, "EPS": eps}, "MeZO", {"lr": lr, "eps": eps},
            f"{MEZO} large_models/README.md 032e5e1", f"{MEZO} large_models/trainer.py 7b2471e",
        )
        for what, lr, eps in (
            ("OPT-13B, all parameters", 1e-7, 1e-3), ("OPT-13B, prefix", 1e-3, 1e-1), ("OPT-13B, LoRA", 5e-5, 1e-2)
        )
    ),
    Recipe(
        "mezo", "default of the script", {"LR": 1e-5, "EPS": 1e-3}, "MeZO", {"lr": 1e-5, "eps": 1e-3},
        f"{MEZO} large_models/mezo.sh a0966b5", f"{MEZO} large_models/trainer.py 7b2471e",
    ),
    Recipe(
        "mezo", "AdaMeZO, OPT-1.3B, SST-2", cls="MeZO", **adamezo(1e-7, 10, 0.7, 0.9),
        settings="shawnnn3di/AdaMeZO README.md 4412153",
        steps="shawnnn3di/AdaMeZO MeZO/medium_models/src/trainer.py a1d160f",
        note="from step 11 on; the steps before are plain there, with LR, and `scale` has them too",
    ),
    Recipe(
        "hizoo", "OPT-13B, WSC", {"LR": 1e-6, "EPS": 1e-3, "HESSIAN_SMOOTH_TYPE": "constant1e-8"}, "HiZOO",
        {"lr": 1e-6, "eps": 1e-3, "smoothing": 1e-8},
        f"{HIZOO} README.md 3113cee", f"{HIZOO} trainer.py 3113cee",
    ),
    Recipe(
        "hizoo", "default of the script: h stays at 1",
        {"LR": 1e-5, "EPS": 1e-3, "HESSIAN_SMOOTH_TYPE": "constant0"}, "HiZOO",
        {"lr": 1e-5, "eps": 1e-3, "smoothing": 0.0},
        f"{HIZOO} HiZOO.sh 7b42d1d", f"{HIZOO} trainer.py 3113cee",
    ),
    Recipe(
        "mezo-gv", "default trainer, repaired; OPT-13B, SST-2", {"LR": 2e-7, "EPS": 1e-3, "M": 2}, "MeZOGV",
        {"lr": 2e-7, "eps": 1e-3, "candidates": 2, "keep_best": True},
        f"{GV} README.md 70a2551", f"{GV} large_models/trainer.py 33c2d3f",
    ),
    Recipe(
        "mezo-gv", "the paper's vector, repaired; default of the script",
        {"LR": 1e-6, "EPS": 1e-3, "M": 2, "split_ratio": 0.5}, "MeZOGV",
        {"lr": 1e-6, "eps": 1e-3, "candidates": 2, "elite": 0.5},
        f"{GV} large_models/mezo.sh 33c2d3f", f"{GV} large_models/trainer_fwa_mem_eff.py 33c2d3f",
    ),
    Recipe(
        "mezo-greedy", "default of the script", {"LR": 1e-6, "EPS": 1e-3, "M": 2}, "MeZOGreedy",
        {"lr": 1e-6, "eps": 1e-3, "candidates": 2},
        f"{GV} large_models/mezo.sh 33c2d3f", f"{GV} large_models/trainer_fwa.py 33c2d3f",
    ),
    Recipe(
        "fzoo", "OPT-13B, WSC", cls="FZOO", **fzoo(5e-5, 1e-4, 8),
        settings="DKmiyan/FZOO README.md db86ec7", steps="DKmiyan/FZOO trainer.py d7d50ed",
    ),
    Recipe(
        "fzoo", "default of the script", cls="FZOO", **fzoo(1e-5, 1e-3, 8),
        settings="DKmiyan/FZOO fzoo.sh d7d50ed", steps="DKmiyan/FZOO trainer.py d7d50ed",
    ),
    Recipe(
        "es", "Countdown and Math: alpha = sigma / 2", cls="ES", **es(1e-3, 5e-4, 30),
        settings="VsonicV/es-at-scale README.md 2767802",
        steps="VsonicV/es-fine-tuning-paper es_at_scale/utils/worker_extension.py d1e3d76",
    ),
)  # fmt: skip


def released(page: str) -> str:
    """A page's table."""
    rows = []
    for one in RECIPES:
        if one.page == page:
            here = [_call(one.cls, one.ours), *([f"`{_arguments(one.named)}`"] if one.named else [])]
            sources = dict.fromkeys((_source(one.settings), _source(one.steps)))
            rows.append((
                one.what, ", ".join(f"`{name}={_shown(value)}`" for name, value in one.code.items()),
                " or ".join(here) + (f" ({one.note})" if one.note else ""), ", ".join(sources),
            ))  # fmt: skip
    return table(("released setting", "there", "the same steps here", "file and commit (settings, step)"), rows)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))})"
    return f"{value:.4g}" if isinstance(value, float) else repr(value) if isinstance(value, str) else str(value)


def _arguments(named: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_shown(value)}" for name, value in named.items())


def _call(cls: str, named: Mapping[str, Any]) -> str:
    return f"`{cls}(model, {_arguments(named)})`"


def _source(text: str) -> str:
    repository, file, commit = text.split()
    return f"[{file}](https://github.com/{repository}/blob/{commit}/{file}) {commit}"
