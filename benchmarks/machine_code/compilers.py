"""Compiles kernels without a GPU and has them counted: CUDA's by `nvcc -cubin`, Triton's for a named target.

Both are disassembled with the tools in Triton's wheel, or on PATH.
"""

from __future__ import annotations

import contextlib
import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from zokern.contract.rules import RULES, Rule

from . import amd
from .amd import AMD, WAVE
from .counts import Pipes, Report, analyse, further_factor
from .listing import read_amd, read_sass

ROOT = Path(__file__).resolve().parents[2]
CUDA_NAMES = ("axpy.cu", "hizoo.cu", "moments.cu", "chain.cu", "lowrank.cu", "lowrank_chain.cu")
CUDA_SOURCES = [ROOT / "csrc" / "cuda" / name for name in CUDA_NAMES]
DTYPES = {"float": "float32", "__half": "float16", "__nv_bfloat16": "bfloat16",
          "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # fmt: skip
NUMBERS = {"distribution": ("normal", "rademacher", "any"), "rounding": ("nearest", "stochastic", "any"),
           "seeds": ("one", "any")}  # fmt: skip
STRUCTS = {"HiZOO<false>": "hizoo", "HiZOO<true>": "hizoo_restore", "ScaledAxpy": "scaled_axpy"}
OF_RULE = r"_kernel<(?P<dtype>\w+), (?P<state>\w+), zk::gpu::(?P<rule>[\w<>]+)"
NAMES = {  # of kernels, demangled, and as we call Triton's
    ("cuda", "pass"): rf"\S+::rule{OF_RULE}, \(\w+::Distribution\)(?P<distribution>\d), "
                      r"\(\w+::Rounding\)(?P<rounding>\d), \(\w+::cuda::Seeds\)(?P<seeds>\d)>",
    ("cuda", "chain"): rf"\S+::(?:(?P<distribution>low_rank)_)?chain{OF_RULE}>",
    ("cuda", "low rank"): rf"\S+::(?P<distribution>low_rank){OF_RULE}, \(\w+::Rounding\)(?P<rounding>\d)>",
    ("triton", "pass"): r"triton (?P<rule>\w+)<(?P<dtype>\w+), (?P<distribution>\w+), (?P<rounding>\w+)>",
}  # fmt: skip
Row = dict[str, Any]


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


def _run(name: str, *arguments: str) -> str:
    tool = find_tool(name)
    if tool is None:
        raise RuntimeError(f"{name} is neither in Triton's wheel nor on PATH")
    done = subprocess.run([tool, *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join([tool, *arguments])} failed:\n{done.stderr}{done.stdout}")
    return done.stdout


def analyse_cubin(cubin: Path, arch: int, title: str | None = None, stored: int | None = None) -> list[Report]:
    """All kernels of a cubin. stored: bytes that each stores for an element; None where they are ours."""
    usage = _run("cuobjdump", "-res-usage", str(cubin))
    resources = {m[1]: (int(m[2]), int(m[3])) for m in re.finditer(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)}
    reports = []
    for mangled, kernel in read_sass(_run("nvdisasm", "-c", str(cubin))).items():
        name = title or demangle(mangled)
        if name.endswith("fill_kernel"):
            continue  # makes factors: few numbers for each pass
        reports.append(analyse(name, arch, kernel, stored or stored_size(name), *resources[mangled]))
    return reports


def demangle(name: str) -> str:
    """The kernel's name with its template arguments, without its parameters, return type and unnamed namespaces."""
    tool = next(filter(shutil.which, ("cu++filt", "c++filt")), None)
    text = _run(tool, name).strip() if tool else name
    depth = 0
    for index, letter in enumerate(text):  # the parameter list is the first parenthesis outside all < >
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0 and not text.startswith("(anonymous", index):
            text = text[:index]
            break
    return text.removeprefix("void ").replace("(anonymous namespace)::", "").replace("> >", ">>")


def kind(name: str) -> Row:
    """What a kernel is for, from its name; "any" of what it decides at run time."""
    for (backend, kernel), pattern in NAMES.items():
        if found := re.fullmatch(pattern, name):
            told = {key: found.groupdict().get(key) or "any" for key in NUMBERS}
            told |= {key: NUMBERS[key][int(number)] for key, number in told.items() if number.isdigit()}
            rule, state = found["rule"], found.groupdict().get("state", "float")
            return {
                "backend": backend, "kernel": kernel.replace("low rank", "pass"), "name": name,
                "rule": STRUCTS.get(rule, rule.lower()), "dtype": DTYPES[found["dtype"]], "state": DTYPES[state], **told,
            }  # fmt: skip
    raise ValueError(f"{name} is no name of a kernel of ours")


def stored_size(name: str) -> int:
    """Bytes that a kernel stores for an element."""
    row = kind(name)
    weight, state = (getattr(torch, row[key]).itemsize for key in ("dtype", "state"))
    return weight + state * RULES[row["rule"]].written


def compile_cuda(source: Path, arch: int, stored: int | None = None) -> list[Report]:
    """Every kernel of a .cu file, by nvcc; contraction off, as the noise contract asks."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        options = ["-cubin", f"-arch=sm_{arch}", "-std=c++17", "-O3", "--fmad=false"]
        _run("nvcc", *options, "-o", str(cubin), str(source))
        return analyse_cubin(cubin, arch, stored=stored)


def triton_passes() -> list[tuple[str, Rule, Any, str, str]]:
    """Those that are counted, by name: rule, dtype, distribution and rounding.

    The first-order one of every kind; the other rules of bf16 and fp32 weights, with normals and of low rank.
    """
    from zokern.backends.triton import launch

    passes = []
    for rule in RULES.values():
        first_order = rule.name == "axpy"
        for dtype in [dtype for dtype in launch.DTYPES.values() if first_order or str(dtype) != "fp16"]:
            for distribution in ("normal", "rademacher", "low_rank") if first_order else ("normal", "low_rank"):
                for rounding in ("nearest",) if dtype.primitive_bitwidth == 32 else ("nearest", "stochastic"):
                    name = f"triton {rule.name}<{dtype}, {distribution}, {rounding}>"
                    passes.append((name, rule, dtype, distribution, rounding))
    return passes


def compile_triton(arch: int | str, only: str = "") -> list[Report]:
    """The Triton passes that are counted, for sm_<arch> or AMD's; `only` those in whose name this pattern is found.

    A pass of low rank is compiled for one factor, and for any number of them to see what a further one takes.
    """
    reports = []
    for name, rule, dtype, distribution, rounding in triton_passes():
        if re.search(only, name):
            kind = "lowrank1" if distribution == "low_rank" else distribution
            report = _analyse_triton(name, arch, compile_pass(target(arch), rule, dtype, kind, rounding))
            if distribution == "low_rank":
                further = _further_factor(name, arch, compile_pass(target(arch), rule, dtype, "lowrank", rounding))
                report |= {"slots_per_extra_rank": math.fsum(further.values()), "pipes_per_extra_rank": further}
            reports.append(report)
    return reports


def target(arch: int | str) -> Any:
    """Triton's name of an architecture."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget("hip", arch, WAVE) if arch in AMD else GPUTarget("cuda", arch, 32)


def _analyse_triton(name: str, arch: int | str, forms: dict[str, Any]) -> Report:
    if arch in AMD:
        return amd.analyse(name, str(arch), forms["amdgcn"], forms["llir"], stored_size(name))
    with _cubin(forms) as path:
        (report,) = analyse_cubin(path, int(arch), name)
    return report


def _further_factor(name: str, arch: int | str, forms: dict[str, Any]) -> Pipes:
    if arch in AMD:
        return further_factor(name, read_amd(forms["amdgcn"]))
    with _cubin(forms) as path:
        (kernel,) = read_sass(_run("nvdisasm", "-c", str(path))).values()
    return further_factor(name, kernel)


@contextlib.contextmanager
def _cubin(forms: dict[str, Any]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(forms["cubin"])
        yield path


def compile_pass(target: Any, rule: Rule, dtype: Any, distribution: str, rounding: str) -> dict[str, Any]:
    """The Triton pass for a target, in all its forms by name, with the options and hints that a launch gives it."""
    import triton
    import triton.language as tl
    from triton.compiler import ASTSource

    from zokern.backends.triton import kernels, launch
    from zokern.passes.table import CHUNK, COLUMNS

    (torch_dtype,) = [known for known, named in launch.DTYPES.items() if named == dtype]
    kernel = kernels.pass_kernel
    signature = {"tensors": "*i64", "chunks": "*i32", "seeds": "*i64", "coefs": "*fp32", "shared": "*fp32",
                 "rounding_seed": "*i64", "enabled": "*i32", "num_seeds": "i32"}  # fmt: skip
    constants = launch.constants(rule) | {
        "WRITTEN": rule.written, "SQUARE_OF_SUM": False, "DTYPE": dtype, "STATE": tl.float32,
        "DISTRIBUTION": distribution, "ROUNDING": rounding, "HAS_NOISE": True,
        "COLUMNS": COLUMNS, "CHUNK": CHUNK, "BLOCK": launch.block(target),
        **launch.of_target(target, torch_dtype), "APART": launch.apart(target, torch_dtype, distribution),
    }  # fmt: skip
    factors = {"factor_rows": "*i64", "values": "i64", "of_seed": "i32", "rank": "i32", "first_chunk": "i32"}
    if distribution == "lowrank1":  # of rank 1
        del factors["rank"]
        signature |= factors
        constants |= {"rank": None, "DISTRIBUTION": "lowrank"}
    elif distribution == "lowrank":
        signature |= factors
    else:
        constants |= dict.fromkeys(factors)
    signature |= dict.fromkeys(constants, "constexpr")
    # torch's allocations are 16-byte aligned, which the launcher tells Triton of every pointer.
    pointers = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    chosen = launch.options(target, rule, torch_dtype, rounding, str(constants["DISTRIBUTION"]))
    assembly: dict[str, Any] = triton.compile(source, target=target, options=chosen).asm
    return assembly
