"""Floating point: float32, pairs of float32 in 64-bit registers, and conversions. Each operation rounds once."""

from __future__ import annotations

from .blocks import is_register
from .parse import Instruction, PtxError
from .writer import BITS, SIGNED, Writer, size_of

# Results that are not the one nearest, or that ptxas may fuse with their neighbours: no bit is certain then.
UNKNOWN_ROUNDINGS = {"ftz", "sat", "rz", "rm", "rp", "relu", "approx", "full", "NaN", "xorsign"}
_SIGN, _REST = "u4(0x80000000)", "u4(0x7fffffff)"


def rounded_once(i: Instruction) -> None:
    """ptxas may make one fma of a product and a sum that are written without .rn."""
    if "rn" not in i.parts[1:]:
        raise PtxError(f"{i.text}: without .rn the compiler may fuse it with another operation")


def single(w: Writer, i: Instruction) -> None:
    """float32."""
    op, a, g = i.parts[0], i.args, i.guard
    if UNKNOWN_ROUNDINGS & set(i.parts):
        raise PtxError(i.text)
    if op in ("add", "sub", "mul"):
        rounded_once(i)
        sign = {"add": "+", "sub": "-", "mul": "*"}[op]
        w.put(a[0], "f", f"{w.f(a[1])} {sign} {w.f(a[2])}", g)
    elif op == "fma":
        rounded_once(i)
        w.put(a[0], "f", f"fma({w.f(a[1])}, {w.f(a[2])}, {w.f(a[3])})", g)
    elif op in ("max", "min"):
        w.put(a[0], "f", f"{op}imum({w.f(a[1])}, {w.f(a[2])})", g)
    elif op == "neg":
        w.put(a[0], "u", f"{w.u(a[1], 4)} ^ {w.constant(_SIGN)}", g)
    elif op == "abs":
        w.put(a[0], "u", f"{w.u(a[1], 4)} & {w.constant(_REST)}", g)
    elif op == "copysign":  # of the first, with the magnitude of the second
        sign, rest = w.constant(_SIGN), w.constant(_REST)
        w.put(a[0], "u", f"({w.u(a[1], 4)} & {sign}) | ({w.u(a[2], 4)} & {rest})", g)
    else:
        raise PtxError(i.text)


def packed(w: Writer, i: Instruction) -> None:
    """Two float32 in each 64-bit register, the first in the low half; sm_100 and newer."""
    if i.parts[0] not in ("add", "sub", "mul", "fma") or i.parts[1:] != ("rn", "f32x2"):
        raise PtxError(i.text)
    for operand in i.args:
        if not is_register(operand) or w.kernel.registers.get(str(operand)) != 8:
            raise PtxError(f"{i.text}: {operand} is not a 64-bit register")
    w.put(i.args[0], "u", f"packed_{i.parts[0]}({', '.join(w.u(a, 8) for a in i.args[1:])})", i.guard)


def convert(w: Writer, i: Instruction) -> None:
    a, g, (to, source) = i.args, i.guard, i.parts[-2:]
    modifiers = set(i.parts[1:-2])
    if to in ("f16x2", "bf16x2") and source == "f32" and modifiers == {"rn"}:
        f = "to_f16" if to == "f16x2" else "to_bf16"
        w.put(a[0], "u", f"({f}({w.f(a[1])}).astype(u4) << {w.constant('u4(16)')}) | {f}({w.f(a[2])})", g)
    elif to in ("f16", "bf16") and source == "f32" and modifiers == {"rn"}:
        w.put(a[0], "u", f"to_{to}({w.f(a[1])})", g)
    elif (to, source) == ("f32", "f16") and not modifiers:
        w.put(a[0], "u", f"{w.u(a[1], 2)}.view(f2).astype(f4).view(u4)", g)
    elif (to, source) == ("f32", "bf16") and not modifiers:
        w.put(a[0], "u", f"from_bf16({w.u(a[1], 2)})", g)
    elif to == "f32" and source[0] in "us" and modifiers == {"rn"}:
        size = size_of(source)
        x = w.s(a[1], size) if source[0] == "s" else w.u(a[1], size)
        w.put(a[0], "f", f"{x}.astype(f4)", g)
    elif to[0] in "us" and source[0] in "us" and not modifiers:
        have, want = size_of(source), size_of(to)
        own = w.kernel.registers.get(str(a[0]), want)
        x = w.u(a[1], have)
        if source[0] == "s" and want > have:
            x = f"{x}.view({SIGNED[have]}).astype({SIGNED[want]}).view({BITS[want]})"
        else:
            x = f"{x}.astype({BITS[want]})"
        w.put(a[0], "u", x if own == want else f"{x}.astype({BITS[own]})", g)
    else:
        raise PtxError(i.text)
