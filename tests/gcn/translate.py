"""A kernel as lists of functions, one list for each basic block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tests.ptx.memory import Memory
from tests.ptx.parse import PtxError

from . import accesses, scalar, vector
from .parse import Instruction, Kernel, parse
from .waves import Waves

Step = Callable[[Waves, Memory], None]


@dataclass
class Program:
    """A kernel ready to run."""

    kernel: Kernel
    sizes: list[int]  # instructions of each block
    steps: list[list[Step]]
    unset: list[str] = field(default_factory=list)  # which registers are read before they are set is not looked at


def translate(text: str) -> Program:
    kernel = parse(text)
    ends = [block.end for block in kernel.blocks if block.end and block.end.args]
    if unknown := [end.text for end in ends if end.args[0] not in kernel.labels]:
        raise PtxError(f"{unknown[0]}: no such label")
    steps = [[step for i in block.code if (step := _known(i)) is not None] for block in kernel.blocks]
    return Program(kernel, [len(b.code) + (b.end is not None) for b in kernel.blocks], steps)


def _known(i: Instruction) -> Step | None:
    try:
        return _step(i)
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise PtxError(f"{i.text}: {error!r}") from error


def _step(i: Instruction) -> Step | None:
    access = accesses.decode(i)
    if access is None:
        simple = vector.decode(i) if i.opcode.startswith("v_") else scalar.decode(i)
        access = None if simple is None else (lambda w, memory: simple(w))
    if i.modifiers:
        raise PtxError(f"{i.text}: {', '.join(i.modifiers)}")
    return access
