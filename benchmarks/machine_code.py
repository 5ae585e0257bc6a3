"""Counts what a kernel costs in machine code, without a GPU: issue slots per element, registers, spills, access widths.

A pass over 16-bit weights is at an H200's copy bandwidth only if it needs about 30 issue slots per element, so this is
measured where it can be kept: in the compiled code. Triton kernels are compiled for a named target, CUDA kernels with
`nvcc -cubin`, both are disassembled with the tools in Triton's wheel (or on PATH). sass.py reads the listing, hot_loop.py
and chain_loop.py say what is counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chain_loop import analyse_chain
from hot_loop import Report, analyse, count_spills
from sass import parse_functions

if TYPE_CHECKING:
    from zokern.contract.rules import Rule

ROOT = Path(__file__).resolve().parent.parent
CUDA_SOURCES = [ROOT / "csrc" / "cuda" / name for name in ("axpy.cu", "hizoo.cu", "moments.cu", "chain.cu")]
ITEM_SIZES = {"float": 4, "bfloat16": 2, "half": 2, "short": 2}  # what ends a template argument's or a dtype's name


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
        registers, stack = resources[mangled]
        if "::chain_kernel<" in name:
            counts = {"registers": registers, "stack_bytes": stack, "spills": count_spills(blocks)}
            reports.append(analyse_chain(name, arch, blocks, **counts))
        else:
            reports.append(analyse(name, arch, blocks, stored_size or _stored_size(name), registers, stack))
    return reports


def demangle(name: str) -> str:
    """The kernel's name with its template arguments, without its parameters, return type and unnamed namespaces."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    text = _run(tool, name).strip() if tool else name
    depth = 0
    for index, letter in enumerate(text):  # the parameter list is the first parenthesis outside all < >
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0 and not text.startswith("(anonymous", index):
            text = text[:index]
            break
    return text.removeprefix("void ").replace("(anonymous namespace)::", "").replace("> >", ">>")


def _stored_size(name: str) -> int:
    """Bytes that a kernel stores for an element, by its template arguments: a dtype, its states' dtype, a rule."""
    from zokern.contract.rules import RULES

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
    from zokern.contract.rules import RULES

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
    from zokern.passes.table import CHUNK, COLUMNS

    (torch_dtype,) = [known for known, named in launch.DTYPES.items() if named == dtype]
    kernel, packed = kernels.pass_kernel, launch.in_pairs(target, torch_dtype)
    signature = {"tensors": "*i64", "chunks": "*i32", "seeds": "*i64", "coefs": "*fp32", "shared": "*fp32",
                 "rounding_seed": "*i64", "enabled": "*i32", "num_seeds": "i32"}  # fmt: skip
    constants = launch.constants(rule) | {
        "WRITTEN": rule.written, "SQUARE_OF_SUM": False, "DTYPE": dtype, "STATE": tl.float32,
        "DISTRIBUTION": distribution, "ROUNDING": rounding, "HAS_NOISE": True,
        "COLUMNS": COLUMNS, "CHUNK": CHUNK, "BLOCK": target.warp_size * launch.NUM_WARPS,
        "PACKED": packed,
    }  # fmt: skip
    signature |= dict.fromkeys(constants, "constexpr")
    # torch's allocations are 16-byte aligned, which the launcher tells Triton of every pointer.
    pointers = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    assembly: dict[str, Any] = triton.compile(source, target=target, options=launch.options(rule, rounding, packed)).asm
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
