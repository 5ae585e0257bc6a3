"""How an instruction reads its operands: "v3", "s[4:5]", "vcc", "-v1", "|v1|", "0x3f800000", "1.0", and parts of words.

A kind is what a number is taken for: u, i and f have 32 bits, q (unsigned) and l (signed) 64, h is a float16 in the lower
half of a register.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.parse import PtxError

from .parse import Instruction
from .waves import EXEC, M0, VCC, Waves, pair

Get = Callable[[Waves], Any]
u4, u8 = np.uint32, np.uint64
VIEWS = {"u": np.uint32, "i": np.int32, "f": np.float32, "q": np.uint64, "l": np.int64, "h": np.uint32}
NAMED = {"vcc": VCC, "vcc_lo": VCC, "vcc_hi": VCC + 1, "exec": EXEC, "exec_lo": EXEC, "exec_hi": EXEC + 1, "m0": M0}
REGISTER = re.compile(r"([sv])(?:(\d+)|\[(\d+):(\d+)\])$")
INTEGER = re.compile(r"-?\d+$|0x[0-9a-f]+$")
DECIMAL = re.compile(r"-?\d+\.\d+$")
INLINE = range(-16, 65)


def register(text: str) -> tuple[str, int, int] | None:
    """Which file, "s" or "v", the first register and how many."""
    if text in NAMED:
        return "s", NAMED[text], 2 if text in ("vcc", "exec") else 1
    found = REGISTER.match(text)
    if found is None:
        return None
    if found[2]:
        return found[1], int(found[2]), 1
    first, last = int(found[3]), int(found[4])
    return found[1], first, last - first + 1


def first_of(text: str, file: str, count: int) -> int:
    """The number of a result's (first) register."""
    found = register(text)
    if found is None or found[0] != file or found[2] != count:
        raise PtxError(f"{text!r} is not {count} of the {file} registers")
    return found[1]


def constant(text: str, kind: str) -> Any:
    """A number as 32 or 64 bits."""
    if DECIMAL.match(text):
        if kind in "ql":
            raise PtxError(f"{text} in 64 bits")
        if kind == "h":
            return u4(np.float16(float(text)).view(np.uint16))
        (value,) = struct.unpack("<I", struct.pack("<f", float(text)))
        return u4(value)
    if not INTEGER.match(text):
        raise PtxError(f"operand {text!r}")
    value = int(text, 0)
    if kind in "ql":
        if value not in INLINE and value >= 1 << 31:
            raise PtxError(f"{text}: whether it is extended by its sign is not known")
        return u8(value & (1 << 64) - 1)
    return u4(value & 0xFFFFFFFF)


def scalar(text: str, kind: str) -> Get:
    """[waves]."""
    view, found = VIEWS[kind], register(text)
    if found is None:
        value = constant(text, kind).view(view)
        return lambda w: value
    file, i, count = found
    if file != "s" or count != (2 if kind in "ql" else 1):
        raise PtxError(f"{text!r} as a scalar {kind}")
    if count == 2:
        return lambda w: pair(w.S, i).view(view)
    return lambda w: w.S[i].view(view)


def vector(text: str, kind: str, selected: str = "DWORD") -> Get:
    """[waves, 64], or what broadcasts to it. selected: the part of a 32-bit word that is taken."""
    if negative := re.fullmatch(r"neg\((.*)\)", text):
        return _float(text, kind, vector(negative[1], kind, selected), np.negative)
    if text.startswith("-") and not INTEGER.match(text) and not DECIMAL.match(text):
        return _float(text, kind, vector(text[1:], kind, selected), np.negative)
    if text.startswith("|"):
        return _float(text, kind, vector(text.strip("|"), kind, selected), np.abs)
    view, found = VIEWS[kind], register(text)
    if found is None:
        if selected != "DWORD":
            raise PtxError(f"a part of {text}")
        value = constant(text, kind).view(view)
        return lambda w: value
    file, i, count = found
    if count != (2 if kind in "ql" else 1):
        raise PtxError(f"{text!r} as {kind}")
    if count == 2:
        if file == "s":
            return lambda w: pair(w.S, i)[:, None].view(view)
        return lambda w: pair(w.V, i).view(view)
    if selected != "DWORD":
        part = _part(selected)
        return (lambda w: part(w.S[i][:, None]).view(view)) if file == "s" else (lambda w: part(w.V[i]).view(view))
    if file == "s":
        return lambda w: w.S[i].view(view)[:, None]
    return lambda w: w.V[i].view(view)


def _float(text: str, kind: str, get: Get, change: Any) -> Get:
    if kind != "f":
        raise PtxError(f"{text!r} as {kind}")
    return lambda w: change(get(w))


def _part(selected: str) -> Callable[[Any], Any]:
    found = re.fullmatch(r"(BYTE|WORD)_(\d)", selected)
    if found is None:
        raise PtxError(f"a part of a word, {selected}")
    size = 8 if found[1] == "BYTE" else 16
    shift, mask = u4(size * int(found[2])), u4((1 << size) - 1)
    return lambda x: x >> shift & mask


def vectors(i: Instruction, args: list[str], kinds: str) -> list[Get]:
    """Operands of a vector instruction; with modifiers, those of SDWA alone."""
    if len(args) != len(kinds):
        raise PtxError(f"{i.text}: {len(args)} operands, not {len(kinds)}")
    parts = [i.modifiers.pop(f"src{n}_sel", "DWORD") for n in range(len(args))]
    if i.modifiers.pop("dst_sel", "DWORD") != "DWORD":
        raise PtxError(i.text)
    i.modifiers.pop("dst_unused", None)
    return [vector(a, kind, part) for a, kind, part in zip(args, kinds, parts, strict=True)]


def packed(text: str, low: bool, high: bool, negative: tuple[bool, bool]) -> tuple[Get, Get]:
    """The two float32 operands of a packed operation: which half of a pair each takes, and their signs."""
    found = register(text)
    if found is None:
        if low or high:
            raise PtxError(f"the upper half of {text}")
        halves = [vector(text, "f")] * 2
    else:
        file, i, count = found
        if count != 2:
            raise PtxError(f"{text!r} as a pair")
        halves = [vector(f"{file}{i + half}", "f") for half in (low, high)]
    chosen = [
        _float(text, "f", get, np.negative) if minus else get for get, minus in zip(halves, negative, strict=True)
    ]
    return chosen[0], chosen[1]
