"""Reads the disassembler's listing of a kernel: its basic blocks, its natural loops, and ways round a loop.

Opcodes are sorted into the pipes that take them (docs/machine_code.md). Addresses do not matter.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"^(\.L\w+):")
TARGET = re.compile(r"\(?(\.L\w+)\)?")
PIPES = {
    "fp32x2": r"(FFMA|FMUL|FADD)2\b",  # from sm_100 on: two results of one instruction
    "fp32": r"FFMA|FMUL|FADD",
    "imad.wide": r"IMAD\.(WIDE|HI)",
    "imad": r"IMAD",
    "xu": r"I2F(?!P)|F2I(?!P)|MUFU",  # on sm_80 an int becomes a float in the unit for transcendental functions
    "convert": r"I2FP|F2F|HADD2\.F32",
    "memory": r"LD|ST(?!L)|STL|ATOM|RED",
    "branch": r"BRA|BRX|BSSY|BSYNC|WARPSYNC|EXIT|CALL|RET|BREAK",
    "barrier": r"BAR",
    "uniform": r"U[A-Z]|R2UR|S2UR",
    "int": r"IADD|LOP3|SHF|LEA|PRMT|SEL|ISETP|FSETP|FSEL|FMNMX|IMNMX|VIMNMX|VIADD|IABS|PLOP3|MOV|SHL|SHR|POPC|FLO|BFI",
}


@dataclasses.dataclass(frozen=True)
class Instruction:
    predicated: bool
    opcode: str  # with its modifiers: LDG.E.128
    operands: str

    @property
    def pipe(self) -> str:
        return next((name for name, pattern in PIPES.items() if re.match(pattern, self.opcode)), "other")

    @property
    def fp32_results(self) -> int:
        """Float32 sums and products that one thread gets from it."""
        return {"fp32": 1, "fp32x2": 2}.get(self.pipe, 0)

    @property
    def global_bytes(self) -> int:
        """Bytes that one thread loads or stores in global memory, 0 for other instructions."""
        if not re.match(r"(LDG|STG)\b", self.opcode):
            return 0
        width = re.search(r"\.(128|64|[US]16|[US]8)\b", self.opcode)
        return {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[width[1]] if width else 4


@dataclasses.dataclass
class Block:
    """A straight piece of code: what it holds and which blocks may follow."""

    code: list[Instruction] = dataclasses.field(default_factory=list)
    successors: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Loop:
    """A natural loop: its header's index and all of its blocks."""

    header: int
    latches: frozenset[int]
    blocks: frozenset[int]


def parse_functions(sass: str) -> dict[str, list[Block]]:
    """Output of `nvdisasm -c` to the basic blocks of each kernel, by its mangled name."""
    sections = re.split(r"^//-+ (\S+)\s+-+$", sass, flags=re.MULTILINE)
    text = dict(zip(sections[1::2], sections[2::2], strict=True))
    return {name.removeprefix(".text."): _blocks(code) for name, code in text.items() if name.startswith(".text.")}


def _blocks(text: str) -> list[Block]:
    blocks = [Block()]
    labels: dict[str, int] = {}
    targets: dict[
        int, tuple[str | None, bool]
    ] = {}  # of blocks that end in a branch: where to, and whether conditional
    for line in text.splitlines():
        if label := LABEL.match(line):
            if blocks[-1].code:
                blocks.append(Block())
            labels[label[1]] = len(blocks) - 1
        elif found := INSTRUCTION.match(line):
            instruction = Instruction(found[2] is not None, found[3], found[4])
            blocks[-1].code.append(instruction)
            # A CALL.REL.NOINC keeps no return address: ptxas leaves loops by it.
            if re.match(r"BRA|EXIT|RET|BRX|CALL\.REL\.NOINC", instruction.opcode):
                to = TARGET.search(instruction.operands)
                targets[len(blocks) - 1] = (to[1] if to else None, _conditional(instruction))
                blocks.append(Block())
    for index, block in enumerate(blocks):
        target, falls_through = targets.get(index, (None, True))
        if target in labels:
            block.successors.append(labels[target])
        if falls_through and index + 1 < len(blocks):
            block.successors.append(index + 1)
    return blocks


def _conditional(branch: Instruction) -> bool:
    """Whether the next instruction may follow: a predicate is in front (@P0 BRA) or among the operands (BRA UP0)."""
    return branch.predicated or re.match(r"(\.\w+\s+)?!?U?P\d", branch.operands) is not None


def reachable(start: Iterable[int], edges: Sequence[Iterable[int]], allowed: Iterable[int]) -> set[int]:
    allowed, found = set(allowed), set()
    stack = [block for block in start if block in allowed]
    while stack:
        block = stack.pop()
        if block not in found:
            found.add(block)
            stack.extend(b for b in edges[block] if b in allowed)
    return found


def _reversed(blocks: list[Block]) -> list[list[int]]:
    edges: list[list[int]] = [[] for _ in blocks]
    for index, block in enumerate(blocks):
        for successor in block.successors:
            edges[successor].append(index)
    return edges


def find_loops(blocks: list[Block]) -> list[Loop]:
    """Natural loops by their backward branches. The branch to itself behind the last EXIT is padding, not a loop."""
    live, backward = reachable([0], [b.successors for b in blocks], range(len(blocks))), _reversed(blocks)
    latches: dict[int, set[int]] = {}
    for index in live:
        for successor in blocks[index].successors:
            if successor <= index:
                latches.setdefault(successor, set()).add(index)
    return [
        Loop(header, frozenset(ends), frozenset(reachable(ends, backward, live - {header}) & ahead | {header}))
        for header, ends in sorted(latches.items())
        # A loop that is entered at its end has its entry's blocks behind the latches too, but not ahead of the header.
        for ahead in [reachable([header], [b.successors for b in blocks], live)]
    ]


def code_of(blocks: list[Block], indices: Iterable[int]) -> list[Instruction]:
    return [i for index in indices for i in blocks[index].code if i.opcode != "NOP"]


def ffma(code: list[Instruction]) -> int:
    """Fused multiply-adds; a packed one is two."""
    return sum(i.fp32_results for i in code if i.opcode.startswith("FFMA"))


def conversions(code: list[Instruction]) -> int:
    """Integers converted to float32: three make two normals. None is packed, on any architecture so far."""
    return sum(i.opcode.startswith("I2F") for i in code)
