"""The kernel benchmarks as data: which passes are timed under which name. Nothing heavy is imported: --help reads this.

A case is one pass with all that decides what its kernel does. Weights round to nearest except in `stochastic`; a
bfloat16 state always rounds stochastically. Peers are the same everywhere: peers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of an element
DTYPES = tuple(SIZES)
DEFAULT_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Case:
    """One sweep over a model. seeds: directions of a pass; left_out: share of the blocks that it skips.

    stages: passes that the sweep does in registers, each with seeds of its own; fork: the last of them, a perturbation,
    goes to other storage, rounded to nearest.
    """

    label: str
    rule: str
    dtype: str
    seeds: int = 1
    distribution: str = "normal"
    rounding: str = "nearest"
    state_dtype: str = "float32"
    left_out: float = 0.0
    stages: int = 1
    fork: bool = False

    @property
    def title(self) -> str:
        return f"{self.label}, {self.dtype}"

    @property
    def apart(self) -> str:
        """How ours is called where what the sweep does is done one by one; empty where it does one thing."""
        if self.stages > 1:
            return "a sweep a pass"
        return "a pass a seed" if self.seeds > 1 else ""

    @property
    def stochastic_stages(self) -> int:
        """How many of its passes round the weights stochastically."""
        return self.stages - self.fork if self.rounding == "stochastic" else 0


def is_ours(label: str) -> bool:
    """Whether a way of a case is one sweep of ours: "zokern cpu", and not "zokern cpu, a pass a seed"."""
    return label.startswith("zokern") and "," not in label


@dataclass(frozen=True)
class Benchmark:
    """`about`: one line for `zokern bench list`; `cases`: of a dtype, none where there is nothing to time."""

    about: str
    cases: Callable[[str], list[Case]]


def _stochastic(dtype: str) -> str:
    return "stochastic" if SIZES[dtype] == 2 else "nearest"  # float32 has nothing to round


BENCHMARKS = {
    "axpy": Benchmark(
        "w + sum_k c_k z_k: MeZO's perturbation and update, for K = 1, 2, 4, 16 seeds",
        lambda dtype: [Case(f"axpy, K = {k}", "axpy", dtype, seeds=k) for k in (1, 2, 4, 16)],
    ),
    "rademacher": Benchmark(
        "the same with random signs for z, one seed: FZOO",
        lambda dtype: [Case("axpy, Rademacher", "axpy", dtype, distribution="rademacher")],
    ),
    "stochastic": Benchmark(
        "the same rounded stochastically, one seed; 16-bit weights only",
        lambda dtype: [Case("axpy, stochastic rounding", "axpy", dtype, rounding="stochastic")] * (SIZES[dtype] == 2),
    ),
    "hizoo": Benchmark(
        "HiZOO's perturbation, update, and restore with update; h in float32 and bfloat16",
        lambda dtype: [
            Case(f"HiZOO {label}, h {state}", rule, dtype, state_dtype=state)
            for rule, label in (
                ("scaled_axpy", "perturb"),
                ("hizoo", "update"),
                ("hizoo_restore", "restore and update"),
            )
            for state in ("float32", "bfloat16")
        ],
    ),
    "helene": Benchmark(
        "HELENE's update of m, h and the weights", lambda dtype: [Case("HELENE update", "helene", dtype)]
    ),
    "layers": Benchmark(
        "LeZO: axpy with 0, 25, 50 and 75 % of the blocks left out",
        lambda dtype: [
            Case(f"axpy, {share:.0%} of the blocks left out", "axpy", dtype, left_out=share)
            for share in (0.0, 0.25, 0.5, 0.75)
        ],
    ),
    "chain": Benchmark(
        "several passes in one sweep, against a sweep each: pipelined steps, and replay",
        lambda dtype: [
            Case("update and next perturbation", "axpy", dtype, rounding=_stochastic(dtype), stages=2, fork=True),
            Case("replay of 8 updates", "axpy", dtype, rounding=_stochastic(dtype), stages=8),
        ],
    ),
}


def cases_of(names: Iterable[str], dtypes: Iterable[str]) -> list[Case]:
    """All that benchmarks time for some dtypes."""
    return [case for name in names for dtype in dtypes for case in BENCHMARKS[name].cases(dtype)]
