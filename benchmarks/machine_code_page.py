"""The tables of docs/machine_code.md, from the rows of results/machine_code.json.

machine_code_table.py has their layout; what is predicted from them is zokern/bench/model.py's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zokern.bench import model
from zokern.rules import RULES

RESULTS = Path(__file__).resolve().parent / "results"
ARCHS, AMD = (80, 90, 100), "gfx942"
DEVICES = ("A100", "H100", "H200", "B200")
REPLAYED = 8  # passes in one sweep, for the table of chains
Row = dict[str, Any]


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
    for by_arch in grouped([row for row in rows if row["backend"] == backend and row["kernel"] == "pass"]).values():
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


def chain_table(rows: Sequence[Row]) -> str:
    lines = [
        "| chain of | slots of a stage: "
        + ", ".join(f"sm_{a}" for a in ARCHS)
        + " | with stochastic rounding, sm_90 | "
        "each further seed, sm_90 | once for a tile, sm_90 | registers | spills | vector bytes | "
        f"{REPLAYED} passes over a sweep of {REPLAYED}, predicted: {', '.join(DEVICES)} | measured |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for by_arch in grouped([row for row in rows if row["kernel"] == "chain"]).values():
        told, own = by_arch[90], [by_arch[a] for a in ARCHS]
        cells = [
            f"`{told['rule']}` {told['dtype']}" + (f", {told['state']} state" if RULES[told["rule"]].states else ""),
            ", ".join(_cell(r["slots"]) for r in own),
            _cell(told["slots_stochastic"]) if told["dtype"] != "float32" else "-",
            _cell(told["slots_per_extra_seed"]),
            _cell(told["slots_once"]),
            ", ".join(str(r["registers"]) for r in own),
            ", ".join(str(r["spills"]) for r in own),
            ", ".join(sorted({str(r["vector_bytes"]) for r in own})),
            ", ".join(f"{gain(rows, by_arch[model.DEVICES[d].arch], d):.2f}" for d in DEVICES),
            "not yet run",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gain(rows: Sequence[Row], chain: Row, device: str) -> float:
    """Predicted time of passes one by one, 16-bit weights rounded stochastically, over that of a sweep of them all."""
    stochastic = chain["dtype"] != "float32"
    rounding = "stochastic" if stochastic else "nearest"
    same = ("rule", "dtype", "state", "arch")
    alone = next(
        row for row in rows
        if all(row[key] == chain[key] for key in same) and row["kernel"] == "pass" and row["backend"] == "cuda"
        and (row["distribution"], row["rounding"], row["seeds"]) == ("normal", rounding, "one")
    )  # fmt: skip
    moved = model.bytes_moved(chain)
    sweep = model.instructions(chain, stages=REPLAYED, stochastic=REPLAYED * stochastic)
    return REPLAYED * model.seconds(alone, moved, device) / model.seconds(chain, moved, device, sweep)


def pipe_table(rows: Sequence[Row], arch: int | str, pipes: Mapping[str, str]) -> str:
    lines = ["| kernel | " + " | ".join(pipes.values()) + " |", "|---|" + "---|" * len(pipes)]
    for row in rows:
        ordinary = row["dtype"] == "bfloat16" and row["state"] == "float32" and row["kernel"] == "pass"
        if row["arch"] == arch and ordinary:
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
        "chains": chain_table(rows),
        "triton": kernel_table(rows, "triton"),
        "pipes-80": pipe_table(rows, 80, NVIDIA_PIPES),
        "pipes-90": pipe_table(rows, 90, NVIDIA_PIPES),
        "pipes-100": pipe_table(rows, 100, NVIDIA_PIPES),
        "pipes-gfx942": pipe_table(rows, AMD, AMD_PIPES),
    }
