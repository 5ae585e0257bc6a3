"""The kernel benchmarks as data: which passes are timed under which name. Nothing heavy is imported: --help reads this.

A case is one pass with all that decides what its kernel does. Weights round to nearest except in `stochastic`; a
bfloat16 state always rounds stochastically. Peers are the same everywhere: peers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of an element
DTYPES = tuple(SIZES)
DEFAULT_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Case:
    """One pass over a model. seeds: how many directions; left_out: share of the blocks that it skips."""

    label: str
    rule: str
    dtype: str
    seeds: int = 1
    distribution: str = "normal"
    rounding: str = "nearest"
    state_dtype: str = "float32"
    left_out: float = 0.0

    @property
    def title(self) -> str:
        return f"{self.label}, {self.dtype}"


@dataclass(frozen=True)
class Benchmark:
    """`about`: one line for `zokern bench list`."""

    name: str
    about: str
    cases: Callable[[str], list[Case]]


def _axpy(dtype: str) -> list[Case]:
    return [Case(f"axpy, K = {k}", "axpy", dtype, seeds=k) for k in (1, 2, 4, 16)]


def _rademacher(dtype: str) -> list[Case]:
    return [Case("axpy, Rademacher", "axpy", dtype, distribution="rademacher")]


def _stochastic(dtype: str) -> list[Case]:
    if SIZES[dtype] != 2:
        return []  # float32 has nothing to round
    return [Case("axpy, stochastic rounding", "axpy", dtype, rounding="stochastic")]


def _hizoo(dtype: str) -> list[Case]:
    labels = {"scaled_axpy": "perturb", "hizoo": "update", "hizoo_restore": "restore and update"}
    return [
        Case(f"HiZOO {label}, h {state}", rule, dtype, state_dtype=state)
        for rule, label in labels.items()
        for state in ("float32", "bfloat16")
    ]


def _helene(dtype: str) -> list[Case]:
    return [Case("HELENE update", "helene", dtype)]


def _layers(dtype: str) -> list[Case]:
    return [
        Case(f"axpy, {share:.0%} of the blocks left out", "axpy", dtype, left_out=share)
        for share in (0.0, 0.25, 0.5, 0.75)
    ]


BENCHMARKS = {
    b.name: b
    for b in (
        Benchmark("axpy", "w + sum_k c_k z_k: MeZO's perturbation and update, for K = 1, 2, 4, 16 seeds", _axpy),
        Benchmark("rademacher", "the same with random signs for z, one seed: FZOO", _rademacher),
        Benchmark("stochastic", "the same rounded stochastically, one seed; 16-bit weights only", _stochastic),
        Benchmark("hizoo", "HiZOO's perturbation, update, and restore with update; h in float32 and bfloat16", _hizoo),
        Benchmark("helene", "HELENE's update of m, h and the weights", _helene),
        Benchmark("layers", "LeZO: axpy with 0, 25, 50 and 75 % of the blocks left out", _layers),
    )
}
