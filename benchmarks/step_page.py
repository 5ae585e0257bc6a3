"""Writes the tables of docs/steps.md from benchmarks/results/step-cpu.json, step-cuda*.json and scaling-cpu.json.

python benchmarks/step_page.py           # rewrites the tables and draws the pictures
python benchmarks/step_page.py --check   # exit code 1 if the page is not what this would write
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from pages import RESULTS, ROOT, load, update

from zokern.bench import plots
from zokern.bench import tables as step_tables


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows)]


def machine(run: dict[str, Any]) -> str:
    m = run["machine"]
    where = m.get("gpu") or f"{m['threads']} threads of an {m['processor']} ({m['instruction_sets'][0]})"
    return (
        f"One run on {where}, torch {m['torch']}, "
        f"transformers {m['transformers']}, {run['date'][:10]}, commit {run['commit'][:12]}"
    )


def step_part(name: str = "step-cpu.json") -> str:
    run = load(name)
    settings = run["settings"]
    sizes = {r["model"]: r["parameters"] for r in run["results"].values()}
    told = ", ".join(f"{name} has {count / 1e6:.1f} million parameters" for name, count in sizes.items())
    head = f"{machine(run)}; {settings['dtype']}, {settings['rounds']} rounds of {settings['steps']}; ms. {told}."
    notes = step_tables.step_notes(run["results"], settings.get("not_timed", {}))
    table = markdown(step_tables.STEP_COLUMNS, step_tables.step_rows(run["results"]))
    return "\n".join([head, "", *table, *(f"\n{note}" for note in notes)])


def waiting_part() -> str:
    """The demo's MeZO step with OpenMP threads that sleep while they wait, from a run of its own."""
    run = load("step-cpu-passive.json")
    assert run["settings"]["omp_wait_policy"] == "PASSIVE"
    step = run["results"]["demo 16x32 mezo inplace"]
    share = step["passes"] / step["step"]["median"]
    return (
        f"With `OMP_WAIT_POLICY=PASSIVE` they sleep: in a run of its own, the passes take {1e3 * step['passes']:.1f} of "
        f"the {1e3 * step['step']['median']:.0f} ms of the demo's MeZO step, {share:.1%}."
    )


def gpu_part() -> str:
    """What the GPU suite stored."""
    stored = sorted(RESULTS.glob("step-cuda*.json"))
    parts = [f"{step_part(p.name)}\n\n![Where the time of a step goes](images/{p.stem}.png)" for p in stored]
    return "\n\n".join(parts) or "**Not yet run on a GPU.**"


def spread(rows: Sequence[dict[str, Any]]) -> str:
    """How far the slowest size lies above the fastest, for each type, method and placement."""
    times: dict[str, list[float]] = {}
    for row in rows:
        if row["status"] == "timed":
            name = f"{row['dtype']} {row['method']} {row['placement']}"
            times.setdefault(name, []).append(row["ns_per_parameter"]["median"])
    told = ", ".join(f"{max(t) / min(t) - 1:.0%} ({name})" for name, t in times.items())
    return f"Slowest size over the fastest: {told}."


def scaling_part() -> str:
    run = load("scaling-cpu.json")
    rows = run["results"]
    head = f"{machine(run)}; {run['settings']['rounds']} rounds. {spread(rows)}"
    table = markdown(step_tables.SCALING_COLUMNS, step_tables.scaling_rows(rows))
    return "\n".join([head, "", *table, *(f"\n{note}" for note in step_tables.scaling_notes(rows))])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; say whether the page is up to date")
    args = parser.parse_args()
    if not args.check:
        drawn = [path for path in RESULTS.glob("s*-c*.json") if path.stem.startswith(("step-", "scaling-"))]
        plots.draw(sorted(path for path in drawn if not path.stem.endswith("passive")), ROOT / "docs" / "images")
    parts = {"step": step_part(), "step-waiting": waiting_part(), "step-gpu": gpu_part(), "scaling": scaling_part()}
    return update({"docs/steps.md": parts}, "step_page.py", check=args.check)


if __name__ == "__main__":
    sys.exit(main())
