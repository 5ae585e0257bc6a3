"""The registers of waves that are at the same place of a kernel.

Scalar registers are [128, waves], numbered as the hardware numbers them; vector registers [n, waves, 64]. A mask of lanes
is a pair of scalar registers, lane 0 in the lowest bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.ptx.parse import PtxError

LANES = 64
VCC, M0, EXEC = 106, 124, 126
UNKNOWN = 2  # of SCC, after what leaves it in a state that nobody should ask for
u1, u4, u8, i4 = np.uint8, np.uint32, np.uint64, np.int32


def pair(registers: Any, i: int) -> Any:
    """Two registers as one of 64 bits, the low half first."""
    return registers[i].astype(u8) | registers[i + 1].astype(u8) << u8(32)


def halves(x: Any) -> tuple[Any, Any]:
    x = np.asarray(x).view(u8)
    return (x & u8(0xFFFFFFFF)).astype(u4), (x >> u8(32)).astype(u4)


def lanes_of(mask: Any) -> Any:
    """64 bits for each wave as [waves, 64] bool."""
    return np.unpackbits(np.ascontiguousarray(mask).view(u1).reshape(-1, 8), axis=1, bitorder="little").view(bool)


def mask_of(lanes: Any) -> Any:
    return np.ascontiguousarray(np.packbits(lanes, axis=1, bitorder="little")).view(u8)[:, 0]


def bits(x: Any) -> Any:
    """32-bit numbers as what a register holds."""
    return x if x.dtype == u4 else x.view(u4)


class Waves:
    """numbers: of the waves, threads: of their lanes, counted over all blocks; at: the block of the kernel that is next."""

    def __init__(self, numbers: Any, scalars: Any, vectors: Any, scc: Any, at: int = 0, waiting: bool = False) -> None:
        self.numbers, self.S, self.V, self.scc = numbers, scalars, vectors, scc
        self.at, self.waiting = at, waiting
        self.threads = (numbers[:, None] * i4(LANES) + np.arange(LANES, dtype=i4)).reshape(-1)
        self.set_lanes()

    def set_lanes(self) -> None:
        """After a change of EXEC. E: which lanes work, None where all do."""
        active = lanes_of(pair(self.S, EXEC))
        self.E = None if active.all() else active

    @property
    def active(self) -> Any:
        return np.ones((len(self.numbers), LANES), bool) if self.E is None else self.E

    def put(self, i: int, x: Any) -> None:
        """A vector register, of the lanes that work."""
        if self.E is None:
            self.V[i] = bits(x)
        else:
            np.copyto(self.V[i], bits(x), where=self.E)

    def put_pair(self, i: int, x: Any) -> None:
        low, high = halves(x)
        self.put(i, low)
        self.put(i + 1, high)

    def put_mask(self, i: int, lanes: Any) -> None:
        """A mask; lanes that do not work have no bit in it."""
        lanes = np.broadcast_to(lanes, (len(self.numbers), LANES))
        self.put_scalars(i, mask_of(lanes if self.E is None else lanes & self.E))

    def put_scalar(self, i: int, x: Any) -> None:
        self.S[i] = x
        if i in (EXEC, EXEC + 1):
            self.set_lanes()

    def put_scalars(self, i: int, x: Any) -> None:
        self.S[i], self.S[i + 1] = halves(x)
        if i == EXEC:
            self.set_lanes()

    def condition(self) -> Any:
        """SCC, [waves] bool."""
        if (self.scc == UNKNOWN).any():
            raise PtxError("SCC is asked for after an instruction that is not known to set it")
        return self.scc.view(bool)

    def some(self, which: Any, at: int) -> Waves:
        return Waves(self.numbers[which], self.S[:, which], self.V[:, which], self.scc[which], at)

    @classmethod
    def together(cls, groups: list[Waves]) -> Waves:
        if len(groups) == 1:
            return groups[0]
        return cls(
            np.concatenate([g.numbers for g in groups]),
            np.concatenate([g.S for g in groups], axis=1),
            np.concatenate([g.V for g in groups], axis=1),
            np.concatenate([g.scc for g in groups]),
            groups[0].at,
        )
