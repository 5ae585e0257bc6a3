"""Directions: how z(seed) is distributed. One object each, and the name by which state_dicts and journals know it.

    zokern.MeZO(model, lr, distribution=zokern.Rademacher())      or distribution="rademacher"

Every direction has mean 0, variance 1 and uncorrelated elements, and is a pure function of (seed, tensor id, element's
global index): docs/noise.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


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


DIRECTIONS: dict[str, Direction] = {direction.name: direction for direction in (Normal(), Rademacher())}


def parse(value: object, name: str = "distribution") -> Direction:
    """The direction that `value` is or names.

    Raises:
        ValueError: for anything else, naming the argument `name` and what there is.
    """
    if isinstance(value, Direction) and value in DIRECTIONS.values():
        return value
    if isinstance(value, str) and value in DIRECTIONS:
        return DIRECTIONS[value]
    made = ", ".join(f"zokern.{type(d).__name__}()" for d in DIRECTIONS.values())
    raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, DIRECTIONS))}, or {made}")
