"""The table of docs/machine_code.md: every kernel's machine code on every architecture, and what speed it allows.

python benchmarks/machine_code_table.py --measure   # compiles everything (minutes) into results/machine_code.json
python benchmarks/machine_code_table.py             # rewrites the page from the stored results
python benchmarks/machine_code_table.py --check     # exit code 1 if the page is not what this would write

A row of the JSON is one kernel on one architecture: slots, slots_per_extra_seed and pipes are instructions per element,
vector_bytes is the width of a global access in the hot loop, arch is 90 for sm_90 or the name of an AMD target.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pages import fill

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # zokern may not be installed
import machine_code  # noqa: E402

from zokern.bench import model  # noqa: E402
from zokern.rules import RULES  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
STORED, PAGE = RESULTS / "machine_code.json", ROOT / "docs" / "machine_code.md"
ARCHS, AMD = (80, 90, 100), "gfx942"
DEVICES = ("A100", "H100", "H200", "B200")
DTYPES = {"float": "float32", "__half": "float16", "__nv_bfloat16": "bfloat16",
          "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # fmt: skip
DISTRIBUTIONS, ROUNDINGS, SEEDS = ("normal", "rademacher", "any"), ("nearest", "stochastic", "any"), ("one", "any")
STRUCTS = {"HiZOO<false>": "hizoo", "HiZOO<true>": "hizoo_restore", "ScaledAxpy": "scaled_axpy"}
CUDA = re.compile(r"rule_kernel<(\w+), (\w+), zk::gpu::([\w<>]+), \(\w+::Distribution\)(\d), \(\w+::Rounding\)(\d), "
                  r"\(\w+::cuda::Seeds\)(\d)>")  # fmt: skip
TRITON = re.compile(r"triton (\w+)<(\w+), (\w+), (\w+)>")
Row = dict[str, Any]


# ----------------------------------------------------------------------------------------------------------- measuring


def kind(name: str) -> Row:
    """What a kernel is for, from its name in machine_code.py's reports."""
    if found := CUDA.search(name):
        dtype, state, struct, *numbers = found.groups()
        distribution, rounding, seeds = (
            names[int(n)] for names, n in zip((DISTRIBUTIONS, ROUNDINGS, SEEDS), numbers, strict=True)
        )
        rule = STRUCTS.get(struct, struct.lower())
        return {"backend": "cuda", "name": name, "rule": rule, "dtype": DTYPES[dtype], "state": DTYPES[state],
                "distribution": distribution, "rounding": rounding, "seeds": seeds}  # fmt: skip
    if found := TRITON.fullmatch(name):
        rule, dtype, distribution, rounding = found.groups()
        return {"backend": "triton", "name": name, "rule": rule, "dtype": DTYPES[dtype], "state": "float32",
                "distribution": distribution, "rounding": rounding, "seeds": "any"}  # fmt: skip
    raise ValueError(f"{name} is no name of a kernel of ours")


def nvidia_row(report: machine_code.Report) -> Row:
    return {
        **kind(report.name), "arch": report.arch, "slots": _rounded(report.slots_per_element_k1),
        "slots_per_extra_seed": _rounded(report.slots_per_extra_seed), "registers": report.registers,
        "spills": report.spills, "vector_bytes": min(report.global_bytes_in_loop, default=0),
        "pipes": {pipe: _rounded(n) for pipe, n in report.per_element.items()},
    }  # fmt: skip


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
            "pipes": {pipe: _rounded(n) for pipe, n in r.pipes.items()},
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
        RULES[row["rule"]].id,
        row["seeds"] != "one",
        *kinds,
        row["distribution"],
        row["rounding"],
        arch,
    )


# ------------------------------------------------------------------------------------------------------------ the page


def grouped(rows: Sequence[Row]) -> dict[str, dict[Any, Row]]:
    """The rows of each kernel, by architecture."""
    found: dict[str, dict[Any, Row]] = {}
    for row in rows:
        found.setdefault(row["name"], {})[row["arch"]] = row
    return found


def label(row: Row) -> str:
    state = f", {row['state']} state" if RULES[row["rule"]].states else ""
    noise = "any noise and rounding" if row["distribution"] == "any" else f"{row['distribution']}, {row['rounding']}"
    seeds = ", one seed" if row["seeds"] == "one" else ""
    return f"`{row['rule']}` {row['dtype']}{state}, {noise}{seeds}"


def measured(row: Row, results: Path = RESULTS) -> list[str]:
    """Shares of the copy bandwidth in stored kernel benchmarks of this kernel, with the GPU's name."""
    out = []
    for path in sorted(results.glob("kernels-*-cuda.json")):
        run = json.loads(path.read_text())
        for result in run["results"].values():
            case, way = result["case"], result["ways"].get(f"zokern {row['backend']}")
            same = all(case[key] == row[key] for key in ("rule", "dtype", "distribution", "rounding"))
            state = not RULES[row["rule"]].states or case["state_dtype"] == row["state"]
            seeds = case["seeds"] == 1 and (row["backend"] == "triton" or row["seeds"] == "one")
            if way and same and state and seeds and not case["left_out"]:
                out.append(f"{way['share_of_copy']:.0%} ({run['machine']['gpu']})")
    return out


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def kernel_table(rows: Sequence[Row], backend: str) -> str:
    targets = [*ARCHS, *([AMD] if backend == "triton" else [])]
    names = [a if a == AMD else f"sm_{a}" for a in targets]
    lines = [
        f"| kernel | slots: {', '.join(names)} | each further seed, sm_90 | registers | spills | vector bytes | "
        f"predicted: {', '.join(DEVICES)} | limit on an H200 | measured |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for by_arch in grouped([row for row in rows if row["backend"] == backend]).values():
        h200 = by_arch[90]
        shares = [by_arch[model.DEVICES[d].arch] for d in DEVICES]
        predicted = [f"{model.predicted_share(row, model.bytes_moved(row), d):.0%}"
                     for row, d in zip(shares, DEVICES, strict=True)]  # fmt: skip
        unit, seconds = model.compute_limit(h200, "H200")
        memory = model.bytes_moved(h200) / model.DEVICES["H200"].copy_bandwidth
        cells = [
            label(h200),
            ", ".join(_cell(by_arch[a]["slots"]) for a in targets),
            _cell(h200["slots_per_extra_seed"]),
            ", ".join(str(by_arch[a]["registers"]) for a in targets),
            ", ".join(str(by_arch[a]["spills"]) for a in targets),
            ", ".join(sorted({str(by_arch[a]["vector_bytes"]) for a in targets})),
            ", ".join(predicted),
            "memory" if memory >= seconds else unit,
            ", ".join(measured(h200)) or "not yet run",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def pipe_table(rows: Sequence[Row], arch: int | str, pipes: Mapping[str, str]) -> str:
    lines = ["| kernel | " + " | ".join(pipes.values()) + " |", "|---|" + "---|" * len(pipes)]
    for row in rows:
        if row["arch"] == arch and row["dtype"] == "bfloat16" and row["state"] == "float32":
            lines.append(
                f"| {row['backend']} {label(row)} | "
                + " | ".join(_cell(row["pipes"].get(p, 0.0)) for p in pipes)
                + " |"
            )
    return "\n".join(lines)


NVIDIA_PIPES = {"fp32": "FP32", "imad": "IMAD", "imad.wide": "IMAD.WIDE", "int": "integer", "convert": "convert",
                "xu": "XU", "memory": "memory", "uniform": "uniform", "branch": "branch", "other": "other"}  # fmt: skip
AMD_PIPES = {"valu": "VALU", "salu": "SALU", "vmem": "VMEM", "smem": "SMEM", "lds": "LDS", "wait": "wait",
             "branch": "branch"}  # fmt: skip


def parts(stored: Mapping[str, Any]) -> dict[str, str]:
    rows, compilers = stored["kernels"], stored["compilers"]
    return {
        "compilers": f"Compiled with nvcc {compilers['nvcc']} and Triton {compilers['triton']}.",
        "cuda": kernel_table(rows, "cuda"),
        "triton": kernel_table(rows, "triton"),
        "pipes-80": pipe_table(rows, 80, NVIDIA_PIPES),
        "pipes-90": pipe_table(rows, 90, NVIDIA_PIPES),
        "pipes-100": pipe_table(rows, 100, NVIDIA_PIPES),
        "pipes-gfx942": pipe_table(rows, AMD, AMD_PIPES),
    }


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
    old = PAGE.read_text()
    new = fill("docs/machine_code.md", old, parts(json.loads(STORED.read_text())))
    if options.check and new != old:
        print("docs/machine_code.md disagrees with benchmarks/results; run python benchmarks/machine_code_table.py")
    elif new != old:
        PAGE.write_text(new)
    return int(options.check and new != old)


if __name__ == "__main__":
    sys.exit(main())
