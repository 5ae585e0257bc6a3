"""Bytes that two threads touch, one of them writing, with no barrier of their block between."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .faults import Report

Array = npt.NDArray[np.integer]
i4 = np.int32
MANY = -1


class Races:
    """Who wrote and who read last, for every two bytes, and after how many barriers of its block.

    Who: a thread's number + 1, -2 - b for several threads of block b, MANY for several of several blocks, 0 for nobody.
    """

    def __init__(self, size: int, grid: int, block: int, report: Report) -> None:
        self._block, self._report = block, report
        self.barriers = np.zeros(grid, i4)
        self._written, self._read = np.zeros(size // 2, i4), np.zeros(size // 2, i4)
        self._written_at, self._read_at = np.zeros(size // 2, i4), np.zeros(size // 2, i4)

    def load(self, position: Array, size: int, count: int, T: Array, text: str, everybody: Array) -> None:
        """Looks for earlier writes of others. One load may serve `everybody` where all have one address."""
        me = (T + 1).astype(i4)
        block = T // self._block
        many = len(everybody) > len(T)
        if many:
            blocks = everybody // self._block
            me = np.full(1, -2 - blocks[0] if (blocks == blocks[0]).all() else MANY, i4)
        for g in _granules(position, size, count):
            writer = self._written[g]
            bad = self._unordered(writer, self._written_at[g], me, T)
            if bad.any():
                self._conflict(text, "reads what another wrote", bad, writer, T)
            reader = self._read[g]
            new = (reader == 0) | (reader == me)
            keep = me
            if not new.all():
                theirs = np.where(reader > 0, (reader - 1) // self._block, -2 - reader)
                same = theirs == block
                new |= same & (self._read_at[g] != self.barriers[block])
                keep = np.where(new, me, np.where(same, -2 - block, MANY)).astype(i4)
            self._read[g] = keep
            self._read_at[g] = self.barriers[block]
            if not many:
                again = self._read[g] != keep  # two threads in one access
                if again.any():
                    at = g[again]
                    same = (self._read[at] - 1) // self._block == block[again]
                    self._read[at] = np.where(same, -2 - block[again], MANY)

    def store(self, position: Array, size: int, count: int, T: Array, text: str, equal: bool) -> None:
        """equal: threads that meet at one place write one value there, which does no harm."""
        me = (T + 1).astype(i4)
        for g in _granules(position, size, count):
            writer, reader = self._written[g], self._read[g]
            bad = self._unordered(writer, self._written_at[g], me, T)
            if bad.any():
                self._conflict(text, "writes what another wrote", bad, writer, T)
            bad = self._unordered(reader, self._read_at[g], me, T)
            if bad.any():
                self._conflict(text, "writes what another read", bad, reader, T)
            self._written[g] = me
            self._written_at[g] = self.barriers[T // self._block]
            again = self._written[g]
            if not equal and (again != me).any():
                self._conflict(text, "writes what another wrote", again != me, again, T)

    def atomic(self, position: Array, size: int, T: Array, text: str) -> None:
        for g in _granules(position, size, 1):
            writer = self._written[g]
            if (writer > 0).any():
                self._conflict(text, "atomic on what another writes", writer > 0, writer, T)

    def _unordered(self, other: Array, at: Array, me: Array, T: Array) -> npt.NDArray[np.bool_]:
        """Where `other`, after `at` barriers, is not me nor before a barrier of my block."""
        bad = (other != 0) & (other != me)
        if bad.any():
            block = T // self._block
            theirs = np.where(other > 0, (other - 1) // self._block, -2 - other)
            bad &= (theirs != block) | (at == self.barriers[block])
        return bad

    def _conflict(self, text: str, kind: str, bad: npt.NDArray[np.bool_], other: Array, T: Array) -> None:
        at = int(np.flatnonzero(bad)[0])
        number = int(other[at])
        who = thread_name(number - 1, self._block) if number > 0 else "several threads"
        self._report.fault("race", f"{kind}: {text}", bad.sum(), f"{thread_name(int(T[at]), self._block)} and {who}")


def thread_name(thread: int, block: int) -> str:
    return f"thread {thread % block} of block {thread // block}"


def _granules(position: Array, size: int, count: int) -> list[Array]:
    first = position >> 1
    return [first + i for i in range(max(size * count // 2, 1))]
