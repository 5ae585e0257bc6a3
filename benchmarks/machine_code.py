"""Counts what a kernel costs in machine code, without a GPU: issue slots per element, registers, spills, access widths.

A pass over 16-bit weights is at an H200's copy bandwidth only if it needs about 30 issue slots per element, so this is
measured where it can be kept: in the compiled code. Triton kernels are compiled for a named target, CUDA kernels with
`nvcc -cubin`, both are disassembled with the tools in Triton's wheel (or on PATH). The hot loop is the loop with the
widest global stores; counted is the way round it that an ordinary iteration takes, which neither enters an inner loop
nor touches memory in narrower pieces (masked slow paths), and which where a kernel decides at run time draws normals,
writes every state and rounds to nearest. An inner loop is the loop over further seeds. Instructions of the uniform
datapath take issue slots like any other. Longer than other files because it is a tool of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zokern.rules import Rule

ROOT = Path(__file__).resolve().parent.parent
CUDA_SOURCES = [ROOT / "csrc" / "cuda" / name for name in ("axpy.cu", "hizoo.cu", "moments.cu")]
ITEM_SIZES = {"float": 4, "bfloat16": 2, "half": 2, "short": 2}  # what ends a template argument's or a dtype's name
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"^(\.L\w+):")
TARGET = re.compile(r"\(?(\.L\w+)\)?")
PIPES = {
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


# ------------------------------------------------------------------------------------------------------ control flow


@dataclasses.dataclass(frozen=True)
class Instruction:
    predicated: bool
    opcode: str  # with its modifiers: LDG.E.128
    operands: str

    @property
    def pipe(self) -> str:
        return next((name for name, pattern in PIPES.items() if re.match(pattern, self.opcode)), "other")

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


# ------------------------------------------------------------------------------------------------------------- report


@dataclasses.dataclass
class Report:
    """One kernel's costs. Slots are issued instructions per element; None where there is no such loop."""

    name: str
    arch: int
    registers: int
    stack_bytes: int
    spills: int  # loads and stores of local memory, anywhere in the kernel
    elements_per_iteration: int
    slots_per_element_k1: float | None
    slots_per_extra_seed: float | None
    barriers_in_loop: int
    global_bytes_in_loop: list[int]  # of each access on the hot path
    pipes: dict[str, int]  # instructions on the hot path
    pipes_extra_seed: dict[str, int]
    per_element: dict[str, float]  # instructions by pipe, for one seed; together slots_per_element_k1


def _code(blocks: list[Block], indices: Iterable[int]) -> list[Instruction]:
    return [i for index in indices for i in blocks[index].code if i.opcode != "NOP"]


def _path(
    blocks: list[Block], loop: Loop, without: set[int], passing: frozenset[int] | set[int] = frozenset()
) -> list[Instruction]:
    """Code of the way round the loop, avoiding the blocks `without`, that an ordinary iteration takes.

    Through the blocks `passing`, those of inner loops, it goes without counting them and without going round.

    It is that with the most normals (rather than signs), then the most stored (every state), then, in loops without
    normals, the most arithmetic (a guard for "no seeds" jumps over it), then the shortest (no fix-ups, and no stochastic
    rounding where that is asked at run time).
    """
    has_normals = _conversions(_code(blocks, loop.blocks)) > 0

    @functools.cache
    def best(block: int) -> tuple[tuple[int, int, int, int], tuple[int, ...]] | None:
        code = [] if block in passing else _code(blocks, [block])
        stored = sum(i.global_bytes for i in code if i.opcode.startswith("STG"))
        arithmetic = 0 if has_normals else sum(i.pipe == "fp32" for i in code)
        following: list[tuple[tuple[int, int, int, int], tuple[int, ...]]] = (
            [((0, 0, 0, 0), ())] if loop.header in blocks[block].successors else []
        )
        for successor in blocks[block].successors:
            again = block in passing and successor <= block
            if successor in loop.blocks and successor != loop.header and successor not in without and not again:
                following += [way for way in [best(successor)] if way is not None]
        if not following:
            return None
        (normals, more_stored, more, length), rest = max(following)
        cost = normals + _conversions(code), more_stored + stored, more + arithmetic, length - len(code)
        return cost, (block, *rest)

    way = None if loop.header in without else best(loop.header)
    return _code(blocks, [block for block in way[1] if block not in passing]) if way else []


def _ffma(code: list[Instruction]) -> int:
    return sum(i.opcode.startswith("FFMA") for i in code)


def _conversions(code: list[Instruction]) -> int:
    """Integers converted to float32: three make two normals."""
    return sum(i.opcode.startswith("I2F") for i in code)


@dataclasses.dataclass
class HotLoop:
    """A loop that stores elements: the code of its path, and of the loop over seeds inside it, if any."""

    store_width: int
    stored_bytes: int  # in an iteration
    code: list[Instruction]
    inner: list[Instruction]

    @property
    def extra(self) -> float:
        """Slots per element of one seed in the inner loop, which may be unrolled: the elements are counted by their
        noise. Three conversions make two normals; a sign costs one fused multiply-add in a rule without sums."""
        conversions = _conversions(self.inner)
        return len(self.inner) / (conversions * 2 / 3 if conversions else _ffma(self.inner))

    def per_element(self, stored_size: int) -> dict[str, float]:
        """Instructions per element by pipe, for one seed. It runs in the inner loop unless it is peeled off."""
        elements = self.stored_bytes // stored_size
        counts = Counter({pipe: n / elements for pipe, n in Counter(i.pipe for i in self.code).items()})
        noise = _conversions if _conversions(self.inner) else _ffma
        if noise(self.code) < noise(self.inner) / 2:
            inner_elements = len(self.inner) / self.extra
            counts.update({pipe: n / inner_elements for pipe, n in Counter(i.pipe for i in self.inner).items()})
        return dict(counts.most_common())

    def slots(self, stored_size: int) -> float:
        """Slots per element for one seed."""
        return math.fsum(self.per_element(stored_size).values())


def _hot_loops(blocks: list[Block]) -> list[HotLoop]:
    """The loops with the widest stores, and most of them: several where a kernel has one for each kind of pass."""
    loops, found = find_loops(blocks), []
    for loop in loops:
        within = [other for other in loops if other.blocks < loop.blocks]
        inside = set().union(*(other.blocks for other in within))
        stores = [i.global_bytes for i in _code(blocks, loop.blocks - inside) if i.opcode.startswith("STG")]
        wide = max(stores, default=0)
        narrow = {b for b in loop.blocks if any(0 < i.global_bytes < wide for i in _element_accesses(blocks[b].code))}
        code = _path(blocks, loop, inside | narrow)
        if not code:  # no way leads past the loop over seeds: there is at least one
            code = _path(blocks, loop, narrow - inside, inside)
        stored = sum(i.global_bytes for i in code if i.opcode.startswith("STG"))
        # The loop over seeds; of two, the shorter is that over the seeds whose keys are ready.
        inner = max((_path(blocks, other, set()) for other in within), key=lambda c: (_ffma(c), -len(c)), default=[])
        if stored:
            found.append(HotLoop(wide, stored, code, inner if _ffma(inner) else []))
    best = max(((h.store_width, h.stored_bytes) for h in found), default=None)
    found = [h for h in found if (h.store_width, h.stored_bytes) == best]
    for noise in (_conversions, _ffma):  # a loop of its own for "no seeds" is not hot
        if noisy := [h for h in found if noise(h.code + h.inner)]:
            return noisy
    return found


def analyse(name: str, arch: int, blocks: list[Block], stored_size: int, registers: int, stack_bytes: int) -> Report:
    """Finds the hot loop of one kernel, which stores `stored_size` bytes for an element, and counts it."""
    spills = sum(bool(re.match(r"LDL|STL", i.opcode)) for i in _code(blocks, range(len(blocks))))
    hot = _hot_loops(blocks)
    if not hot:
        return Report(name, arch, registers, stack_bytes, spills, 0, None, None, 0, [], {}, {}, {})
    one = min(hot, key=lambda h: h.slots(stored_size))
    more = min((h for h in hot if h.inner), key=lambda h: h.extra, default=None)
    extra_code = more.inner if more else []
    return Report(
        name, arch, registers, stack_bytes, spills, one.stored_bytes // stored_size, one.slots(stored_size),
        more.extra if more else None,
        barriers_in_loop=sum(i.pipe == "barrier" for i in one.code + extra_code),
        global_bytes_in_loop=[i.global_bytes for i in one.code if i.global_bytes],
        pipes=dict(Counter(i.pipe for i in one.code).most_common()),
        pipes_extra_seed=dict(Counter(i.pipe for i in extra_code).most_common()),
        per_element=one.per_element(stored_size),
    )  # fmt: skip


def _element_accesses(code: list[Instruction]) -> list[Instruction]:
    """Stores, and loads that are narrower than a word: other loads may fetch seeds and coefficients."""
    return [i for i in code if i.opcode.startswith("STG") or i.global_bytes < 4]


# ---------------------------------------------------------------------------------------------------------- compilers


def find_tool(name: str) -> str | None:
    """A tool of the CUDA toolkit: out of Triton's wheel, or from PATH."""
    try:
        import triton

        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        if bundled.exists():
            return str(bundled)
    except ImportError:
        pass  # Triton is only one place to look in
    return shutil.which(name)


def _run(*command: str) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}{done.stdout}")
    return done.stdout


def _tool(name: str, *arguments: str) -> str:
    path = find_tool(name)
    if path is None:
        raise RuntimeError(f"{name} is neither in Triton's wheel nor on PATH")
    return _run(path, *arguments)


def analyse_cubin(cubin: Path, arch: int, stored_size: int | None = None, title: str | None = None) -> list[Report]:
    """All kernels of a cubin. Without `stored_size` it is read off the demangled names."""
    usage = _tool("cuobjdump", "-res-usage", str(cubin))
    resources = {m[1]: (int(m[2]), int(m[3])) for m in re.finditer(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)}
    reports = []
    for mangled, blocks in parse_functions(_tool("nvdisasm", "-c", str(cubin))).items():
        name = title or demangle(mangled)
        reports.append(analyse(name, arch, blocks, stored_size or _stored_size(name), *resources[mangled]))
    return reports


def demangle(name: str) -> str:
    """The kernel's name with its template arguments, without its parameters and its return type."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    text = _run(tool, name).strip() if tool else name
    depth = 0
    for index, letter in enumerate(text):  # the parameter list is the first parenthesis outside all < >
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0 and not text.startswith("(anonymous", index):
            text = text[:index]
            break
    return text.removeprefix("void ")


def _stored_size(name: str) -> int:
    """Bytes that a kernel stores for an element, by its template arguments: a dtype, its states' dtype, a rule."""
    from zokern.rules import RULES

    sizes = [ITEM_SIZES[found] for found in re.findall(r"[<,]\s*[\w ]*?(" + "|".join(ITEM_SIZES) + r")\d*\b", name)]
    written = {rule.name.replace("_", ""): rule.written for rule in RULES.values()}
    struct = re.search(r"::gpu::(\w+)", name)
    return (sizes or [4])[0] + (sizes[1] * written[struct[1].lower()] if struct else 0)


def compile_cuda(source: Path, arch: int, flags: Sequence[str] = ()) -> list[Report]:
    """Every kernel of a .cu file, by nvcc; contraction off, as the noise contract asks."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        options = ["-cubin", f"-arch=sm_{arch}", "-std=c++17", "-O3", "--fmad=false", *flags]
        _run("nvcc", *options, "-o", str(cubin), str(source))
        return analyse_cubin(cubin, arch)


def triton_kinds() -> Iterator[tuple[Rule, Any, str, str]]:
    """Rule, dtype, distribution and rounding of the Triton passes that are counted: the first-order one in all of them,
    the other rules of bf16 and fp32 weights with normals and float32 states."""
    from zokern.backends.triton import launch
    from zokern.rules import RULES

    for rule in RULES.values():
        first_order = rule.name == "axpy"
        for dtype in [dtype for dtype in launch.DTYPES.values() if first_order or str(dtype) != "fp16"]:
            for distribution in ("normal", "rademacher") if first_order else ("normal",):
                for rounding in ("nearest",) if dtype.primitive_bitwidth == 32 else ("nearest", "stochastic"):
                    yield rule, dtype, distribution, rounding


def compile_triton(arch: int) -> list[Report]:
    """The Triton passes for sm_<arch>, with the options they are launched with."""
    reports = []
    for rule, dtype, distribution, rounding in triton_kinds():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(_triton_cubin(arch, rule, dtype, distribution, rounding))
            stored_size = dtype.primitive_bitwidth // 8 + 4 * rule.written
            name = f"triton {rule.name}<{dtype}, {distribution}, {rounding}>"
            reports += analyse_cubin(path, arch, stored_size, name)
    return reports


def _triton_cubin(arch: int, rule: Rule, dtype: Any, distribution: str, rounding: str) -> bytes:
    from triton.backends.compiler import GPUTarget

    cubin: bytes = compile_pass(GPUTarget("cuda", arch, 32), rule, dtype, distribution, rounding)["cubin"]
    return cubin


def compile_pass(target: Any, rule: Rule, dtype: Any, distribution: str, rounding: str) -> dict[str, Any]:
    """The Triton pass for a target, in all its forms by name, with the options and hints that a launch gives it."""
    import triton
    import triton.language as tl
    from triton.compiler import ASTSource

    from zokern.backends.triton import kernels, launch
    from zokern.table import CHUNK, COLUMNS

    kernel = kernels.pass_kernel
    signature = {"tensors": "*i64", "chunks": "*i32", "seeds": "*i64", "coefs": "*fp32", "shared": "*fp32",
                 "rounding_seed": "*i64", "enabled": "*i32", "num_seeds": "i32"}  # fmt: skip
    constants = launch.constants(rule) | {
        "WRITTEN": rule.written, "SQUARE_OF_SUM": False, "DTYPE": dtype, "STATE": tl.float32,
        "DISTRIBUTION": distribution, "ROUNDING": rounding, "HAS_NOISE": True,
        "COLUMNS": COLUMNS, "CHUNK": CHUNK, "BLOCK": target.warp_size * launch.NUM_WARPS,
    }  # fmt: skip
    signature |= dict.fromkeys(constants, "constexpr")
    # torch's allocations are 16-byte aligned, which the launcher tells Triton of every pointer.
    pointers = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    assembly: dict[str, Any] = triton.compile(source, target=target, options=dict(launch.LAUNCH_OPTIONS)).asm
    return assembly


# ------------------------------------------------------------------------------------------------------ command line


def table(reports: list[Report]) -> str:
    def number(x: float | None) -> str:
        return "-" if x is None else f"{x:.1f}"

    rows: list[tuple[str, ...]] = [
        ("kernel", "sm", "slots/elem", "per extra seed", "regs", "spills", "stack", "bars", "accesses", "pipes")
    ]
    for r in reports:
        widths = ", ".join(f"{n}x{w}B" for w, n in sorted(Counter(r.global_bytes_in_loop).items(), reverse=True))
        pipes = " ".join(f"{name}:{count}" for name, count in r.pipes.items())
        slots = number(r.slots_per_element_k1), number(r.slots_per_extra_seed)
        counts = r.registers, r.spills, r.stack_bytes, r.barriers_in_loop
        rows.append((r.name, str(r.arch), *slots, *map(str, counts), widths, pipes))
    columns = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(n) for cell, n in zip(row, columns, strict=True)).rstrip() for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], epilog="nvcc is for cuda only.")
    parser.add_argument("--arch", type=int, nargs="+", default=[90], help="compute capabilities (default: 90)")
    parser.add_argument("--kernels", nargs="+", choices=["triton", "cuda"], default=["triton", "cuda"],
                        help="which kernels to compile (default: both)")  # fmt: skip
    parser.add_argument("--source", type=Path, nargs="+", default=CUDA_SOURCES,
                        help="the .cu files (default: all with kernels of passes)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all counts to FILE")
    options = parser.parse_args(arguments)
    if "triton" in options.kernels and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set, so Triton would not compile: unset it")
    reports: list[Report] = []
    for arch in options.arch:
        if "triton" in options.kernels:
            reports += compile_triton(arch)
        if "cuda" in options.kernels:
            for source in options.source:
                reports += compile_cuda(source, arch)
    print(table(reports))
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(r) for r in reports], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # zokern may not be installed
    sys.exit(main())
