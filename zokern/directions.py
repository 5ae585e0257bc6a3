"""Directions: how z(seed) is distributed. One object each, and the name by which state_dicts and journals know it.

    zokern.MeZO(model, lr, distribution=zokern.Rademacher())      or distribution="rademacher"

Every direction has mean 0, variance 1 and uncorrelated elements, and is a pure function of (seed, tensor id, element's
global index): docs/noise.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zokern import _checks
from zokern.contract.streams import DISTRIBUTIONS, MAX_RANK, rank_of


@dataclass(frozen=True)
class Direction:
    """Base class. `name` is what is stored."""

    name: ClassVar[str]


@dataclass(frozen=True)
class Normal(Direction):
    """Independent standard normals, N(0, 1)."""

    name = "normal"


@dataclass(frozen=True)
class Rademacher(Direction):
    """Independent random signs, +1 and -1 with equal probability."""

    name = "rademacher"


@dataclass(frozen=True)
class LowRank(Direction):
    """z = U V^T / sqrt(rank) for each matrix [m, n], U [m, rank] and V [n, rank] of independent standard normals.

    Elements have mean 0 and variance 1 and are uncorrelated, as those of `Normal`, so to first order an estimate along z
    tells as much. A 3-D tensor is a stack of matrices. Tensors of other dimensions, and matrices whose smaller side is not
    above the rank, take the noise of `Normal`. Its name is "lowrank:4" for rank 4. Bits: docs/noise.md. Sources: LOZO
    (arXiv 2410.07698), EGGROLL (arXiv 2511.16652).

    Raises:
        TypeError, ValueError: for a rank that is not an integer from 1 to 65536.
    """

    rank: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", _checks.check_integer(self.rank, "rank", 1, MAX_RANK))

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"lowrank:{self.rank}"


DIRECTIONS: dict[str, Direction] = {direction.name: direction for direction in (Normal(), Rademacher())}
SPELT = (*DISTRIBUTIONS, "lowrank:1")  # as a user writes them; of any rank


def rank(direction: Direction) -> int:
    """Of a direction of low rank; 0 for the others."""
    return direction.rank if isinstance(direction, LowRank) else 0


def parse(value: object, name: str = "distribution") -> Direction:
    """The direction that `value` is or names.

    Raises:
        ValueError: for anything else, naming the argument `name` and what there is.
    """
    if isinstance(value, Direction) and (value in DIRECTIONS.values() or type(value) is LowRank):
        return value
    if isinstance(value, str):
        if value in DIRECTIONS:
            return DIRECTIONS[value]
        try:
            return LowRank(rank_of(value))
        except ValueError:
            pass  # told below, under the argument's name
    made = ", ".join(f"zokern.{type(d).__name__}({rank(d) or ''})" for d in (*DIRECTIONS.values(), LowRank()))
    raise ValueError(
        f"{name} is {value!r}; it must be one of {', '.join(map(repr, SPELT))}, 1 being any rank up to {MAX_RANK}, or "
        f"{made}"
    )
