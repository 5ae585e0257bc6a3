"""Writes what docs/install.md says of Arm: from `make arm` and from benchmarks.arm.run, stored in benchmarks/results."""

from __future__ import annotations

from benchmarks.matrix import builds, counts, missing
from benchmarks.parts import load, table

COLUMNS = {"float32": ("nearest",), "float16": ("nearest", "stochastic"), "bfloat16": ("nearest", "stochastic")}
CALLED = {"normal": "normal", "rademacher": "Rademacher", "lowrank:1": "rank 1"}


def tests() -> str:
    """A line for each processor."""
    rows = []
    for processor, cell in load("arm.json")["results"].items():
        if "broke" in cell:
            rows.append([processor, "", "", "", cell["broke"].partition("\n")[0]])
            continue
        found = cell["versions"]
        rows.append([processor, cell["emulator"], found["python"], found["torch"].partition("+")[0], counts(cell)])
    return table(["processor", "QEMU", "Python", "torch", "the CPU's tests"], rows, tight=True)


def made() -> str:
    run = load("arm.json")
    return f"{builds(run)}; of {', '.join(run['settings']['tests'])}, without Triton's.{missing(run)}"


def instructions() -> str:
    """Of each rule and distribution a line, of each dtype and rounding a column."""
    run = load("arm-instructions.json")
    cells = {
        (row["rule"], row["distribution"], (row["dtype"], row["rounding"])): row["instructions_per_element"]
        for row in run["results"]
    }
    columns = [(dtype, rounding) for dtype, roundings in COLUMNS.items() for rounding in roundings]
    lines = dict.fromkeys((rule, distribution) for rule, distribution, _ in cells)
    rows = [
        [f"`{rule}`, {CALLED[distribution]}", *(f"{cells[rule, distribution, column]:.1f}" for column in columns)]
        for rule, distribution in lines
    ]
    head = [dtype if rounding == "nearest" else f"{dtype}, stochastic" for dtype, rounding in columns]
    return table(["pass", *head], rows, tight=True)


def counted() -> str:
    run = load("arm-instructions.json")
    s = run["settings"]
    made = f"commit {run['commit'][:12]}, {run['date'][:10]}. `python -m benchmarks.arm.run`"
    return f"{s['module_compiler']}; QEMU {s['emulator'].split()[2]}, {s['cpu']}; {made}"


PAGES = {
    "docs/install.md": {
        "arm": tests, "arm-made": made, "arm-instructions": instructions, "arm-instructions-made": counted,
    }
}  # fmt: skip
