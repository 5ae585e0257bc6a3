"""The tables of docs/machine_code.md and results/machine_code.csv, from the rows of results/machine_code.json.

rows.py has the rows' layout; what is predicted from them is zokern/bench/model.py's.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.parts import WHOLE, gpus, load, signed, table
from zokern.bench import model, prediction
from zokern.bench.cases import Case
from zokern.contract.rules import RULES

from .rows import STORED, Row, find

DEVICES = ("H100", "H200", "B200")  # of the page; the CSV has all that the model knows
NEAR = 0.1  # a share that is measured so near to its prediction is called right
SWEPT = 8  # passes in one sweep, for the gain of a chain

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


def of_pass(rows: Sequence[Row], backend: str, arch: int | str, wanted: Sequence[str]) -> Row | None:
    """The row of a pass of PASSES; None where it was not compiled."""
    rule, dtype, distribution, rounding = wanted
    return find(rows, backend=backend, kernel="pass", arch=arch, rule=rule, dtype=dtype, state="float32",
                distribution=distribution, rounding=rounding, seeds="one" if backend == "cuda" else "any")  # fmt: skip


def measured(row: Row, folder: Path) -> str:
    """The share of the copy bandwidth in a folder's stored kernel benchmarks of this kernel."""
    out = []
    for path in sorted(folder.glob("kernels-*-cuda*.json")):
        run = json.loads(path.read_text())
        for result in run["results"].values():
            case, way = result["case"], result["ways"].get(f"zokern {row['backend']}")
            same = all(case[key] == row[key] for key in ("rule", "dtype", "distribution", "rounding"))
            state = not RULES[row["rule"]].states or case["state_dtype"] == row["state"]
            alone = case["seeds"] == 1 and case["stages"] == 1 and (row["backend"] == "triton" or row["seeds"] == "one")
            if way and same and state and alone and not case["left_out"]:
                out.append(f"{way['share_of_copy']:.0%}")
    return ", ".join(dict.fromkeys(out)) or "not yet run"


def held_part() -> str:
    """How near the model came to what each GPU did, backend by backend: single passes, chains and all numbers of seeds."""
    rows, lines = load(STORED.name)["kernels"], []
    for gpu, folder in gpus().items():
        for backend, title in (("cuda", "CUDA"), ("triton", "Triton")):
            off = distances(rows, gpu, folder, backend)
            if not off:
                continue
            far, worst = [case for case in off if abs(off[case]) > NEAR], max(off, key=lambda case: abs(off[case]))
            told = f"{len(off) - len(far)} of {len(off)} within {NEAR:.0%}, the mean {_mean(off):.1%} off"
            told += f", the farthest {signed(100 * off[worst], 1)}% ({worst})"
            lines.append(f"- {gpu}, {title}: {told}." + (f" Beyond: {'; '.join(far)}." if far else ""))
    return "\n".join(lines)


def copies_line() -> str:
    """The bandwidth that copies reached beside the kernels."""
    told = []
    for gpu, folder in gpus().items():
        runs = [json.loads(path.read_text()) for path in sorted(folder.glob("kernels-*-cuda*.json"))]
        speeds = [result["ways"]["copy"]["gb_per_s"] / 1e3 for run in runs for result in run["results"].values()]
        told.append(f"{min(speeds):.2f} to {max(speeds):.2f} on the {gpu}")
    return f"Measured: {', '.join(told)}."


def _mean(off: Mapping[str, float]) -> float:
    return sum(map(abs, off.values())) / len(off)


def distances(rows: Sequence[Row], gpu: str, folder: Path, backend: str) -> dict[str, float]:
    """{case: measured over predicted share of the copy bandwidth, less 1}, of all stored cases that are predicted."""
    basis, known, off = prediction.Basis(gpu, rows, {}), {field.name for field in fields(Case)}, {}
    if gpu not in model.DEVICES:
        return {}
    for path in sorted(folder.glob("kernels-*-cuda*.json")):
        for title, result in json.loads(path.read_text())["results"].items():
            case = Case(**{name: value for name, value in result["case"].items() if name in known})
            predicted = prediction.of(case, backend, basis).get("predicted_share")
            if predicted is not None:
                off[title] = result["ways"][f"zokern {backend}"]["share_of_copy"] / predicted - 1
    return off


def told(rows: Sequence[Row], backend: str, wanted: Sequence[str], device: str) -> str:
    """Predicted share of the copy bandwidth, and the slots of an element out of those that its copy leaves time for."""
    row = of_pass(rows, backend, model.DEVICES[device].arch, wanted)
    if row is None:
        return "-"
    slots = model.slots_of_copy(model.bytes_moved(row), device)
    return f"{share(rows, row, device):.0%}, {row['slots']:.0f} of {slots:.0f}"


def cuda_table(rows: Sequence[Row]) -> str:
    lines = []
    for title, wanted in PASSES.items():
        rule, dtype, distribution, rounding = wanted
        sm_90 = of_pass(rows, "cuda", 90, wanted)
        several = find(rows, backend="cuda", kernel="pass", arch=90, rule=rule, dtype=dtype, state="float32", seeds="any",
                       distribution=(distribution, "any"), rounding=(rounding, "any"))  # fmt: skip
        assert sm_90 is not None, title
        assert several is not None, title
        cells = [told(rows, "cuda", wanted, device) for device in DEVICES]
        further = f"{several['slots_per_extra_seed']:.0f}"
        lines.append([title, *cells, further, *(measured(sm_90, folder) for folder in gpus().values())])
    return table(["pass", *DEVICES, "each further seed", *(f"measured, {gpu}" for gpu in gpus())], lines)


def other_table(rows: Sequence[Row]) -> str:
    lines = []
    for title, wanted in PASSES.items():
        triton, gains = of_pass(rows, "triton", 90, wanted), "-"
        if wanted[3] == "stochastic" or wanted[1] == "float32":  # an update
            gains = ", ".join(f"{gain(rows, _chain(rows, wanted, d), d):.1f}" for d in DEVICES)
        seen = ["-" if triton is None else measured(triton, folder) for folder in gpus().values()]
        lines.append([title, *(told(rows, "triton", wanted, device) for device in DEVICES), *seen, gains])
    head = ["pass", *(f"Triton, {device}" for device in DEVICES), *(f"measured, {gpu}" for gpu in gpus())]
    return table([*head, f"{SWEPT} in one sweep: {', '.join(DEVICES)}"], lines)


def _chain(rows: Sequence[Row], wanted: Sequence[str], device: str) -> Row:
    arch = model.DEVICES[device].arch
    row = find(rows, backend="cuda", kernel="chain", arch=arch, rule=wanted[0], dtype=wanted[1], state="float32")
    assert row is not None, wanted
    return row


def share(rows: Sequence[Row], row: Row, device: str) -> float:
    """Of the copy bandwidth, predicted."""
    return model.predicted_share(row, model.bytes_moved(row), device)


def gain(rows: Sequence[Row], chain: Row, device: str) -> float:
    """Predicted time of passes one by one, 16-bit weights rounded stochastically, over that of a sweep of them all."""
    stochastic = chain["dtype"] != "float32"
    same = {key: chain[key] for key in ("rule", "dtype", "state", "arch")}
    alone = find(rows, kernel="pass", backend="cuda", distribution="normal", seeds="one",
                 rounding="stochastic" if stochastic else "nearest", **same)  # fmt: skip
    assert alone is not None, chain["name"]
    moved = model.bytes_moved(chain)
    sweep = model.instructions(chain, stages=SWEPT, stochastic=SWEPT * stochastic)
    return SWEPT * model.seconds(alone, moved, device) / model.seconds(chain, moved, device, sweep)


def table_of_all(rows: Sequence[Row]) -> str:
    """Every kernel on every architecture as CSV: what it is, what was counted, by pipe, and what is predicted."""
    what = ("backend", "kernel", "rule", "dtype", "state", "distribution", "rounding", "seeds", "arch")
    counted = ("slots", "slots_per_extra_seed", "slots_per_extra_rank", "slots_stochastic", "slots_once", "registers",
               "scalar_registers", "spills", "scalar_spills", "vector_bytes")  # fmt: skip
    pipes = sorted({pipe for row in rows for pipe in row["pipes"]})
    forecasts = {f"predicted_{device}": (share, device) for device in model.DEVICES}
    forecasts |= {f"sweep_of_{SWEPT}_{device}": (gain, device) for device in model.DEVICES}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")  # None becomes an empty cell
    writer.writerow([*what, "bytes", *counted, *pipes, *forecasts])
    for row in rows:
        cells = [row[name] for name in what] + [model.bytes_moved(row)] + [row.get(name) for name in counted]
        cells += [row["pipes"].get(pipe, 0.0) for pipe in pipes]
        for value, device in forecasts.values():
            fits = model.DEVICES[device].arch == row["arch"] and (row["kernel"] == "chain") == (value is gain)
            fits &= row["distribution"] != "low_rank" or row["kernel"] == "pass"  # most of its passes round as asked
            cells.append(f"{value(rows, row, device):.3f}" if fits else None)
        writer.writerow(cells)
    return out.getvalue()


def compilers_line(compilers: Row) -> str:
    return f"Compiled with nvcc {compilers['nvcc']} and Triton {compilers['triton']}."


def counters_table() -> str:
    """What a GPU's counters said of single passes; all but the clock as shares of what the unit can do."""
    run, lines = load("counters-cuda.json"), []
    for title, c in run["results"].items():
        busy = [f"{share:.0%}" for share in (c["issue_active"], c["dram_read"] + c["dram_write"], c["l2_sectors"])]
        lines.append([title, *busy, f"{64 * c['warps_active']:.0f}", f"{c['clock'] / 1e9:.2f}"])
    about = f"{run['machine']['gpu']}, {run['settings']['tool']}, commit {run['commit'][:12]}."
    head = ["pass", "issue slots filled", "DRAM busy", "L2 busy", "warps, of 64", "clock, GHz"]
    return f"{about}\n\n{table(head, lines)}"


def _of_stored(make: Callable[[Any], str], key: str = "kernels") -> Callable[[], str]:
    return lambda: make(load(STORED.name)[key])


PAGES = {
    "docs/machine_code.md": {
        "compilers": _of_stored(compilers_line, "compilers"), "held": held_part, "copies": copies_line,
        "cuda": _of_stored(cuda_table), "other": _of_stored(other_table), "counters": counters_table,
    },
    "benchmarks/results/machine_code.csv": {WHOLE: _of_stored(table_of_all)},
}  # fmt: skip
