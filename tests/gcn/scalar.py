"""Instructions of the scalar unit: one operation for a wave, and SCC, the condition that some of them set."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.arithmetic import high
from tests.ptx.parse import PtxError

from .operands import Get, first_of, scalar
from .parse import Instruction
from .waves import EXEC, UNKNOWN, Waves, pair

Step = Callable[[Waves], None]
u1, u4, u8, i4, i8 = np.uint8, np.uint32, np.uint64, np.int32, np.int64
IGNORED = re.compile(r"s_(waitcnt\w*|nop|setprio|sleep|clause|delay_alu|inst_prefetch|sethalt)|buffer_(wbl2|inv)")


def _not_zero(r: Any, *_: Any) -> Any:
    return r != 0


def _carry(r: Any, a: Any, b: Any) -> Any:
    return r < a


def _borrow(r: Any, a: Any, b: Any) -> Any:
    return a < b


def _overflow_of_sum(r: Any, a: Any, b: Any) -> Any:
    return ((a ^ r) & (b ^ r)) < 0


def _overflow_of_difference(r: Any, a: Any, b: Any) -> Any:
    return ((a ^ b) & (a ^ r)) < 0


def _unknown(r: Any, *_: Any) -> Any:
    return np.full(np.shape(r), UNKNOWN, u1)


def _field(a: Any, b: Any) -> Any:
    """As below, without a sign."""
    width = (b >> u4(16) & u4(0x7F)).astype(u8)
    return ((a >> (b & u4(31))).astype(u8) & ((u8(1) << np.minimum(width, u8(32))) - u8(1))).astype(u4)


def _signed_field(a: Any, b: Any) -> Any:
    """The lower half of b is where it begins, the upper half its width, of which 0 makes 0."""
    at, width = b & u4(31), b >> u4(16) & u4(0x7F)
    up = u4(32) - np.minimum(width, u4(32))
    moved = (a >> at.view(i4)).view(u4) << np.minimum(up, u4(31))
    return np.where(width == 0, i4(0), moved.view(i4) >> np.minimum(up, u4(31)).view(i4))


# Name: kinds of the operands (operands.py), the result, and what SCC becomes of it and them; None: it stays.
TWO: dict[str, tuple[str, Callable[..., Any], Callable[..., Any] | None]] = {
    "s_mov_b32": ("u", lambda a: a, None),
    "s_mov_b64": ("q", lambda a: a, None),
    "s_not_b32": ("u", lambda a: ~a, _not_zero),
    "s_not_b64": ("q", lambda a: ~a, _not_zero),
    "s_add_u32": ("uu", lambda a, b: a + b, _carry),
    "s_sub_u32": ("uu", lambda a, b: a - b, _borrow),
    "s_add_i32": ("ii", lambda a, b: a + b, _overflow_of_sum),
    "s_sub_i32": ("ii", lambda a, b: a - b, _overflow_of_difference),
    "s_mul_i32": ("ii", lambda a, b: a * b, None),
    "s_mul_hi_u32": ("uu", lambda a, b: high(a, b, False), None),
    "s_mul_hi_i32": ("uu", lambda a, b: high(a, b, True), None),
    "s_lshl_b32": ("uu", lambda a, b: a << (b & u4(31)), _not_zero),
    "s_lshr_b32": ("uu", lambda a, b: a >> (b & u4(31)), _not_zero),
    "s_ashr_i32": ("iu", lambda a, b: a >> (b & u4(31)).view(i4), _not_zero),
    "s_lshl_b64": ("qu", lambda a, b: a << (b & u4(63)).astype(u8), _not_zero),
    "s_lshr_b64": ("qu", lambda a, b: a >> (b & u4(63)).astype(u8), _not_zero),
    "s_ashr_i64": ("lu", lambda a, b: a >> (b & u4(63)).astype(i8), _not_zero),
    "s_lshl2_add_u32": ("uu", lambda a, b: (a << u4(2)) + b, _unknown),
    "s_lshl3_add_u32": ("uu", lambda a, b: (a << u4(3)) + b, _unknown),
    "s_bfe_u32": ("uu", _field, _not_zero),
    "s_bfe_i32": ("iu", _signed_field, _not_zero),
    "s_pack_ll_b32_b16": ("uu", lambda a, b: b << u4(16) | a & u4(0xFFFF), None),
    "s_min_i32": ("ii", np.minimum, _unknown),
    "s_max_i32": ("ii", np.maximum, _unknown),
    "s_min_u32": ("uu", np.minimum, _unknown),
    "s_max_u32": ("uu", np.maximum, _unknown),
}  # fmt: skip
LOGIC = {
    "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b, "andn2": lambda a, b: a & ~b,
    "orn2": lambda a, b: a | ~b, "nand": lambda a, b: ~(a & b), "nor": lambda a, b: ~(a | b),
    "xnor": lambda a, b: ~(a ^ b),
}  # fmt: skip
TWO |= {
    f"s_{name}_b{size}": (kind * 2, f, _not_zero) for name, f in LOGIC.items() for size, kind in ((32, "u"), (64, "q"))
}
CONDITIONS = {
    "eq": np.equal, "lg": np.not_equal, "gt": np.greater, "ge": np.greater_equal, "lt": np.less, "le": np.less_equal,
}  # fmt: skip
COMPARISON = re.compile(r"s_cmpk?_(\w\w)_([iu])(32|64)")
KINDS = {"i32": "i", "u32": "u", "i64": "l", "u64": "q"}
SAVING = re.compile(r"s_(\w+)_saveexec_b64")


def decode(i: Instruction) -> Step | None:
    """A scalar instruction as a function on waves; None where it does nothing that is emulated."""
    name = i.opcode
    if IGNORED.fullmatch(name):
        i.modifiers.clear()
        return None
    if name in TWO:
        return _two(i)
    if name in ("s_addc_u32", "s_subb_u32"):
        return _with_carry(i)
    if name in ("s_movk_i32", "s_addk_i32", "s_mulk_i32"):
        return _short(i)
    if name in ("s_cselect_b32", "s_cselect_b64"):
        return _select(i)
    if COMPARISON.fullmatch(name):
        return _compare(i)
    if SAVING.fullmatch(name):
        return _save_exec(i)
    if name in ("s_bitcmp0_b32", "s_bitcmp1_b32"):
        return _test_bit(i)
    raise PtxError(f"instruction {i.text}")


def _put(text: str, wide: bool) -> Callable[[Waves, Any], None]:
    to = first_of(text, "s", 2 if wide else 1)
    if wide:
        return lambda w, x: w.put_scalars(to, np.broadcast_to(x, w.numbers.shape))
    return lambda w, x: w.put_scalar(to, x.view(u4))


def _two(i: Instruction) -> Step:
    kinds, f, condition = TWO[i.opcode]
    if len(i.args) != len(kinds) + 1:
        raise PtxError(i.text)
    wide = kinds[0] in "ql"  # as the first operand, so the result
    put, gets = _put(i.args[0], wide), [scalar(a, kind) for a, kind in zip(i.args[1:], kinds, strict=True)]

    def step(w: Waves) -> None:
        values = [get(w) for get in gets]
        r = f(*values)
        if condition is not None:  # before the result, which may take an operand's place
            w.scc[:] = condition(r, *values)
        put(w, r)

    return step


def _with_carry(i: Instruction) -> Step:
    put, a, b, adds = _put(i.args[0], False), scalar(i.args[1], "u"), scalar(i.args[2], "u"), i.opcode == "s_addc_u32"

    def step(w: Waves) -> None:
        x, y, c = a(w).astype(i8), b(w).astype(i8), w.condition().astype(i8)
        total = x + y + c if adds else x - y - c
        put(w, (total & i8(0xFFFFFFFF)).astype(u4))
        w.scc[:] = (total < 0) | (total > 0xFFFFFFFF)

    return step


def _half(text: str, kind: str) -> Any:
    """A constant of 16 bits, extended by its sign where the kind has one."""
    value = int(text, 0) & 0xFFFF
    return i4((value ^ 0x8000) - 0x8000) if kind == "i" else u4(value)


def _short(i: Instruction) -> Step:
    put, old, value = _put(i.args[0], False), scalar(i.args[0], "i"), _half(i.args[1], "i")
    if i.opcode == "s_movk_i32":
        return lambda w: put(w, np.full(w.numbers.shape, value))
    if i.opcode == "s_mulk_i32":
        return lambda w: put(w, old(w) * value)

    def add(w: Waves) -> None:
        before = old(w).copy()
        put(w, before + value)
        w.scc[:] = _overflow_of_sum(before + value, before, value)

    return add


def _select(i: Instruction) -> Step:
    kind = "q" if i.opcode.endswith("64") else "u"
    put, a, b = _put(i.args[0], kind == "q"), scalar(i.args[1], kind), scalar(i.args[2], kind)
    return lambda w: put(w, np.where(w.condition(), a(w), b(w)))


def _compare(i: Instruction) -> Step:
    found = COMPARISON.fullmatch(i.opcode)
    assert found is not None
    kind, f = KINDS[found[2] + found[3]], CONDITIONS[found[1]]
    a = scalar(i.args[0], kind)
    if "cmpk" in i.opcode:
        half = _half(i.args[1], kind)
        b: Get = lambda w: half  # noqa: E731
    else:
        b = scalar(i.args[1], kind)

    def step(w: Waves) -> None:
        w.scc[:] = f(a(w), b(w))

    return step


def _test_bit(i: Instruction) -> Step:
    a, at, wanted = scalar(i.args[0], "u"), scalar(i.args[1], "u"), u4(i.opcode == "s_bitcmp1_b32")

    def step(w: Waves) -> None:
        w.scc[:] = (a(w) >> (at(w) & u4(31)) & u4(1)) == wanted

    return step


def _save_exec(i: Instruction) -> Step:
    """The old EXEC into a register, the operand and it into EXEC."""
    found = SAVING.fullmatch(i.opcode)
    assert found is not None
    f, to, source = LOGIC[found[1]], first_of(i.args[0], "s", 2), scalar(i.args[1], "q")

    def step(w: Waves) -> None:
        old, operand = pair(w.S, EXEC), source(w)
        w.put_scalars(to, old)
        w.put_scalars(EXEC, f(operand, old))
        w.scc[:] = pair(w.S, EXEC) != 0

    return step
