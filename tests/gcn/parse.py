"""AMD's assembly, as Triton writes it, to a kernel: its basic blocks, where its arguments lie, how its waves begin."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from benchmarks.machine_code import amd
from tests.ptx.parse import PtxError

INSTRUCTION = re.compile(r"\t(?P<opcode>[a-z]\w+)(?:\s+(?P<rest>[^;]*?))?\s*(?:;.*)?$")
RAW = re.compile(r"\t\.(long|byte|short|quad|ascii)\b")  # code that is no instruction
LABEL = re.compile(r"(\.LBB\w+):")
OPERAND = re.compile(r"(?:[^,\[|]|\[[^\]]*\]|\|[^|]*\|)+")
MODIFIER = re.compile(r"\s((?:[a-z]\w*:(?:\[[^\]]*\]|\S+)|clamp|nt|sc0|sc1))(?=\s|$)")
ENDS = re.compile(r"s_branch|s_cbranch_(scc[01]|(vcc|exec)n?z)|s_endpgm|s_barrier")
# Of the mode that a kernel runs in; a float16 that is too large is an infinity.
MODES = {name: str(wanted) for name, wanted in amd.MODES.items()} | {"dx10_clamp": "1", "fp16_overflow": "0"}
# What a wave begins with, of which nothing else is emulated.
BEGINS = {
    "user_sgpr_kernarg_segment_ptr": "1", "user_sgpr_dispatch_ptr": "0", "user_sgpr_queue_ptr": "0",
    "user_sgpr_dispatch_id": "0", "user_sgpr_private_segment_size": "0", "user_sgpr_kernarg_preload_offset": "0",
    "enable_private_segment": "0", "private_segment_fixed_size": "0", "group_segment_fixed_size": "0",
    "system_sgpr_workgroup_id_x": "1", "system_sgpr_workgroup_id_y": "0", "system_sgpr_workgroup_id_z": "0",
    "system_sgpr_workgroup_info": "0", "system_vgpr_workitem_id": "0",
}  # fmt: skip


@dataclass
class Instruction:
    opcode: str
    args: list[str]
    modifiers: dict[str, str]  # "offset": "16"; a word alone has ""
    text: str  # with its line: registers are few, so that the same words stand in several places


@dataclass
class Block:
    code: list[Instruction] = field(default_factory=list)
    end: Instruction | None = None  # what leads elsewhere, or waits


@dataclass
class Kernel:
    name: str
    params: list[tuple[int, int]]  # offset, size
    param_bytes: int
    max_threads: int
    user_sgprs: int
    preloaded: (
        int  # scalar registers that newer firmware fills with the first arguments, and a kernel's first block else
    )
    vgprs: int
    blocks: list[Block]
    labels: dict[str, int]  # block


def parse(text: str) -> Kernel:
    """The kernel of a module, which has one."""
    told = dict(re.findall(r"^\t\t\.amdhsa_(\w+) (\S+)$", text, re.MULTILINE))
    for name, wanted in (MODES | BEGINS).items():
        if told.get(name) != wanted:
            raise PtxError(f".amdhsa_{name} is {told.get(name)}, not {wanted}")
    about = text.partition("amdhsa.kernels:")[2]
    if about.count(".symbol:") != 1:
        raise PtxError("a module of other than one kernel")
    arguments = re.findall(r"\.offset:\s+(\d+)\s+\.size:\s+(\d+)\s+\.value_kind:\s+(\w+)", about)
    if unknown := [kind for *_, kind in arguments if kind not in ("global_buffer", "by_value")]:
        raise PtxError(f"an argument that is {unknown[0]}")
    blocks, labels = _blocks(text.partition("\t.section\t.rodata")[0])
    return Kernel(
        name=re.search(r"\.name:\s+(\w+)", about)[1],  # type: ignore[index]
        params=[(int(at), int(size)) for at, size, _ in arguments],
        param_bytes=int(told["kernarg_size"]),
        max_threads=int(re.search(r"\.max_flat_workgroup_size:\s+(\d+)", about)[1]),  # type: ignore[index]
        user_sgprs=int(told["user_sgpr_count"]),
        preloaded=int(told["user_sgpr_kernarg_preload_length"]),
        vgprs=int(told["next_free_vgpr"]),
        blocks=blocks,
        labels=labels,
    )


def _blocks(code: str) -> tuple[list[Block], dict[str, int]]:
    blocks, labels = [Block()], dict[str, int]()
    for number, line in enumerate(code.splitlines(), 1):
        if label := LABEL.match(line):
            if blocks[-1].code or blocks[-1].end:
                blocks.append(Block())
            labels[label[1]] = len(blocks) - 1
        elif RAW.match(line):
            raise PtxError(f"{line.strip()} in the code")
        elif found := INSTRUCTION.match(line):
            if blocks[-1].end:
                blocks.append(Block())
            instruction = instruction_of(found["opcode"], found["rest"] or "", number)
            if ENDS.fullmatch(instruction.opcode):
                blocks[-1].end = instruction
            else:
                blocks[-1].code.append(instruction)
    return blocks, labels


def instruction_of(opcode: str, rest: str, line: int) -> Instruction:
    modifiers, operands = dict[str, str](), f"{rest} "
    while found := MODIFIER.search(operands):
        name, _, value = found[1].partition(":")
        modifiers[name] = value
        operands = operands[: found.start()] + operands[found.end() :]
    args = [a.strip() for a in OPERAND.findall(operands) if a.strip()]
    return Instruction(opcode, args, modifiers, f"{f'{opcode} {rest}'.strip()} (line {line})")
