"""What the 32 threads of a warp exchange. All of them must take part, at the same place of the kernel."""

from __future__ import annotations

from typing import Any

import numpy as np

from .memory import Memory
from .parse import PtxError

u2, u4, i4, i8 = np.uint16, np.uint32, np.int32, np.int64


class Warps(Memory):
    def shuffle(self, mode: str, value: Any, lane: Any, clamp: int, T: Any, text: str) -> tuple[Any, Any]:
        """shfl.sync: another lane's value, and whether there is such a lane."""
        if clamp != 31 or mode not in ("bfly", "idx", "down"):
            raise PtxError(text)
        value = np.broadcast_to(value, T.shape)
        own = T & 31
        lane = np.broadcast_to(lane, T.shape).astype(i8)
        other = {"bfly": own ^ lane, "idx": lane & 31, "down": own + lane}[mode]
        inside = (other >= 0) & (other < 32)
        source = self._places_of(T, np.where(inside, (T & ~31) + other, T), text)
        return np.where(inside, value[source], value), inside

    def sum_of_warp(self, value: Any, mask: Any, T: Any, text: str) -> Any:
        """redux.sync.add."""
        if not np.all(np.asarray(mask) == 0xFFFFFFFF):
            raise PtxError(text)
        if (np.bincount(T >> 5) % 32).any():
            self.report.fault("warp", text, 1, "not all lanes are there")
        sums = np.zeros(self.grid * self.block + 31 >> 5, u4)
        np.add.at(sums, T >> 5, np.broadcast_to(value, T.shape))
        return sums[T >> 5]

    def matrices(
        self, address: Any, values: list[Any], transposed: bool, T: Any, text: str, load: bool = False
    ) -> list[Any]:
        """stmatrix and ldmatrix: 8x8 matrices of 16 bits; rows begin where lanes 8i to 8i+7 say, every lane has a pair."""
        address, own, result = np.broadcast_to(address, T.shape), T & 31, []
        if ((address & address.dtype.type(15)) != 0).any():
            self.report.fault("misaligned", text, 1, "a matrix's row")
        for i in range(len(values)):
            pieces = []
            for half in range(2 if transposed else 1):
                row, column = (2 * (own & 3) + half, own >> 2) if transposed else (own >> 2, 2 * (own & 3))
                at = address[self._places_of(T, (T & ~31) + 8 * i + row, text)] + (2 * column).astype(address.dtype)
                if load:
                    pieces.append(self.load("shared", at, 2 if transposed else 4, 1, None, T, text)[0])
                    continue
                value = np.broadcast_to(values[i], T.shape)
                value = (value >> u4(16 * half)).astype(u2) if transposed else value
                self.store("shared", at, 2 if transposed else 4, [value], None, T, text)
            if load:
                result.append(pieces[0].astype(u4) | (pieces[1].astype(u4) << u4(16)) if transposed else pieces[0])
        return result

    def _places_of(self, T: Any, wanted: Any, text: str) -> Any:
        """Where the threads with these numbers are in the group."""
        where = np.full(self.grid * self.block, -1, i4)
        where[T] = np.arange(len(T), dtype=i4)
        source = where[wanted]
        if (source < 0).any():
            self.report.fault("warp", text, (source < 0).sum(), "needs a thread of the warp that is not there")
        return np.maximum(source, 0)
