"""Every kernel's machine code on every architecture, what speed it allows, and the page on it, docs/machine_code.md.

python benchmarks/machine_code_table.py --measure   # compiles everything (minutes) into results/machine_code.json
python benchmarks/machine_code_table.py             # rewrites page and CSV (machine_code_page.py) from the stored results
python benchmarks/machine_code_table.py --check     # exit code 1 if page or CSV is not what this would write

A row of the JSON is one kernel on one architecture: slots, slots_per_extra_seed and pipes (pipes_extra: of a further
seed) are instructions per element, vector_bytes is the width of a global access in the hot loop, arch is 90 for sm_90 or
the name of an AMD target. Of a chain's kernel ("kernel": "chain") they are those of a stage, slots_stochastic those of a
stage with stochastic rounding, slots_once those of the tile around the stages (chain_loop.py).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pages import ROOT, update

sys.path.insert(0, str(ROOT))  # zokern may not be installed
import machine_code
from hot_loop import Report
from machine_code_page import AMD, ARCHS, RESULTS, Row, parts, table_of_all

from zokern.contract.rules import RULES

STORED = RESULTS / "machine_code.json"
ALL = RESULTS / "machine_code.csv"
DTYPES = {"float": "float32", "__half": "float16", "__nv_bfloat16": "bfloat16",
          "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # fmt: skip
DISTRIBUTIONS, ROUNDINGS, SEEDS = ("normal", "rademacher", "any"), ("nearest", "stochastic", "any"), ("one", "any")
STRUCTS = {"HiZOO<false>": "hizoo", "HiZOO<true>": "hizoo_restore", "ScaledAxpy": "scaled_axpy"}
CUDA = re.compile(r"rule_kernel<(\w+), (\w+), zk::gpu::([\w<>]+), \(\w+::Distribution\)(\d), \(\w+::Rounding\)(\d), "
                  r"\(\w+::cuda::Seeds\)(\d)>")  # fmt: skip
CHAIN = re.compile(r"chain_kernel<(\w+), (\w+), zk::gpu::([\w<>]+)>$")
TRITON = re.compile(r"triton (\w+)<(\w+), (\w+), (\w+)>")


def kind(name: str) -> Row:
    """What a kernel is for, from its name in machine_code.py's reports."""
    if found := CUDA.search(name):
        dtype, state, struct, *numbers = found.groups()
        distribution, rounding, seeds = (
            names[int(n)] for names, n in zip((DISTRIBUTIONS, ROUNDINGS, SEEDS), numbers, strict=True)
        )
        rule = STRUCTS.get(struct, struct.lower())
        return {"backend": "cuda", "kernel": "pass", "name": name, "rule": rule, "dtype": DTYPES[dtype],
                "state": DTYPES[state], "distribution": distribution, "rounding": rounding,
                "seeds": seeds}  # fmt: skip
    if found := CHAIN.search(name):
        dtype, state, struct = found.groups()
        return {"backend": "cuda", "kernel": "chain", "name": name, "rule": STRUCTS.get(struct, struct.lower()),
                "dtype": DTYPES[dtype], "state": DTYPES[state], "distribution": "any", "rounding": "any",
                "seeds": "any"}  # fmt: skip
    if found := TRITON.fullmatch(name):
        rule, dtype, distribution, rounding = found.groups()
        return {"backend": "triton", "kernel": "pass", "name": name, "rule": rule, "dtype": DTYPES[dtype],
                "state": "float32", "distribution": distribution, "rounding": rounding, "seeds": "any"}  # fmt: skip
    raise ValueError(f"{name} is no name of a kernel of ours")


def nvidia_row(report: Report) -> Row:
    row = {
        **kind(report.name), "arch": report.arch, "slots": _rounded(report.slots_per_element_k1),
        "slots_per_extra_seed": _rounded(report.slots_per_extra_seed), "registers": report.registers,
        "spills": report.spills, "vector_bytes": min(report.global_bytes_in_loop, default=0),
        "pipes": _pipes(report.per_element), "pipes_extra": _pipes(report.extra_per_element),
    }  # fmt: skip
    for name, pipes in (("once", report.once_per_element), ("stochastic", report.stochastic_per_element)):
        if pipes is not None:
            row |= {f"slots_{name}": _rounded(sum(pipes.values())), f"pipes_{name}": _pipes(pipes)}
    return row


def _pipes(counts: Mapping[str, float]) -> dict[str, float | None]:
    return {pipe: _rounded(n) for pipe, n in counts.items()}


def _rounded(x: float | None) -> float | None:
    return None if x is None else round(x, 4)


def amd_rows() -> Iterator[Row]:
    import amdgcn
    from triton.backends.compiler import GPUTarget

    for rule, dtype, distribution, rounding in machine_code.triton_kinds():
        assembly = machine_code.compile_pass(GPUTarget("hip", AMD, amdgcn.WARP), rule, dtype, distribution, rounding)
        r = amdgcn.analyse(assembly["amdgcn"], dtype.primitive_bitwidth // 8 + 4 * rule.written)
        yield {
            **kind(f"triton {rule.name}<{dtype}, {distribution}, {rounding}>"), "arch": AMD, "slots": _rounded(r.slots),
            "slots_per_extra_seed": _rounded(r.extra_slots), "registers": r.registers, "spills": r.spills,
            "scalar_spills": r.scalar_spills, "vector_bytes": r.vector_bytes,
            "pipes": _pipes(r.pipes),
        }  # fmt: skip


def measure() -> None:
    """Compiles every kernel for every architecture, one after another, and writes the JSON, a row to a line."""
    import triton
    from rich.progress import track

    rows: list[Row] = []
    jobs: list[tuple[str, Any]] = [(f"CUDA sm_{a} {s.name}", (s, a)) for a in ARCHS for s in machine_code.CUDA_SOURCES]
    for _, (source, arch) in track(jobs, "CUDA"):
        rows += [nvidia_row(r) for r in machine_code.compile_cuda(source, arch)]
    for arch in track(ARCHS, "Triton"):
        rows += [nvidia_row(r) for r in machine_code.compile_triton(arch)]
    rows += track(list(amd_rows()), "Triton, AMD")
    release = re.search(
        r"release ([\d.]+)", subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    )
    compilers = {"nvcc": release[1] if release else "unknown", "triton": triton.__version__}
    lines = ",\n  ".join(json.dumps(row) for row in sorted(rows, key=_order))
    STORED.write_text(f'{{\n "compilers": {json.dumps(compilers)},\n "kernels": [\n  {lines}\n ]\n}}\n')


def _order(row: Row) -> tuple[Any, ...]:
    kinds = [list(DTYPES.values()).index(row[key]) for key in ("dtype", "state")]
    arch = (*ARCHS, AMD).index(row["arch"])
    return (
        row["backend"],
        row["kernel"],
        RULES[row["rule"]].id,
        row["seeds"] != "one",
        *kinds,
        row["distribution"],
        row["rounding"],
        arch,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--measure", action="store_true", help="compile and count first: minutes; needs nvcc and Triton"
    )
    parser.add_argument("--check", action="store_true", help="change nothing; say whether the page is up to date")
    options = parser.parse_args(arguments)
    if options.measure:
        if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
            parser.error("TRITON_INTERPRET is set, so Triton would not compile: unset it")
        measure()
    stored = json.loads(STORED.read_text())
    made = {"docs/machine_code.md": parts(stored)}
    every = table_of_all(stored["kernels"])
    stale = not ALL.exists() or ALL.read_text() != every
    if stale and options.check:
        print(f"disagrees with {STORED.name}: {ALL.name}; run python benchmarks/machine_code_table.py")
    elif stale:
        ALL.write_text(every)
    return update(made, "machine_code_table.py", check=options.check) or int(stale and options.check)


if __name__ == "__main__":
    sys.exit(main())
