"""Memory: loads, stores, atomics, and what the threads of a warp exchange."""

from __future__ import annotations

from .parse import Address, Instruction, Operand, PtxError
from .writer import BITS, SIGNED, Writer, size_of

SPACES = ("global", "shared", "param", "local", "const")


def _address(w: Writer, i: Instruction, memory: Operand) -> tuple[str, str, int, int]:
    """Space, address, bytes of an element, number of elements."""
    if not isinstance(memory, Address):
        raise PtxError(i.text)
    space = next((p for p in i.parts[1:] if p in SPACES), "generic")
    count = next((int(p[1:]) for p in i.parts if p in ("v2", "v4", "v8")), 1)
    if not any(memory.base in known for known in (w.kernel.registers, w.kernel.params, w.kernel.variables)):
        raise PtxError(i.text)
    address = w.u(memory.base, 8)
    if memory.offset:
        address = f"({address} + {w.constant(f'u8({memory.offset & (1 << 64) - 1})')})"
    return space, address, size_of(i.parts[-1]), count


def load(w: Writer, i: Instruction) -> None:
    space, address, size, count = _address(w, i, i.args[1])
    into = i.args[0] if isinstance(i.args[0], list) else [str(i.args[0])]
    unused = tuple(n for n, r in enumerate(into) if r not in w.ever_read)
    w.lines.append(f"t = M.load({space!r}, {address}, {size}, {count}, {w.mask(i.guard)}, T, {i.text!r}, {unused})")
    for n, register in enumerate(into):
        own = w.kernel.registers.get(register, size)
        e = f"t[{n}]"
        if own > size and i.parts[-1][0] == "s":
            e = f"{e}.view({SIGNED[size]}).astype({SIGNED[own]}).view({BITS[own]})"
        elif own > size:
            e = f"{e}.astype({BITS[own]})"
        elif own < size:
            raise PtxError(i.text)
        w.put(register, "u", e, i.guard)


def store(w: Writer, i: Instruction) -> None:
    space, address, size, _ = _address(w, i, i.args[0])
    values = i.args[1] if isinstance(i.args[1], list) else [i.args[1]]
    listed = ", ".join(w.u(v, size) for v in values)
    w.lines.append(f"M.store({space!r}, {address}, {size}, [{listed}], {w.mask(i.guard)}, T, {i.text!r})")


def atomic(w: Writer, i: Instruction) -> None:
    """Additions of integers whose old value nobody reads: orders of atomics are not emulated."""
    returns = i.parts[0] == "atom"
    if "add" not in i.parts or i.parts[-1][0] not in "us":
        raise PtxError(i.text)
    if returns and i.args[0] != "_" and i.args[0] in w.ever_read:
        raise PtxError(f"{i.text}: its result is read")
    space, address, size, _ = _address(w, i, i.args[1 if returns else 0])
    value = w.u(i.args[2 if returns else 1], size)
    w.lines.append(f"M.atomic_add({space!r}, {address}, {size}, {value}, {w.mask(i.guard)}, T, {i.text!r})")


def shuffle(w: Writer, i: Instruction) -> None:
    if i.parts[1] != "sync" or i.guard is not None:
        raise PtxError(i.text)
    into, clamp = str(i.args[0]).split("|"), int(str(i.args[3]), 0)
    e = f"M.shuffle({i.parts[2]!r}, {w.u(i.args[1], 4)}, {w.u(i.args[2], 4)}, {clamp}, T, {i.text!r})"
    w.lines.append(f"t = {e}")
    for n, register in enumerate(into):
        w.put(register, "u", f"t[{n}]")


def sum_of_warp(w: Writer, i: Instruction) -> None:
    if i.guard is not None or i.parts[1:3] != ("sync", "add"):
        raise PtxError(i.text)
    w.put(i.args[0], "u", f"M.sum_of_warp({w.u(i.args[1], 4)}, {w.u(i.args[2], 4)}, T, {i.text!r})")


def matrices(w: Writer, i: Instruction) -> None:
    """ldmatrix and stmatrix."""
    if i.guard is not None or i.parts[-1] != "b16" or "m8n8" not in i.parts:
        raise PtxError(i.text)
    load = i.parts[0] == "ldmatrix"
    memory, values = (i.args[1], i.args[0]) if load else i.args
    if not isinstance(values, list):
        raise PtxError(i.text)
    _, address, _, _ = _address(w, i, memory)
    listed = ", ".join("0" if load else w.u(v, 4) for v in values)
    w.lines.append(f"t = M.matrices({address}, [{listed}], {'trans' in i.parts}, T, {i.text!r}, {load})")
    for n, register in enumerate(values if load else ()):
        w.put(register, "u", f"t[{n}]")
