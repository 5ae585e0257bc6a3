"""The rows of results/machine_code.json: every kernel on every architecture, a row to a line.

A row is one kernel on one architecture: slots, slots_per_extra_seed and pipes (pipes_extra: of a further seed) are
instructions per element, vector_bytes is the width of a global access in the hot loop, arch is 90 for sm_90 or the name of
an AMD target (amd.py), which has scalar_registers and scalar_spills too. Of a chain's kernel ("kernel": "chain") they are
those of a stage, slots_stochastic those of a stage with stochastic rounding, slots_once those of the tile around the stages
(counts.py). Kernels whose directions are of low rank
("distribution": "low_rank") have slots_per_extra_rank too.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from typing import Any

from benchmarks.parts import RESULTS
from zokern.contract.rules import RULES

from . import compilers, counts
from .amd import AMD
from .compilers import DTYPES, kind

STORED = RESULTS / "machine_code.json"
ARCHS = (80, 90, 100, 120)
KEPT = ("arch", "slots", "slots_per_extra_seed", "registers", "scalar_registers", "spills", "scalar_spills",
        "vector_bytes", "pipes", "pipes_extra", "slots_once", "pipes_once", "slots_stochastic", "pipes_stochastic",
        "slots_per_extra_rank", "pipes_per_extra_rank")  # fmt: skip
Row = dict[str, Any]


def row(report: counts.Report) -> Row:
    """What is kept of a report, in figures of four digits."""
    return {**kind(report["name"]), **{key: _rounded(report[key]) for key in KEPT if key in report}}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(of) for key, of in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def measure() -> None:
    """Compiles every kernel for every architecture, one after another, and writes the JSON."""
    import triton
    from rich.progress import track

    rows: list[Row] = []
    for source, arch in track([(source, arch) for arch in ARCHS for source in compilers.CUDA_SOURCES], "CUDA"):
        rows += map(row, compilers.compile_cuda(source, arch))
    for arch in track((*ARCHS, *AMD), "Triton"):
        reports = compilers.compile_triton(arch)
        if wrong := {report["name"]: report["deviations"] for report in reports if report.get("deviations")}:
            raise RuntimeError(f"for {arch} Triton's code may compute other bits: {wrong}")
        rows += map(row, reports)
    told = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release ([\d.]+)", told)
    versions = {"nvcc": release[1] if release else "unknown", "triton": triton.__version__}
    lines = ",\n  ".join(json.dumps(row) for row in sorted(rows, key=_order))
    STORED.write_text(f'{{\n "compilers": {json.dumps(versions)},\n "kernels": [\n  {lines}\n ]\n}}\n')


def _order(row: Row) -> tuple[Any, ...]:
    dtypes = [list(DTYPES.values()).index(row[key]) for key in ("dtype", "state")]
    arch = (*ARCHS, *AMD).index(row["arch"])
    kernel = (row["backend"], row["kernel"], RULES[row["rule"]].id, row["seeds"] != "one")
    return (*kernel, *dtypes, row["distribution"], row["rounding"], arch)


def find(rows: Sequence[Row], **wanted: Any) -> Row | None:
    """The first row with these values; of several that will do, a tuple of them."""
    allowed = {key: value if isinstance(value, tuple) else (value,) for key, value in wanted.items()}
    return next((row for row in rows if all(row[key] in values for key, values in allowed.items())), None)
