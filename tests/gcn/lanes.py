"""Instructions that take numbers from other lanes, or from a lane to a scalar register and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.parse import PtxError

from .operands import first_of, scalar
from .parse import Instruction
from .waves import LANES, Waves

Step = Callable[[Waves], None]
u4 = np.uint32
OWN = np.arange(LANES)


def first_lane(i: Instruction) -> Step:
    """v_readfirstlane_b32: of the first lane that works, of lane 0 where none does."""
    to, source = first_of(i.args[0], "s", 1), first_of(i.args[1], "v", 1)

    def step(w: Waves) -> None:
        lane = 0 if w.E is None else w.E.argmax(axis=1)
        w.put_scalar(to, w.V[source][np.arange(len(w.numbers)), lane])

    return step


def read_lane(i: Instruction) -> Step:
    """v_readlane_b32: of any lane, whether it works or not."""
    to, source, lane = first_of(i.args[0], "s", 1), first_of(i.args[1], "v", 1), scalar(i.args[2], "u")
    return lambda w: w.put_scalar(to, w.V[source][np.arange(len(w.numbers)), lane(w) & u4(63)])


def write_lane(i: Instruction) -> Step:
    to, value, lane = first_of(i.args[0], "v", 1), scalar(i.args[1], "u"), scalar(i.args[2], "u")

    def step(w: Waves) -> None:
        w.V[to][np.arange(len(w.numbers)), lane(w) & u4(63)] = value(w)

    return step


def from_lane(i: Instruction) -> Step:
    """v_mov_b32_dpp: another lane's. From where no lane is, or none that works, 0, or without bound_ctrl nothing. A row has
    16 lanes."""
    to, source = first_of(i.args[0], "v", 1), first_of(i.args[1], "v", 1)
    rows, banks = (int(i.modifiers.pop(name), 0) for name in ("row_mask", "bank_mask"))
    zeros = i.modifiers.pop("bound_ctrl", None)
    if banks != 0xF or zeros not in (None, "1") or len(i.modifiers) != 1:
        raise PtxError(i.text)
    other = _lanes_of_dpp(*i.modifiers.popitem())
    written, lanes = (rows >> (OWN >> 4) & 1).astype(bool), np.maximum(other, 0)

    def step(w: Waves) -> None:
        there = (other >= 0) & w.active[:, lanes]
        x = np.where(there, w.V[source][:, lanes], u4(0) if zeros else w.V[to])
        w.put(to, np.where(written, x, w.V[to]))

    return step


def _lanes_of_dpp(control: str, value: str) -> Any:
    """Which lane each reads, -1 for none."""
    row, own = OWN & ~15, OWN & 15
    if control == "quad_perm":
        return (OWN & ~3) + np.array([int(n) for n in value.strip("[]").split(",")])[OWN & 3]
    if control == "row_shr":
        return np.where(own >= int(value), OWN - int(value), -1)
    if control == "row_shl":
        return np.where(own + int(value) < 16, OWN + int(value), -1)
    if control == "row_ror":
        return row + (own - int(value) & 15)
    if (control, value) == ("row_bcast", "15"):
        return row - 1
    if (control, value) == ("row_bcast", "31"):
        return np.where(OWN < 32, -1, 31)
    raise PtxError(f"{control}:{value}")
