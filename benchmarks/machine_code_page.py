"""The two tables of docs/machine_code.md and results/machine_code.csv, from the rows of results/machine_code.json.

machine_code_table.py has the rows' layout; what is predicted from them is zokern/bench/model.py's.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pages import RESULTS, load

from zokern.bench import model
from zokern.contract.rules import RULES

ARCHS, AMD = (80, 90, 100, 120), "gfx942"
DEVICES = ("H100", "H200", "B200")  # of the page; the CSV has all that the model knows
SWEPT = 8  # passes in one sweep, for the gain of a chain
Row = dict[str, Any]

# What people run: rule, dtype, distribution, rounding. Perturbations round to nearest, updates of 16-bit weights do not.
# States are float32, seeds one.
PASSES = {
    "MeZO, perturb": ("axpy", "bfloat16", "normal", "nearest"),
    "MeZO, update": ("axpy", "bfloat16", "normal", "stochastic"),
    "MeZO, perturb, float16": ("axpy", "float16", "normal", "nearest"),
    "MeZO, both, float32": ("axpy", "float32", "normal", "nearest"),
    "FZOO, perturb by signs": ("axpy", "bfloat16", "rademacher", "nearest"),
    "HiZOO, perturb": ("scaled_axpy", "bfloat16", "normal", "nearest"),
    "HiZOO, update": ("hizoo", "bfloat16", "normal", "stochastic"),
    "HiZOO, restore and update": ("hizoo_restore", "bfloat16", "normal", "stochastic"),
    "HELENE, update": ("helene", "bfloat16", "normal", "stochastic"),
    "momentum, update": ("momentum", "bfloat16", "normal", "stochastic"),
    "Adam, update": ("adam", "bfloat16", "normal", "stochastic"),
    "AdaMeZO, update": ("adamezo", "bfloat16", "normal", "stochastic"),
    "sign, update": ("sign", "bfloat16", "normal", "stochastic"),
}


def find(rows: Sequence[Row], backend: str, kernel: str, arch: int, wanted: Sequence[str]) -> Row | None:
    """The row of a pass of PASSES, or of the chain of its rule; None where it was not compiled."""
    rule, dtype, distribution, rounding = wanted
    exactly: dict[str, Any] = {"backend": backend, "kernel": kernel, "arch": arch, "rule": rule, "dtype": dtype,
                               "state": "float32"}  # fmt: skip
    if kernel == "pass":
        exactly |= {"distribution": distribution, "rounding": rounding, "seeds": "one" if backend == "cuda" else "any"}
    return next((row for row in rows if all(row[key] == value for key, value in exactly.items())), None)


def measured(row: Row, results: Path = RESULTS) -> list[str]:
    """Shares of the copy bandwidth in stored kernel benchmarks of this kernel, with the GPU's name."""
    out = []
    for path in sorted(results.glob("kernels-*-cuda*.json")):
        run = json.loads(path.read_text())
        for result in run["results"].values():
            case, way = result["case"], result["ways"].get(f"zokern {row['backend']}")
            same = all(case[key] == row[key] for key in ("rule", "dtype", "distribution", "rounding"))
            state = not RULES[row["rule"]].states or case["state_dtype"] == row["state"]
            alone = case["seeds"] == 1 and case["stages"] == 1 and (row["backend"] == "triton" or row["seeds"] == "one")
            if way and same and state and alone and not case["left_out"]:
                out.append(f"{way['share_of_copy']:.0%} ({run['machine']['gpu']})")
    return [*dict.fromkeys(out)]


def told(rows: Sequence[Row], backend: str, wanted: Sequence[str], device: str) -> str:
    """Predicted share of the copy bandwidth, and the slots of an element out of those that its copy leaves time for."""
    row = find(rows, backend, "pass", model.DEVICES[device].arch, wanted)
    if row is None:
        return "-"
    moved = model.bytes_moved(row)
    share, slots = model.predicted_share(row, moved, device), model.slots_of_copy(moved, device)
    return f"{share:.0%}, {row['slots']:.0f} of {slots:.0f}"


def cuda_table(rows: Sequence[Row]) -> str:
    lines = [["pass", *DEVICES, "each further seed", "measured"], ["---"] * (3 + len(DEVICES))]
    for title, wanted in PASSES.items():
        h200 = find(rows, "cuda", "pass", 90, wanted)
        assert h200 is not None, title
        several = next(
            row for row in rows
            if row["arch"] == 90 and row["backend"] == "cuda" and row["kernel"] == "pass" and row["seeds"] == "any"
            and all(row[key] == h200[key] for key in ("rule", "dtype", "state"))
            and all(row[key] in (h200[key], "any") for key in ("distribution", "rounding"))
        )  # fmt: skip
        cells = [told(rows, "cuda", wanted, device) for device in DEVICES]
        further = f"{several['slots_per_extra_seed']:.0f}"
        lines.append([title, *cells, further, ", ".join(measured(h200)) or "not yet run"])
    return _table(lines)


def other_table(rows: Sequence[Row]) -> str:
    head = ["pass", *(f"Triton, {device}" for device in DEVICES), "Triton, measured",
            f"{SWEPT} in one sweep: {', '.join(DEVICES)}"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for title, wanted in PASSES.items():
        triton, update = find(rows, "triton", "pass", 90, wanted), wanted[3] == "stochastic" or wanted[1] == "float32"
        gains = "-"
        if update:
            gains = ", ".join(f"{gain(rows, _chain(rows, wanted, d), d):.1f}" for d in DEVICES)
        cells = [told(rows, "triton", wanted, device) for device in DEVICES]
        seen = "-" if triton is None else ", ".join(measured(triton)) or "not yet run"
        lines.append([title, *cells, seen, gains])
    return _table(lines)


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _chain(rows: Sequence[Row], wanted: Sequence[str], device: str) -> Row:
    row = find(rows, "cuda", "chain", model.DEVICES[device].arch, wanted)
    assert row is not None, wanted
    return row


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
    sweep = model.instructions(chain, stages=SWEPT, stochastic=SWEPT * stochastic)
    return SWEPT * model.seconds(alone, moved, device) / model.seconds(chain, moved, device, sweep)


def table_of_all(rows: Sequence[Row]) -> str:
    """Every kernel on every architecture as CSV: what it is, what was counted, by pipe, and what is predicted."""
    what = ("backend", "kernel", "rule", "dtype", "state", "distribution", "rounding", "seeds", "arch")
    counted = ("slots", "slots_per_extra_seed", "slots_stochastic", "slots_once", "registers", "spills",
               "scalar_spills", "vector_bytes")  # fmt: skip
    pipes = sorted({pipe for row in rows for pipe in row["pipes"]})
    predicted = [f"predicted_{device}" for device in model.DEVICES]
    gains = [f"sweep_of_{SWEPT}_{device}" for device in model.DEVICES]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*what, "bytes", *counted, *pipes, *predicted, *gains])
    for row in rows:
        moved = model.bytes_moved(row)
        forecast = []
        for value in (_share, gain):
            for device, figures in model.DEVICES.items():
                fits = figures.arch == row["arch"] and (row["kernel"] == "chain") == (value is gain)
                forecast.append(f"{value(rows, row, device):.3f}" if fits else "")
        cells = [row.get(name, "") for name in counted] + [row["pipes"].get(pipe, 0.0) for pipe in pipes]
        writer.writerow([*(row[name] for name in what), moved, *("" if c is None else c for c in cells), *forecast])
    return out.getvalue()


def _share(rows: Sequence[Row], row: Row, device: str) -> float:
    return model.predicted_share(row, model.bytes_moved(row), device)


def counters_table() -> str:
    """What a GPU's counters said of single passes; all but the clock as shares of what the unit can do."""
    run = load("counters-cuda.json")
    lines = [["pass", "issue slots filled", "DRAM busy", "L2 busy", "warps, of 64", "clock, GHz"], ["---"] * 6]
    for title, c in run["results"].items():
        busy = [f"{share:.0%}" for share in (c["issue_active"], c["dram_read"] + c["dram_write"], c["l2_sectors"])]
        lines.append([title, *busy, f"{64 * c['warps_active']:.0f}", f"{c['clock'] / 1e9:.2f}"])
    about = f"{run['machine']['gpu']}, {run['settings']['tool']}, commit {run['commit'][:12]}."
    return f"{about}\n\n{_table(lines)}"


def parts(stored: Mapping[str, Any]) -> dict[str, str]:
    rows, compilers = stored["kernels"], stored["compilers"]
    return {
        "compilers": f"Compiled with nvcc {compilers['nvcc']} and Triton {compilers['triton']}.",
        "cuda": cuda_table(rows),
        "other": other_table(rows),
        "counters": counters_table(),
    }
