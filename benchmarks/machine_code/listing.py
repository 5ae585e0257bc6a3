"""Reads a disassembler's listing: a kernel's basic blocks, its natural loops, and the ways round a loop.

NVIDIA's by `nvdisasm -c`, AMD's as Triton writes its assembly. Opcodes are sorted into the pipes that take them
(docs/machine_code.md); AMD's are in small letters, NVIDIA's in capitals. Addresses do not matter.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable

import networkx

SASS = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?P<predicate>@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>.*?)\s*;"
)
AMD = re.compile(r"^\t(?P<predicate>)(?P<opcode>[a-z]\w+)\s*(?P<operands>[^;]*)")
LABEL, AMD_LABEL = re.compile(r"^(\.L\w+):"), re.compile(r"^(\.LBB\w+):")  # AMD's .Ltmp0 are for debuggers
TARGET = re.compile(r"\(?(\.L\w+)\)?")
# A CALL.REL.NOINC keeps no return address: ptxas leaves loops by it.
BRANCH = re.compile(r"BRA|EXIT|RET|BRX|CALL\.REL\.NOINC|s_c?branch|s_endpgm|s_setpc|s_swappc")
PIPES = {
    "fp32x2": r"(FFMA|FMUL|FADD)2\b",  # from sm_100 on: two results of one instruction
    "fp32": r"FFMA|FMUL|FADD",
    "imad.wide": r"IMAD\.(WIDE|HI)",
    "imad": r"IMAD",
    "xu": r"I2F(?!P)|F2I(?!P)|MUFU",  # on sm_80 an int becomes a float in the unit for transcendental functions
    "convert": r"I2FP|F2F|HADD2\.F32",
    "memory": r"LD|ST(?!L)|STL|ATOM|RED",
    "branch": r"BRA|BRX|BSSY|BSYNC|WARPSYNC|EXIT|CALL|RET|BREAK|s_c?branch|s_endpgm|s_setpc|s_swappc",
    "barrier": r"BAR|s_barrier",
    "uniform": r"U[A-Z]|R2UR|S2UR",
    "int": r"IADD|LOP3|SHF|LEA|PRMT|SEL|ISETP|FSETP|FSEL|FMNMX|IMNMX|VIMNMX|VIADD|IABS|PLOP3|MOV|SHL|SHR|POPC|FLO|BFI",
    # AMD's
    "wait": r"s_(waitcnt|nop|delay|sleep|clause)",
    "smem": r"s_(buffer_)?(load|store|scratch)",
    "salu": r"s_",
    "vmem": r"global_|buffer_|flat_|scratch_",
    "lds": r"ds_",
    "spill": r"v_(read|write)lane|v_accvgpr",  # of scalar registers to lanes of a vector register and back; to AGPRs
    "packed": r"v_pk_\w+_f32",  # two float32 results of one instruction
    "product": r"v_(mul_(lo|hi)|mad_u64|mad_i64)_[ui](32|64)|v_mad_[ui]64_[ui]32",  # of 32-bit integers
    "trans": r"v_(rcp|rsq|sqrt|log|exp|sin|cos)",
    "cvt": r"v_cvt",
    "valu": r"v_",
}
FUSED = r"FFMA|v_(pk_)?fma(c|ak|mk)?_f32"
FP32 = r"v_(fma(c|ak|mk)?|mul|add|sub|subrev|mad|mac)_f32"  # AMD's that are not packed
WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}  # bytes of an access, which else has 4
AMD_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "byte": 1}


# A listing has some hundred thousand instructions, of a few hundred opcodes.
@functools.cache
def _pipe(opcode: str) -> str:
    return next((name for name, pattern in PIPES.items() if re.match(pattern, opcode)), "other")


@functools.cache
def _global_bytes(opcode: str) -> int:
    if found := re.match(r"(?:global|buffer|flat)_(?:load|store)_[us]?(dword\w*|short|byte)", opcode):
        return AMD_WIDTHS[found[1]]
    if not re.match(r"(LDG|STG)\b", opcode):
        return 0
    width = re.search(r"\.(128|64|[US]16|[US]8)\b", opcode)
    return WIDTHS[width[1]] if width else 4


@dataclasses.dataclass(frozen=True)
class Instruction:
    predicated: bool
    opcode: str  # with its modifiers: LDG.E.128
    operands: str

    @property
    def pipe(self) -> str:
        return _pipe(self.opcode)

    @property
    def fp32_results(self) -> int:
        """Float32 sums and products that one thread gets from it."""
        if self.pipe == "valu":
            return int(re.match(FP32, self.opcode) is not None)
        return {"fp32": 1, "fp32x2": 2, "packed": 2}.get(self.pipe, 0)

    @property
    def global_bytes(self) -> int:
        """Bytes that one thread loads or stores in global memory, 0 for other ones."""
        return _global_bytes(self.opcode)

    @property
    def stored(self) -> int:
        return 0 if re.match(r"LDG|[a-z]+_load", self.opcode) else self.global_bytes

    @property
    def falls_through(self) -> bool:
        """Of a branch: whether the next instruction may follow. A predicate is in front or among the operands (BRA UP0)."""
        asked = self.predicated or self.opcode.startswith("s_cbranch")
        return asked or re.match(r"(\.\w+\s+)?!?U?P\d", self.operands) is not None


Code = list[Instruction]
Score = Callable[[Code], tuple[int, ...]]


@dataclasses.dataclass
class Block:
    """A straight piece of code: what it holds and which blocks may follow."""

    code: Code = dataclasses.field(default_factory=list)
    successors: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Loop:
    """A natural loop: its header's index and all of its blocks."""

    header: int
    blocks: frozenset[int]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The blocks of a kernel in the order of its code."""

    blocks: list[Block]

    @functools.cached_property
    def loops(self) -> list[Loop]:
        """Natural loops by their backward branches. The branch to itself behind the last EXIT is padding, not a loop."""
        graph = networkx.DiGraph(
            (i, successor) for i, block in enumerate(self.blocks) for successor in block.successors
        )
        graph.add_node(0)
        live = {0} | networkx.descendants(graph, 0)
        latches: dict[int, set[int]] = {}
        for index, successor in graph.subgraph(live).edges:
            if successor <= index:
                latches.setdefault(successor, set()).add(index)
        found = []
        for header, ends in sorted(latches.items()):
            inner = graph.subgraph(live - {header})
            behind = set().union(*({end} | networkx.ancestors(inner, end) for end in ends - {header}))
            # A loop that is entered at its end has its entry's blocks behind the latches too, but not ahead of the header.
            found.append(Loop(header, frozenset(behind & networkx.descendants(graph, header) | {header})))
        return found

    def within(self, loop: Loop) -> list[Loop]:
        return [other for other in self.loops if other.blocks < loop.blocks]

    def code(self, indices: Iterable[int] | None = None) -> Code:
        """Of these blocks, or of all."""
        chosen = range(len(self.blocks)) if indices is None else indices
        return [i for index in chosen for i in self.blocks[index].code if i.opcode != "NOP"]

    def way(self, loop: Loop, score: Score, without: Iterable[int] = (), uncounted: Iterable[int] = ()) -> Code:
        """Code of the way round `loop`, through every loop inside at most once, whose sum of scores is the largest.

        It may go through the blocks `uncounted`, and may not through those `without`. Empty where there is no way.
        """
        without, uncounted = frozenset(without), frozenset(uncounted)
        inside = frozenset().union(*(other.blocks for other in self.within(loop)))
        nothing = score([])

        @functools.cache
        def best(block: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
            following = [(nothing, ())] if loop.header in self.blocks[block].successors else []
            for successor in self.blocks[block].successors:
                again = block in inside and successor <= block
                if successor in loop.blocks and successor != loop.header and successor not in without and not again:
                    following += [found for found in [best(successor)] if found is not None]
            if not following:
                return None
            more, rest = max(following)
            here = nothing if block in uncounted else score(self.code([block]))
            return tuple(a + b for a, b in zip(here, more, strict=True)), (block, *rest)

        taken = None if loop.header in without else best(loop.header)
        return self.code(block for block in taken[1] if block not in uncounted) if taken else []


def read_sass(text: str) -> dict[str, Kernel]:
    """Output of `nvdisasm -c` to the kernels, by their mangled names."""
    sections = re.split(r"^//-+ (\S+)\s+-+$", text, flags=re.MULTILINE)
    named = zip(sections[1::2], sections[2::2], strict=True)
    return {name.removeprefix(".text."): _kernel(code, SASS) for name, code in named if name.startswith(".text.")}


def read_amd(assembly: str) -> Kernel:
    """Its code ends where the section of its description begins."""
    return _in_order(_kernel(assembly.partition("\t.section\t.rodata")[0], AMD, AMD_LABEL))


def _in_order(kernel: Kernel) -> Kernel:
    """The same with its blocks so that only a loop's way back leads backwards: LLVM puts blocks in front of the header."""
    graph = networkx.DiGraph()
    graph.add_node(0)
    graph.add_edges_from((i, successor) for i, block in enumerate(kernel.blocks) for successor in block.successors)
    order = list(networkx.dfs_postorder_nodes(graph, 0))[::-1]
    place = {block: index for index, block in enumerate(order)}
    return Kernel([Block(kernel.blocks[i].code, [place[s] for s in kernel.blocks[i].successors]) for i in order])


def _kernel(text: str, syntax: re.Pattern[str], labelled: re.Pattern[str] = LABEL) -> Kernel:
    blocks, labels, ends = [Block()], dict[str, int](), dict[int, Instruction]()
    for line in text.splitlines():
        if label := labelled.match(line):
            if blocks[-1].code:
                blocks.append(Block())
            labels[label[1]] = len(blocks) - 1
        elif found := syntax.match(line):
            instruction = Instruction(bool(found["predicate"]), found["opcode"], found["operands"].strip())
            blocks[-1].code.append(instruction)
            if BRANCH.match(instruction.opcode):
                ends[len(blocks) - 1] = instruction
                blocks.append(Block())
    for index, block in enumerate(blocks):
        end = ends.get(index)
        target = end and TARGET.search(end.operands)
        if target and target[1] in labels:
            block.successors.append(labels[target[1]])
        if (end is None or end.falls_through) and index + 1 < len(blocks):
            block.successors.append(index + 1)
    return Kernel(blocks)


def ffma(code: Code) -> int:
    """Fused multiply-adds; a packed one is two."""
    return sum(i.fp32_results for i in code if re.match(FUSED, i.opcode))


def conversions(code: Code) -> int:
    """Integers converted to float32: three make two normals. None is packed, on any architecture so far."""
    return sum(bool(re.match(r"I2F|v_cvt_f32_[ui]32", i.opcode)) for i in code)


def stored(code: Code) -> int:
    """Bytes that one thread stores in global memory."""
    return sum(i.stored for i in code)


def per_element(code: Code, elements: float) -> dict[str, float]:
    """Instructions by the pipes that take them."""
    return {pipe: n / elements for pipe, n in Counter(i.pipe for i in code).items()}
