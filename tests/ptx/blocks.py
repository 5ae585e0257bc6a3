"""A kernel's basic blocks, how control goes from one to the next, and which registers are live where one begins."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from .parse import Address, Instruction, Kernel, Operand, PtxError

TERMINATORS = ("bra", "ret", "exit", "bar", "barrier")
WITHOUT_RESULT = ("st", "stmatrix", "red", "prefetch", *TERMINATORS)
SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]$|%laneid$|%warpid$")
IMMEDIATE = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$|0[fF][0-9a-fA-F]{8}$|0[dD][0-9a-fA-F]{16}$")


@dataclass
class Block:
    index: int
    first: int
    code: list[Instruction] = field(default_factory=list)
    # ("next",), ("goto", block), ("branch", register, wanted, block), ("exit",), ("exit_if", register, wanted) or
    # ("barrier",)
    end: tuple[Any, ...] = ("next",)
    live: tuple[str, ...] = ()

    @property
    def decides(self) -> str | None:
        """The predicate that its end asks for."""
        return self.end[1] if self.end[0] in ("branch", "exit_if") else None


def is_register(operand: Operand) -> bool:
    return isinstance(operand, str) and not IMMEDIATE.match(operand) and not SPECIAL.match(operand)


def reads_writes(kernel: Kernel, i: Instruction) -> tuple[list[str], list[str]]:
    """The registers that an instruction reads and those that it writes."""
    written: list[str] = []
    read: list[str] = [i.guard[0]] if i.guard else []
    at = 0
    if i.parts[0] not in WITHOUT_RESULT:
        into = i.args[0]
        written = into.split("|") if isinstance(into, str) else _mentioned(into)
        at = 1
    for a in i.args[at:]:
        read += [r.lstrip("!") for r in _mentioned(a)]
    return [r for r in read if r in kernel.registers], [r for r in written if r in kernel.registers]


def _mentioned(operand: Operand) -> list[str]:
    if isinstance(operand, Address):
        return [operand.base]
    return operand if isinstance(operand, list) else [operand]


def blocks_of(kernel: Kernel) -> list[Block]:
    leaders = {0, *kernel.labels.values()}
    leaders |= {n + 1 for n, i in enumerate(kernel.code) if i.parts[0] in TERMINATORS}
    starts = sorted(n for n in leaders if n < len(kernel.code))
    number = {n: b for b, n in enumerate(starts)}
    number[len(kernel.code)] = len(starts)
    blocks = []
    for b, n in enumerate(starts):
        stop = starts[b + 1] if b + 1 < len(starts) else len(kernel.code)
        block = Block(b, n, kernel.code[n:stop])
        if block.code[-1].parts[0] in TERMINATORS:
            block.end = _end(kernel, block.code.pop(), number)
        blocks.append(block)
    return blocks


def _end(kernel: Kernel, last: Instruction, number: dict[int, int]) -> tuple[Any, ...]:
    op = last.parts[0]
    if op == "bra":
        label = str(last.args[0])
        if label not in kernel.labels:
            raise PtxError(last.text)
        target = number[kernel.labels[label]]
        return ("branch", *last.guard, target) if last.guard else ("goto", target)
    if op in ("ret", "exit"):
        return ("exit_if", *last.guard) if last.guard else ("exit",)
    if last.guard or (last.args and last.args[0] != "0") or len(last.args) > 1:
        raise PtxError(last.text)  # a barrier of some threads
    return ("barrier",)


def successors(block: Block, total: int) -> list[int]:
    kind = block.end[0]
    following = [block.index + 1] if block.index + 1 < total else []
    if kind == "goto":
        return [block.end[1]]
    if kind == "branch":
        return [block.end[3], *following]
    return [] if kind == "exit" else following


def flow(kernel: Kernel, blocks: list[Block]) -> tuple[set[str], set[str]]:
    """Sets each block's live registers. Registers that some path reads before they are set, and all that are read."""
    uses, sets = [], []
    ever_read: set[str] = set()
    for block in blocks:
        use: set[str] = set()
        done: set[str] = set()
        for i in block.code:
            read, written = reads_writes(kernel, i)
            ever_read.update(read)
            use.update(r for r in read if r not in done)
            if i.guard is None:
                done.update(written)
            else:  # keeps what it had
                use.update(r for r in written if r not in done)
        if block.decides is not None and block.decides not in done:
            use.add(block.decides)
        uses.append(use)
        sets.append(done)
    live: list[set[str]] = [set() for _ in blocks]
    following = [successors(b, len(blocks)) for b in blocks]
    changed = True
    while changed:
        changed = False
        for b in range(len(blocks) - 1, -1, -1):
            new = uses[b] | (set().union(*(live[s] for s in following[b])) - sets[b])
            if new != live[b]:
                live[b], changed = new, True
    for block, registers in zip(blocks, live, strict=True):
        block.live = tuple(sorted(registers))
    return live[0] if live else set(), ever_read
