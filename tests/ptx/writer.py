"""What writes a basic block as Python: operands in, results out.

A register holds an unsigned array of its size (bool for a predicate) with an element for each thread of a group, or a
NumPy scalar where all threads agree. Inside a block a float32 may also be there as floats: `bits` makes every NaN of
arithmetic the one that a GPU makes.
"""

from __future__ import annotations

import re

from .blocks import SPECIAL, Block, is_register
from .parse import Kernel, Operand, PtxError

BITS = {1: "u1", 2: "u2", 4: "u4", 8: "u8"}
SIGNED = {1: "np.int8", 2: "i2", 4: "i4", 8: "i8"}
Guard = tuple[str, bool] | None
GARBAGE = 0xA5A5A5A5A5A5A5A5  # what is in a register before it is set


def size_of(kind: str) -> int:
    """Bytes of a type: u32, f16x2, b64, ..."""
    m = re.fullmatch(r"[busf]+(8|16|32|64)(x2)?", kind)
    if m is None or kind == "f32x2":
        raise PtxError(f"type {kind}")
    return int(m[1]) // 8 * (2 if m[2] else 1)


class Writer:
    """The lines of one block's function, B(R, M, T): registers, machine, the numbers of the group's threads."""

    def __init__(
        self, kernel: Kernel, block: Block, constants: dict[str, str], maybe_unset: set[str], read: set[str]
    ) -> None:
        self.kernel, self.block, self.constants, self.unset = kernel, block, constants, maybe_unset
        self.ever_read = read  # a vector's other elements are loaded for nothing, and may be anything
        self.lines: list[str] = []
        self.touched: set[str] = set()
        self.forms: dict[str, set[str]] = {}  # register: which of "u" and "f" are up to date
        self._names: dict[str, str] = {}

    # ------------------------------------------------------------------------------------------------------- operands
    def u(self, operand: Operand, size: int) -> str:
        """As unsigned integers of so many bytes, or as a predicate."""
        if not isinstance(operand, str):
            raise PtxError(f"operand {operand}")
        if operand.startswith("!"):
            return f"~{self.u(operand[1:], size)}"
        if SPECIAL.match(operand):
            return f"M.special({operand!r}, T)"
        if operand in self.kernel.registers:
            own, name = self.kernel.registers[operand], self._have(operand, "u")
            return name if own in (size, 0) else f"{name}.astype({BITS[size]})"
        if operand in self.kernel.variables or operand in self.kernel.params:
            return f"M.address({operand!r}, {size})"
        return self._immediate(operand, size)

    def s(self, operand: Operand, size: int) -> str:
        """As signed integers."""
        return f"{self.u(operand, size)}.view({SIGNED[size]})"

    def f(self, operand: Operand) -> str:
        """As float32."""
        if isinstance(operand, str) and operand in self.kernel.registers:
            return self._have(operand, "f")
        if isinstance(operand, str) and operand[:2] in ("0f", "0F"):
            return self.constant(f"u4(0x{operand[2:]}).view(f4)")
        return f"{self.u(operand, 4)}.view(f4)"

    def floats(self, register: Operand) -> str | None:
        """Its name as floats where it is there as floats only."""
        known = isinstance(register, str) and register in self.kernel.registers and is_register(register)
        return self._have(str(register), "f") if known and self.forms.get(str(register)) == {"f"} else None

    def mask(self, guard: Guard) -> str:
        """Which threads an access is for."""
        if guard is None:
            return "None"
        return self.u(guard[0], 0) if guard[1] else f"~{self.u(guard[0], 0)}"

    def constant(self, expression: str) -> str:
        return self.constants.setdefault(expression, f"c{len(self.constants)}")

    def _immediate(self, text: str, size: int) -> str:
        if text[:2] in ("0f", "0F"):
            return self.constant(f"u4(0x{text[2:]})")
        value = int(text.rstrip("U"), 0) & ((1 << 8 * size) - 1)
        return self.constant(f"{BITS[size]}({value})")

    def _local(self, register: str, form: str) -> str:
        if register not in self._names:
            self._names[register] = f"{len(self._names)}_" + re.sub(r"\W", "_", register)
        return f"{form}{self._names[register]}"

    def _have(self, register: str, form: str) -> str:
        name, forms = self._local(register, form), self.forms.get(register)
        if forms is None:
            value = f"R[{register!r}]"
            if register in self.unset:
                own = self.kernel.registers[register]
                garbage = self.constant(f"{BITS[own]}({GARBAGE >> 64 - 8 * own})") if own else "FALSE"
                value = f"R.get({register!r}, {garbage})"
            self.lines.append(f"{self._local(register, 'u')} = {value}")
            forms = self.forms[register] = {"u"}
        if form not in forms:
            other = self._local(register, "u" if form == "f" else "f")
            self.lines.append(f"{name} = {other}.view(f4)" if form == "f" else f"{name} = bits({other})")
            forms.add(form)
        return name

    # -------------------------------------------------------------------------------------------------------- results
    def put(self, register: Operand, form: str, expression: str, guard: Guard = None) -> None:
        """Sets a register, "u" to unsigned integers or "f" to floats; a guard keeps what other threads have."""
        if register == "_":
            return
        if not isinstance(register, str) or register not in self.kernel.registers:
            raise PtxError(f"result {register}")
        if guard is not None:
            if form == "f":
                self.lines.append(f"tf = {expression}")
                expression, form = "bits(tf)", "u"
            old, test = self._have(register, "u"), self.u(guard[0], 0)
            expression = f"where({test}, {expression}, {old})" if guard[1] else f"where({test}, {old}, {expression})"
        self.lines.append(f"{self._local(register, form)} = {expression}")
        self.forms[register] = {form}
        self.touched.add(register)

    def function(self, live_after: set[str]) -> list[str]:
        """The block's lines so far as a function that hands on the registers that are read after it."""
        keep = self.touched & live_after
        if self.block.decides in self.touched:
            keep.add(self.block.decides)
        for register in sorted(keep):
            self.lines.append(f"R[{register!r}] = {self._have(register, 'u')}")
        return [f"def B{self.block.index}(R, M, T):", *(f"  {line}" for line in self.lines or ["pass"])]
