"""Copies of the memory that a launch may touch, and the checks of each access.

Addresses are those of the host's tensors. Shared memory, local memory and the parameters lie below all of them, where no
process has memory of its own; a block or a thread has a copy of its own there.
"""

from __future__ import annotations

import bisect
import ctypes
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from .faults import Report
from .parse import PtxError
from .races import Races, thread_name

u1, u2, u4, u8, i8 = np.uint8, np.uint16, np.uint32, np.uint64, np.int64
TYPES = {1: u1, 2: u2, 4: u4, 8: u8}
SHIFT = {1: 0, 2: 1, 4: 2, 8: 3}
WRITTEN = {1: 0x01, 2: 0x0101, 4: 0x01010101, 8: 0x0101010101010101}  # every byte of an element
SHARED, LOCAL, PARAMS, TENSORS = 1 << 20, 2 << 20, 3 << 20, 4 << 20
GUARD = 64
GARBAGE = 0xA5A5A5A5A5A5A5A5  # what a refused load gives
OF_SHARED, OF_LOCAL, OF_PARAMS = range(3)  # numbers of the machine's own regions


@dataclass
class Allocation:
    """Bytes that a kernel may touch: host memory, or the machine's own with its contents."""

    name: str
    address: int
    size: int
    writable: bool = True
    initialised: bool = True
    data: bytes | None = None


class Memory:
    """Of `grid` blocks of `block` threads. T are the numbers of the threads that access it, counted over all blocks."""

    def __init__(
        self, grid: int, block: int, shared: int, local: int, arguments: bytes, allocations: list[Allocation]
    ) -> None:
        self.grid, self.block, self.report = grid, block, Report()
        self._own_bytes = [-(-shared // 64) * 64, -(-local // 64) * 64]
        given = sorted(allocations, key=lambda a: a.address)
        for a, b in itertools.pairwise(given):
            if a.address + a.size > b.address:
                raise PtxError(f"{a.name} and {b.name} overlap")
        if given and given[0].address < TENSORS:
            raise PtxError(f"{given[0].name} lies at {given[0].address:#x}, where the interpreter keeps its own memory")
        if max(*self._own_bytes, len(arguments)) > LOCAL - SHARED:
            raise PtxError("more shared or local memory, or larger parameters, than a GPU has")
        self.regions = [
            Allocation("shared memory", SHARED, self._own_bytes[0], initialised=False),
            Allocation("local memory", LOCAL, self._own_bytes[1], initialised=False),
            Allocation("kernel parameters", PARAMS, len(arguments), writable=False, data=arguments),
            *given,
        ]
        copies = [grid, grid * block] + [1] * (len(self.regions) - 2)
        self._addresses, self._starts, at = [r.address for r in self.regions], [], GUARD
        for r, n in zip(self.regions, copies, strict=True):
            at = -(-at // GUARD) * GUARD + r.address % GUARD  # keeps every alignment
            self._starts.append(at)
            at += r.size * n + GUARD
        self._bytes = np.zeros(-(-at // 64) * 64, u1)
        self._known = np.zeros_like(self._bytes)
        for r, start in zip(self.regions, self._starts, strict=True):
            if r.data is not None:
                self._bytes[start : start + r.size] = np.frombuffer(r.data, u1)
            elif r.address >= TENSORS and r.size:
                there = np.ctypeslib.as_array((ctypes.c_uint8 * r.size).from_address(r.address))
                self._bytes[start : start + r.size] = there
            if r.initialised:
                self._known[start : start + r.size] = 1
        self._addresses_array, self._starts_array = np.array(self._addresses, u8), np.array(self._starts, i8)
        self._sizes, self._writable = (
            np.array([r.size for r in self.regions], u8),
            np.array([r.writable for r in self.regions]),
        )
        self._views = {n: self._bytes.view(t) for n, t in TYPES.items()}
        self._known_views = {n: self._known.view(t) for n, t in TYPES.items()}
        self.races = Races(len(self._bytes), grid, block, self.report)

    def write_back(self) -> None:
        """What the kernel wrote, to the host's memory."""
        for r, start in zip(self.regions, self._starts, strict=True):
            if r.writable and r.address >= TENSORS and r.size:
                ctypes.memmove(r.address, self._bytes[start : start + r.size].ctypes.data, r.size)

    # -------------------------------------------------------------------------------------------------------- accesses
    def load(
        self, space: str, address: Any, size: int, count: int, mask: Any, T: Any, text: str, unused: Any = ()
    ) -> list[Any]:
        """`count` elements, one after another; the numbers of those that no instruction reads are in `unused`."""
        # One address for all threads is one value, but not in memory that blocks or threads have of their own.
        uniform = np.ndim(address) == 0 and mask is None and int(address) >= PARAMS
        everybody = T
        if uniform:
            address, T = np.asarray(address).reshape(1), T[:1]
        else:
            address = np.broadcast_to(address, T.shape)
            if mask is not None and not (mask := np.broadcast_to(mask, T.shape)).all():
                return self._load_some(space, address, size, count, mask, T, text, unused)
        position, good, _, which = self._place(space, address, size, count, T, text)
        safe = position if good is None else np.where(good, position, 0)
        index = safe >> SHIFT[size]
        view, known = self._views[size], self._known_views[size]
        values = []
        for n in range(count):
            unknown = known[index + n] != WRITTEN[size]
            if good is not None:
                unknown &= good
            if unknown.any() and n not in unused:
                j = int(np.flatnonzero(unknown)[0])
                name = self.regions[which if isinstance(which, int) else int(which[j])].name
                self.report.fault("uninitialised", text, unknown.sum(), f"{self._who(T[j])} reads {name}")
            v = view[index + n]
            if good is not None:
                v = np.where(good, v, TYPES[size](GARBAGE & (1 << 8 * size) - 1))
            values.append(v[0] if uniform else v)
        if not (isinstance(which, int) and not self.regions[which].writable):
            if good is not None:
                safe, T = safe[good], T[good]
            if len(T):
                self.races.load(safe, size, count, T, text, everybody if uniform else T)
        return values

    def _load_some(
        self, space: str, address: Any, size: int, count: int, mask: Any, T: Any, text: str, unused: Any
    ) -> list[Any]:
        if not mask.any():
            return [TYPES[size](0)] * count
        values = []
        for part in self.load(space, address[mask], size, count, None, T[mask], text, unused):
            whole = np.zeros(T.shape, TYPES[size])
            whole[mask] = part
            values.append(whole)
        return values

    def store(self, space: str, address: Any, size: int, values: list[Any], mask: Any, T: Any, text: str) -> None:
        count = len(values)
        address, values, T = _masked(address, values, mask, T)
        if len(T) == 0:
            return
        position, good, writable, _ = self._place(space, address, size, count, T, text)
        if not writable:
            self.report.fault("read-only", text, 1, "a write to memory that the launch only reads")
        if good is not None:
            position, values, T = position[good], [v[good] for v in values], T[good]
        index = position >> SHIFT[size]
        view, known = self._views[size], self._known_views[size]
        equal = True
        for n, v in enumerate(values):
            view[index + n] = v
            known[index + n] = WRITTEN[size]
            equal &= bool((view[index + n] == v).all())
        self.races.store(position, size, count, T, text, equal)

    def atomic_add(self, space: str, address: Any, size: int, value: Any, mask: Any, T: Any, text: str) -> None:
        address, (value,), T = _masked(address, [value], mask, T)
        if len(T) == 0:
            return
        position, good, writable, _ = self._place(space, address, size, 1, T, text)
        if not writable:
            self.report.fault("read-only", text, 1, "an atomic on memory that the launch only reads")
        if good is not None:
            position, value, T = position[good], value[good], T[good]
        index = position >> SHIFT[size]
        if (self._known_views[size][index] != WRITTEN[size]).any():
            self.report.fault("uninitialised", text, 1, "an atomic on what was never written")
        self.races.atomic(position, size, T, text)
        np.add.at(self._views[size], index, value)

    # ---------------------------------------------------------------------------------------------------------- checks
    def _place(self, space: str, address: Any, size: int, count: int, T: Any, text: str) -> tuple[Any, Any, bool, Any]:
        """Positions in `_bytes`, which threads may go there (None: all), whether they may write, and which regions."""
        total = size * count
        at = address.astype(u8)
        low, high = int(at.min()), int(at.max())
        i = bisect.bisect_right(self._addresses, low) - 1
        good: Any = None
        which: Any = i
        if i >= OF_PARAMS and high + total <= self.regions[i].address + self.regions[i].size:
            position = at.astype(i8) + (self._starts[i] - self.regions[i].address)
        else:
            which = np.searchsorted(self._addresses_array, at, side="right").astype(i8) - 1
            inside = np.maximum(which, 0)
            offset = at - self._addresses_array[inside]
            good = (which >= 0) & (offset + u8(total) <= self._sizes[inside])
            position = offset.astype(i8) + self._starts_array[inside]
            position += np.where(which == OF_SHARED, T // self.block * self._own_bytes[0], 0)
            position += np.where(which == OF_LOCAL, T.astype(i8) * self._own_bytes[1], 0)
            if good.all():
                good = None
            else:
                self._out_of_bounds(at, good, total, T, text)
        self._check_space(space, which, good, text)
        wrong = (at & u8(total - 1)) != 0
        if wrong.any():
            self.report.fault("misaligned", text, wrong.sum(), f"address {int(at[wrong][0]):#x} for {total} bytes")
            good = ~wrong if good is None else good & ~wrong
        if isinstance(which, int):
            return position, good, self.regions[which].writable, which
        return position, good, bool(self._writable[which if good is None else which[good]].all()), which

    def _out_of_bounds(self, at: Any, good: Any, total: int, T: Any, text: str) -> None:
        bad = int(np.flatnonzero(~good)[0])
        address = int(at[bad])
        near = self.regions[max(bisect.bisect_right(self._addresses, address) - 1, 0)]
        where = f"offset {address - near.address} of {near.name} ({near.size} bytes)"
        if address - near.address > near.size + (1 << 16):
            where = f"{address:#x}, where nothing is"
        self.report.fault("out of bounds", text, (~good).sum(), f"{self._who(T[bad])}: {total} bytes at {where}")

    def _check_space(self, space: str, which: Any, good: Any, text: str) -> None:
        own = {"shared": OF_SHARED, "local": OF_LOCAL, "param": OF_PARAMS}
        if space == "generic":
            return
        right = which > OF_PARAMS if space in ("global", "const") else which == own[space]
        if not np.all(right if good is None else right | ~good):
            self.report.fault("wrong state space", text, 1, space)

    def _who(self, thread: Any) -> str:
        return thread_name(int(thread), self.block)


def _masked(address: Any, values: list[Any], mask: Any, T: Any) -> tuple[Any, list[Any], Any]:
    address = np.broadcast_to(address, T.shape)
    values = [np.broadcast_to(v, T.shape) for v in values]
    if mask is not None and not (mask := np.broadcast_to(mask, T.shape)).all():
        address, values, T = address[mask], [v[mask] for v in values], T[mask]
    return address, values, T
