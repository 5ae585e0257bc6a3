"""Counts the instructions of Triton's AMD code (gfx942: MI300X) in the loop over whole tiles, from its assembly.

As machine_code.py does it for NVIDIA, with the same loops, but simpler: the hot loop is the one with 16-byte stores and
none narrower, and all of it is counted except the loop over further seeds inside it. A wave's instruction serves 64
lanes, each of which has eight elements; so instructions / 8 are slots per element. Registers are vector registers.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable

from sass import Block, Instruction, find_loops

WARP = 64
LABEL = re.compile(r"^(\.LBB\d+_\d+):")
INSTRUCTION = re.compile(r"^\t([a-z]\w+)\s*([^;]*)")
PIPES = {
    "wait": r"s_(waitcnt|nop|barrier|delay|sleep|clause)",
    "branch": r"s_c?branch|s_endpgm|s_setpc|s_swappc",
    "smem": r"s_(buffer_)?(load|store|scratch)",
    "salu": r"s_",
    "vmem": r"global_|buffer_|flat_|scratch_",
    "lds": r"ds_",
    "valu": r"v_",
}
WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2, "byte": 1}


@dataclasses.dataclass
class AmdReport:
    """Per element where it says so; None where there is no such loop."""

    slots: float | None
    extra_slots: float | None
    registers: int
    scalar_registers: int
    spills: int  # vector registers, to memory
    scalar_spills: int  # scalar registers, to lanes of a vector register
    vector_bytes: int
    pipes: dict[str, float]


def pipe(opcode: str) -> str:
    return next((name for name, pattern in PIPES.items() if re.match(pattern, opcode)), "other")


def stored(opcode: str) -> int:
    """Bytes that a lane stores in global memory, 0 for other instructions."""
    found = re.match(r"(?:global|buffer|flat)_store_(\w+?)(?:_d16_hi)?$", opcode)
    return WIDTHS[found[1]] if found else 0


def parse(assembly: str) -> list[Block]:
    """The kernel's basic blocks. Its code ends where the section of its description begins."""
    blocks, labels = [Block()], {}
    targets: dict[int, tuple[str, bool]] = {}
    for line in assembly.partition("\t.section\t.rodata")[0].splitlines():
        if label := LABEL.match(line):
            if blocks[-1].code:
                blocks.append(Block())
            labels[label[1]] = len(blocks) - 1
        elif found := INSTRUCTION.match(line):
            opcode, operands = found[1], found[2].strip()
            blocks[-1].code.append(Instruction(False, opcode, operands))
            if pipe(opcode) == "branch":
                targets[len(blocks) - 1] = (operands, opcode.startswith("s_cbranch"))
                blocks.append(Block())
    for index, block in enumerate(blocks):
        target, falls_through = targets.get(index, ("", True))
        if target in labels:
            block.successors.append(labels[target])
        if falls_through and index + 1 < len(blocks):
            block.successors.append(index + 1)
    return blocks


def _opcodes(blocks: list[Block], indices: Iterable[int]) -> list[str]:
    return [i.opcode for index in sorted(indices) for i in blocks[index].code]


def _noise(code: list[str]) -> int:
    """Conversions of integers, or where there are none (signs) fused multiply-adds."""
    converted = sum(opcode.startswith("v_cvt_f32_") and "32_e" in opcode for opcode in code)
    return converted or sum("fma" in opcode or "fmac" in opcode for opcode in code)


def analyse(assembly: str, stored_size: int) -> AmdReport:
    """`stored_size`: bytes that a pass stores for an element, its states' included."""

    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1])  # type: ignore[index]

    registers = [number(key) for key in ("vgpr_count", "sgpr_count", "vgpr_spill_count", "sgpr_spill_count")]
    blocks = parse(assembly)
    loops = find_loops(blocks)
    for loop in loops:
        within = [other.blocks for other in loops if other.blocks < loop.blocks]
        code = _opcodes(blocks, loop.blocks.difference(*within))
        widths = {stored(opcode) for opcode in code} - {0}
        if widths != {16}:
            continue
        elements = sum(map(stored, code)) // stored_size
        inner = max((_opcodes(blocks, other) for other in within), key=_noise, default=[])
        pipes = {name: n / elements for name, n in Counter(map(pipe, code)).most_common()}
        extra = len(inner) / elements if inner else None
        return AmdReport(len(code) / elements, extra, *registers, 16, pipes)
    return AmdReport(None, None, *registers, 0, {})
