"""Integers, predicates and moves."""

from __future__ import annotations

from .blocks import is_register
from .parse import Instruction, PtxError
from .writer import BITS, SIGNED, Writer, size_of

_SIMPLE = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^"}
_PREDICATES = {"mov": "{0}", "not": "~{0}", "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}"}
_TESTS = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">="
}  # fmt: skip


def integer(w: Writer, i: Instruction) -> None:
    """One or two results of one operation on integers or on bits."""
    op, parts, a, g = i.parts[0], i.parts, i.args, i.guard
    size, signed = size_of(parts[-1]), parts[-1][0] == "s"
    n = BITS[size]
    if {"cc", "sat"} & set(parts):
        raise PtxError(i.text)
    if op in _SIMPLE:
        e = f"{w.u(a[1], size)} {_SIMPLE[op]} {w.u(a[2], size)}"
    elif op == "not":
        e = f"~{w.u(a[1], size)}"
    elif op == "neg":
        e = f"{w.constant(f'{n}(0)')} - {w.u(a[1], size)}"
    elif op == "cnot":
        e = f"({w.u(a[1], size)} == 0).astype({n})"
    elif op in ("mul", "mad"):
        e = _product(w, i, size, signed)
    elif op in ("shl", "shr"):
        e = _shift(w, i, size, signed)
    elif op in ("min", "max"):
        of = w.s if signed else w.u
        e = f"np.{op}imum({of(a[1], size)}, {of(a[2], size)})" + (f".view({n})" if signed else "")
    elif op in ("div", "rem") and not signed:
        e = f"{w.u(a[1], size)} {'//' if op == 'div' else '%'} {w.u(a[2], size)}"
    else:
        e = _bits(w, i, size)
    w.put(a[0], "u", e, g)


def _product(w: Writer, i: Instruction, size: int, signed: bool) -> str:
    x, y, to = w.u(i.args[1], size), w.u(i.args[2], size), size
    if "wide" in i.parts:
        to = 2 * size
        if signed:
            x, y = (f"{v}.view({SIGNED[size]}).astype({SIGNED[to]})" for v in (x, y))
            e = f"({x} * {y}).view({BITS[to]})"
        else:
            e = f"{x}.astype({BITS[to]}) * {y}.astype({BITS[to]})"
    elif "lo" in i.parts:
        e = f"{x} * {y}"
    elif "hi" in i.parts:
        e = f"high({x}, {y}, {signed})"
    else:
        raise PtxError(i.text)
    return f"({e}) + {w.u(i.args[3], to)}" if i.parts[0] == "mad" else e


def _shift(w: Writer, i: Instruction, size: int, signed: bool) -> str:
    """By the width or more, all bits go, as NumPy has it, or all become the sign."""
    x, by, n = w.u(i.args[1], size), i.args[2], BITS[size]
    if not is_register(by):
        by = w.constant(f"{n}({int(str(by), 0)})")
    else:
        by = w.u(by, 4) if size == 4 else f"{w.u(by, 4)}.astype({n})"
    if i.parts[0] == "shl":
        return f"{x} << {by}"
    if signed:
        limit = w.constant(f"{n}({8 * size - 1})")
        return f"({x}.view({SIGNED[size]}) >> np.minimum({by}, {limit}).view({SIGNED[size]})).view({n})"
    return f"{x} >> {by}"


def _bits(w: Writer, i: Instruction, size: int) -> str:
    op, parts, a = i.parts[0], i.parts, i.args
    if op == "bfi" and size == 4:
        return f"bfi({w.u(a[1], 4)}, {w.u(a[2], 4)}, {int(str(a[3]))}, {int(str(a[4]))})"
    if op == "bfe" and parts[-1][0] == "u" and not is_register(a[2]) and not is_register(a[3]):
        at, mask = (
            w.constant(f"{BITS[size]}({int(str(a[2]))})"),
            w.constant(f"{BITS[size]}({(1 << int(str(a[3]))) - 1})"),
        )
        return f"({w.u(a[1], size)} >> {at}) & {mask}"
    if op == "bfe" and not is_register(a[2]) and not is_register(a[3]):  # signed: to the top, and back with its sign
        begin, length, width, n = int(str(a[2])), int(str(a[3])), 8 * size, BITS[size]
        if not 0 < length <= width - begin:
            raise PtxError(i.text)
        up, down = w.constant(f"{n}({width - begin - length})"), w.constant(f"{SIGNED[size]}({width - length})")
        return f"(({w.u(a[1], size)} << {up}).view({SIGNED[size]}) >> {down}).view({n})"
    if op == "prmt" and len(parts) == 2:
        return f"prmt({w.u(a[1], 4)}, {w.u(a[2], 4)}, {w.u(a[3], 4)})"
    if op == "lop3" and not is_register(a[4]):
        return f"lop3({w.u(a[1], 4)}, {w.u(a[2], 4)}, {w.u(a[3], 4)}, {int(str(a[4]), 0)})"
    if op == "shf" and parts[1] in ("l", "r") and parts[2] in ("wrap", "clamp"):
        low, up, by = w.u(a[1], 4), w.u(a[2], 4), w.u(a[3], 4)
        return f"funnel({parts[1] == 'l'}, {low}, {up}, {by}, {parts[2] == 'wrap'})"
    if op == "dp2a" and parts[1:] == ("lo", "u32", "u32"):
        return f"dp2a_lo({w.u(a[1], 4)}, {w.u(a[2], 4)}, {w.u(a[3], 4)})"
    raise PtxError(i.text)


def predicate(w: Writer, i: Instruction) -> None:
    x = [{"0": "FALSE", "1": "TRUE", "-1": "TRUE"}.get(str(v)) or w.u(v, 0) for v in i.args[1:]]
    w.put(i.args[0], "u", _PREDICATES[i.parts[0]].format(*x), i.guard)


def compare(w: Writer, i: Instruction) -> None:
    """setp: a predicate, and its opposite where two are wanted."""
    kind, how = i.parts[-1], i.parts[1]
    results = str(i.args[0]).split("|")
    if kind == "f32":
        e = f"compare({how!r}, {w.f(i.args[1])}, {w.f(i.args[2])})"
    else:
        size = size_of(kind)
        of = w.s if kind[0] == "s" and how not in ("eq", "ne") else w.u
        e = f"({of(i.args[1], size)} {_TESTS[how]} {of(i.args[2], size)})"
    if len(i.parts) == 4 and i.parts[2] in ("and", "or", "xor"):
        if len(results) > 1:
            raise PtxError(i.text)
        e = f"({e} {dict(zip(('and', 'or', 'xor'), '&|^', strict=True))[i.parts[2]]} {w.u(i.args[3], 0)})"
    elif len(i.parts) != 3:
        raise PtxError(i.text)
    w.put(results[0], "u", e, i.guard)
    if len(results) > 1:
        w.put(results[1], "u", f"~{w.u(results[0], 0)}", i.guard)


def select(w: Writer, i: Instruction) -> None:
    a, size = i.args, size_of(i.parts[-1])
    w.put(a[0], "u", f"where({w.u(a[3], 0)}, {w.u(a[1], size)}, {w.u(a[2], size)})", i.guard)


def move(w: Writer, i: Instruction) -> None:
    """mov, which also joins registers to a larger one, the first in the low bits, and splits one."""
    (into, source), g, size = i.args, i.guard, size_of(i.parts[-1])
    many = source if isinstance(source, list) else into if isinstance(into, list) else []
    if any(w.kernel.registers.get(x, size // len(many)) != size // len(many) for x in many):
        raise PtxError(f"{i.text}: parts of another size")
    if isinstance(source, list):
        part = size // len(source)
        terms = [
            f"({w.u(x, part)}.astype({BITS[size]}) << {w.constant(f'{BITS[size]}({8 * part * n})')})"
            for n, x in enumerate(source)
        ]
        w.put(into, "u", " | ".join(terms), g)
    elif isinstance(into, list):
        part = size // len(into)
        w.lines.append(f"t = {w.u(source, size)}")
        for n, x in enumerate(into):
            w.put(x, "u", f"(t >> {w.constant(f'{BITS[size]}({8 * part * n})')}).astype({BITS[part]})", g)
    elif g is None and (name := w.floats(source)) is not None:
        w.put(into, "f", name)
    else:
        w.put(into, "u", w.u(source, size), g)
