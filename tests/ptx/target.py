"""What is known of one backend on one architecture, and how it is shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import typer
from rich.table import Table

from benchmarks.machine_code import amd
from benchmarks.machine_code.amd import AMD


def architecture(text: str) -> int | str:
    """Of an option --arch: 90 or sm_90, or AMD's."""
    if (found := amd.architecture(text)) is None:
        raise typer.BadParameter(f"--arch is {text!r}; it must be a number, 90 for sm_90, or one of {', '.join(AMD)}")
    return found


def name_of(arch: int | str) -> str:
    return f"sm_{arch}" if isinstance(arch, int) else arch


@dataclass
class Target:
    backend: str
    arch: int | str
    cases: int = 0
    wrong: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0
    sizes: dict[str, list[int]] = field(default_factory=dict)
    covered: dict[str, set[int]] = field(default_factory=dict)
    kernels: int | None = None  # that there are
    left: int = 0  # cases that the time did not suffice for

    @property
    def name(self) -> str:
        return f"{self.backend} {name_of(self.arch)}"

    def coverage(self) -> float:
        """The part of the instructions that ran, of the kernels that ran."""
        done = sum(self.sizes[name][b] for name, blocks in self.covered.items() for b in blocks)
        return done / max(sum(map(sum, self.sizes.values())), 1)


def table(targets: list[Target]) -> Table:
    out = Table("backend", "architecture", "cases", "wrong", "kernels", "instructions", "seconds")
    for column in out.columns[2:]:
        column.justify = "right"
    for t in targets:
        kernels = f"{len(t.covered)}" + (f" of {t.kernels}" if t.kernels is not None else "")
        wrong = f"[red]{len(t.wrong)}[/]" if t.wrong else "0"
        part = f"{100 * t.coverage():.1f} %"
        out.add_row(t.backend, name_of(t.arch), str(t.cases), wrong, kernels, part, f"{t.seconds:.0f}")
    return out


def record(t: Target) -> dict[str, Any]:
    never = {name: [b for b in range(len(sizes)) if b not in t.covered[name]] for name, sizes in t.sizes.items()}
    return {
        "backend": t.backend, "arch": t.arch, "cases": t.cases, "wrong": t.wrong, "kernels": len(t.covered),
        "instructions": t.coverage(), "blocks that no case runs": {name: b for name, b in never.items() if b},
    }  # fmt: skip
