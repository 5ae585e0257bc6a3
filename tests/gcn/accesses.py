"""Loads, stores and atomics: of scalars, of lanes, of the memory that a block shares (LDS)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.memory import SHARED, Memory
from tests.ptx.parse import PtxError

from .operands import Get, first_of, scalar, vector
from .parse import Instruction
from .waves import EXEC, LANES, Waves

Access = Callable[[Waves, Memory], None]
u2, u4, u8, i4 = np.uint16, np.uint32, np.uint64, np.int32
SCALAR = re.compile(r"s_load_dword(?:x(\d+))?")
GLOBAL = re.compile(r"global_(load|store)_(\w+)")
LDS = re.compile(r"ds_(?:(read)(2?)(st64)?_(b32|b64|b128|u16)|write(2?)(st64)?_(b16|b32|b64|b128|b16_d16_hi))")
# Bytes of an element and how many; of what is narrower than a register, how it goes there.
WIDTHS = {
    "dword": (4, 1), "dwordx2": (4, 2), "dwordx3": (4, 3), "dwordx4": (4, 4), "ushort": (2, 1), "ubyte": (1, 1),
    "short": (2, 1), "byte": (1, 1), "short_d16_hi": (2, 1), "b32": (4, 1), "b64": (4, 2), "b128": (4, 4), "b16": (2, 1),
    "u16": (2, 1), "b16_d16_hi": (2, 1),
}  # fmt: skip
# Loads of half a register are unknown: what becomes of the other half depends on the memory's error correction.
LOADED = {"dword", "dwordx2", "dwordx3", "dwordx4", "ushort", "ubyte"}
STORED = {"dword", "dwordx2", "dwordx3", "dwordx4", "short", "byte", "short_d16_hi"}


def decode(i: Instruction) -> Access | None:
    """None where the instruction is no access."""
    for cache in ("nt", "sc0", "sc1"):
        i.modifiers.pop(cache, None)
    if found := SCALAR.fullmatch(i.opcode):
        return _scalar_load(i, int(found[1] or 1))
    if i.opcode in ("global_atomic_add", "global_atomic_add_x2"):
        return _atomic(i)
    if found := GLOBAL.fullmatch(i.opcode):
        return _global(i, found[1] == "load", found[2])
    if found := LDS.fullmatch(i.opcode):
        two, stride = found[2] or found[5], 64 if found[3] or found[6] else 1
        return _shared(i, found[1] is not None, bool(two), stride, found[4] or found[7])
    return None


def _scalar_load(i: Instruction, count: int) -> Access:
    """Dwords, at any multiple of four."""
    to, base, offset = first_of(i.args[0], "s", count), scalar(i.args[1], "q"), scalar(i.args[2], "u")
    if to + count > EXEC:
        raise PtxError(i.text)

    def access(w: Waves, memory: Memory) -> None:
        address, first = base(w) + offset(w).astype(u8), w.threads[::LANES]
        for n in range(count):
            (w.S[to + n],) = memory.load("generic", address + u8(4 * n), 4, 1, None, first, i.text)

    return access


def _address(base: str, offset: str, i: Instruction) -> Get:
    """Of "v[2:3], off", or of "v4, s[6:7]": a 64-bit scalar and a 32-bit offset of each lane."""
    fixed = u8(int(i.modifiers.pop("offset", "0"), 0) & (1 << 64) - 1)
    if offset == "off":
        lanes = vector(base, "q")
        return lambda w: lanes(w) + fixed
    scalars, lanes = scalar(offset, "q"), vector(base, "u")
    return lambda w: scalars(w)[:, None] + lanes(w).astype(u8) + fixed


def _lanes(w: Waves, x: Any) -> Any:
    return np.broadcast_to(x, (len(w.numbers), LANES)).reshape(-1)


def _mask(w: Waves) -> Any:
    return None if w.E is None else w.E.reshape(-1)


def _pieces(address: Any, mask: Any, size: int, count: int) -> list[tuple[int, int]]:
    """The first element of each access, and how many: one by one where all at once would need more alignment than one."""
    there = address if mask is None else address[mask]
    aligned = count == 1 or (count != 3 and not (there & u8(size * count - 1)).any())
    return [(0, count)] if aligned else [(n, 1) for n in range(count)]


def _load(w: Waves, memory: Memory, space: str, address: Any, size: int, count: int, text: str) -> list[Any]:
    address, mask, found = _lanes(w, address), _mask(w), []
    for n, many in _pieces(address, mask, size, count):
        found += memory.load(space, address + u8(size * n), size, many, mask, w.threads, text)
    return [np.broadcast_to(x, w.threads.shape).reshape(-1, LANES) for x in found]


def _store(w: Waves, memory: Memory, space: str, address: Any, size: int, values: list[Any], text: str) -> None:
    address, mask = _lanes(w, address), _mask(w)
    values = [_lanes(w, v) for v in values]
    for n, many in _pieces(address, mask, size, len(values)):
        memory.store(space, address + u8(size * n), size, values[n : n + many], mask, w.threads, text)


def _put_loaded(w: Waves, to: int, values: list[Any]) -> None:
    for n, x in enumerate(values):
        w.put(to + n, x.astype(u4))


def _stored(kind: str, registers: list[Get]) -> Callable[[Waves], list[Any]]:
    size, _ = WIDTHS[kind]
    if size == 4:
        return lambda w: [get(w) for get in registers]
    (get,), shift, narrow = registers, u4(16 if kind.endswith("hi") else 0), u2 if size == 2 else np.uint8
    return lambda w: [(get(w) >> shift).astype(narrow)]


def _global(i: Instruction, loads: bool, kind: str) -> Access:
    if kind not in (LOADED if loads else STORED):
        raise PtxError(i.text)
    size, count = WIDTHS[kind]
    if loads:
        to, address = first_of(i.args[0], "v", count), _address(i.args[1], i.args[2], i)
        return lambda w, memory: _put_loaded(w, to, _load(w, memory, "global", address(w), size, count, i.text))
    first, address = first_of(i.args[1], "v", count), _address(i.args[0], i.args[2], i)
    values = _stored(kind, [vector(f"v{first + n}", "u") for n in range(count)])
    return lambda w, memory: _store(w, memory, "global", address(w), size, values(w), i.text)


def _atomic(i: Instruction) -> Access:
    """An addition whose old value nobody asks for."""
    size = 8 if i.opcode.endswith("x2") else 4
    if len(i.args) != 3:
        raise PtxError(i.text)
    address, value = _address(i.args[0], i.args[2], i), vector(i.args[1], "q" if size == 8 else "u")

    def access(w: Waves, memory: Memory) -> None:
        memory.atomic_add("global", _lanes(w, address(w)), size, _lanes(w, value(w)), _mask(w), w.threads, i.text)

    return access


def _shared(i: Instruction, reads: bool, two: bool, stride: int, kind: str) -> Access:
    size, count = WIDTHS[kind]
    if two:
        offsets = [int(i.modifiers.pop(f"offset{n}", "0"), 0) * stride * size * count for n in range(2)]
    else:
        offsets = [int(i.modifiers.pop("offset", "0"), 0)]
    base = vector(i.args[1] if reads else i.args[0], "u")
    if reads:
        to = first_of(i.args[0], "v", count * len(offsets))

        def read(w: Waves, memory: Memory) -> None:
            found = []
            for offset in offsets:
                address = base(w).astype(u8) + u8(SHARED + offset)
                found += _load(w, memory, "shared", address, size, count, i.text)
            _put_loaded(w, to, found)

        return read
    given = [
        _stored(kind, [vector(f"v{first_of(a, 'v', count) + n}", "u") for n in range(count)])
        for a in i.args[1 : 1 + len(offsets)]
    ]

    def write(w: Waves, memory: Memory) -> None:
        for offset, values in zip(offsets, given, strict=True):
            _store(w, memory, "shared", base(w).astype(u8) + u8(SHARED + offset), size, values(w), i.text)

    return write
