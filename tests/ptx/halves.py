"""Registers that are used before they are set, as exactly as halves of 64 bits.

Compilers join a value with a register that was never set, where only the value's half is read again. Each half of a
packed operation depends on the same half of its operands alone.
"""

from __future__ import annotations

from .blocks import Block, reads_writes, successors
from .parse import Instruction, Kernel

Cell = tuple[str, int]  # a register, and which half of it: 0 for all of a smaller one


def unset_and_used(kernel: Kernel, blocks: list[Block]) -> set[str]:
    """Those that are live where the kernel begins."""
    live: list[set[Cell]] = [set() for _ in blocks]
    changed = True
    while changed:
        changed = False
        for block in reversed(blocks):
            now: set[Cell] = set().union(*(live[s] for s in successors(block, len(blocks))))
            if block.decides is not None:
                now.add((block.decides, 0))
            for i in reversed(block.code):
                _before(kernel, i, now)
            if now != live[block.index]:
                live[block.index], changed = now, True
    return {register for register, _ in live[0]}


def _cells(kernel: Kernel, register: str) -> list[Cell]:
    if register not in kernel.registers:
        return []
    return [(register, 0), (register, 1)] if kernel.registers[register] == 8 else [(register, 0)]


def _before(kernel: Kernel, i: Instruction, live: set[Cell]) -> None:
    """Makes what is live after an instruction what is live before it."""
    read, written = reads_writes(kernel, i)
    needed: set[Cell] = set()
    into, *sources = i.args if i.args else [""]
    if i.parts[0] == "mov" and isinstance(sources[0], list) and len(sources[0]) == 2 and len(_of(kernel, into)) == 2:
        for cell, part in zip(_of(kernel, into), sources[0], strict=True):
            needed.update(_cells(kernel, part) if cell in live else [])
    elif i.parts[0] == "mov" and isinstance(into, list) and len(into) == 2 and len(_of(kernel, sources[0])) == 2:
        for part, cell in zip(into, _of(kernel, sources[0]), strict=True):
            needed.update([cell] if (part, 0) in live else [])
    elif i.parts[-1] == "f32x2":
        for half, cell in enumerate(_of(kernel, into)):
            needed.update((str(source), half) for source in sources if cell in live)
    else:
        needed.update(cell for register in read for cell in _cells(kernel, register))
    if i.guard is None:
        live.difference_update(cell for register in written for cell in _cells(kernel, register))
    else:
        needed.add((i.guard[0], 0))
    live |= needed


def _of(kernel: Kernel, operand: object) -> list[Cell]:
    return _cells(kernel, operand) if isinstance(operand, str) else []
