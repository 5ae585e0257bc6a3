"""Writes the table of Pythons and libraries of docs/install.md from what `make matrix` stores in benchmarks/results."""

from __future__ import annotations

from benchmarks.parts import Record, load, table
from zokern.bench.record import RESULTS

STORED = "matrix.json"
SHOWN = ("torch", "triton", "transformers", "trl", "lightning", "peft", "numpy")


def counts(cell: Record) -> str:
    return f"{cell['passed']:,} passed" + (f", {len(cell['failed'])} failed" if cell["failed"] else "")


def builds(run: Record) -> str:
    """Which zokern ran, and the day."""
    told = {f"{cell['zokern']} at {cell['commit'][:12]}" for cell in run["results"].values()}
    return f"zokern {', '.join(sorted(told))}; {run['date'][:10]}"


def missing(run: Record) -> str:
    return "" if run["complete"] else " **Not all of it has run.**"


def _row(cell: Record) -> list[str]:
    if "broke" in cell:
        return [*[""] * len(SHOWN), cell["broke"].partition("\n")[0]]
    if "not at hand" in cell:
        return [*[""] * len(SHOWN), f"not at hand, not run: {cell['not at hand']}"]
    return [*(cell["versions"][name].partition("+")[0] for name in SHOWN), counts(cell)]


def stored() -> Record | None:
    """What `make matrix` has stored; None before it has run."""
    return load(STORED) if (RESULTS / STORED).is_file() else None


def matrix() -> str:
    """A line for each Python and set of libraries."""
    run = stored()
    if run is None:
        return "It has not run yet."
    rows = [[*f"{name} ".split(" ")[:2], *_row(cell)] for name, cell in run["results"].items()]
    return table(["Python", "libraries", *SHOWN, "the CPU's tests"], rows, tight=True)


def made() -> str:
    run = stored()
    if run is None:
        return ""
    return f"{builds(run)}.{missing(run)}"


PAGES = {"docs/install.md": {"matrix": matrix, "matrix-made": made}}
