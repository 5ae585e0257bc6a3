"""What benchmarks.llm.beside has stored, for docs/steps.md."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.llm.beside import WAYS
from benchmarks.parts import load, made_on, table

OLDER, OURS = "older", "finetune"


def ratios(rounds: dict[str, list[dict[str, float]]], way: str, over: str) -> list[float]:
    """Seconds a step of one over another's, round by round."""
    return [a["seconds"] / b["seconds"] for a, b in zip(rounds[way], rounds[over], strict=True)]


def part() -> str:
    """Seconds, where they go, memory, and ratios to `zokern finetune`."""
    run: dict[str, Any] = load("llm-beside-cpu.json")
    rounds, memory, settings = run["results"]["rounds"], run["results"]["memory"], run["settings"]
    rows = []
    for way in [name for name in WAYS if name in rounds]:
        each, held = rounds[way], memory[way]
        middle = [f"{median(one[name] for one in each):.2f}" for name in ("seconds", "forwards", "passes")]
        over = ratios(rounds, way, OURS)
        told = "1" if way == OURS else f"{median(over):.2f} ({min(over):.2f} to {max(over):.2f})"
        sizes = [held["alone"], held["between"], max(held["forwards"], held["between"])]
        rows.append([way, *middle, told, *(f"{size / 2**20:,.1f}" for size in sizes)])
    head = [
        "way",
        "s a step",
        "forwards",
        "passes",
        "over `finetune`",
        "a forward alone",
        "outside of forwards",
        "step",
    ]
    older = f" The older build is {settings['older'][:7]}." if settings["older"] else ""
    note = (
        f"{made_on(run)}; {settings['batch']} sentences a batch, {len(rounds[OURS])} rounds; medians, and of the ratios of "
        f"a round the range; memory in MiB, peaks beyond what was resident.{older}"
    )
    return f"{note}\n\n{table(head, rows)}"


PAGES = {"docs/steps.md": {"beside": part}}
