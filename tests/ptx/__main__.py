"""Runs the GPU kernels without a GPU and says what is wrong: python -m tests.ptx --help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from . import build, triton_host
from .runner import Worker, console, run
from .target import AMD, Target, architecture, record, table

BACKENDS, ARCHS = ["cuda", "triton"], [80, 90, 100, 120]


def main(
    backend: Annotated[list[str] | None, typer.Option(help="cuda or triton; default: both")] = None,
    arch: Annotated[
        list[str] | None,
        typer.Option(
            help="80 for sm_80, gfx942 for AMD's; default: all six, with --quick 90, gfx942 and, of CUDA, what is built."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A fixed selection that takes seconds.")] = False,
    steps: Annotated[bool | None, typer.Option(help="Whole optimizer steps too; default: unless --quick.")] = None,
    only: Annotated[str, typer.Option(help="Cases whose description has all of these words, e.g. 'hizoo K=5'.")] = "",
    peer: Annotated[str, typer.Option(help="The backend whose bits are right: cpu, or reference, slowly.")] = "cpu",
    seconds: Annotated[float | None, typer.Option(help="Stop after so long; what is left out is counted.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes at once; default: one for each processor.")] = None,
    registers: Annotated[
        bool, typer.Option(help="Wrong, too: registers that may be unset. Triton 3.6 and older leave some.")
    ] = True,
    output: Annotated[Path | None, typer.Option(help="JSON of what was wrong and which code no case runs.")] = None,
) -> None:
    """Runs the CUDA and Triton kernels without a GPU, as the project's own host code launches them, in an interpreter of
    PTX, or of the machine code of AMD's gfx942 and gfx950, and compares them with the CPU's kernels bit for bit. Every
    access is checked: bounds of each tensor, alignment, state space, bytes never written, races, barriers. CUDA needs what
    `make setup` builds where nvcc is.

    A case is printed when it is wrong, with the instruction, how often, and an example. Its description finds it again:

    python -m tests.ptx --backend cuda --arch 90 --only 'hizoo fp32 K=200'

    Everything is some thousand cases for each backend and architecture: hours on two processors. --quick takes seconds;
    --seconds sees some of all kinds in the given time.

    The table: cases that ran, how many were wrong, kernels that ran, and which part of their instructions did.

    Exit status: 0 all right, 1 something is wrong, 2 something that was asked for cannot run here, and why is printed.
    """
    begin = time.monotonic()
    wanted = backend or BACKENDS
    if unknown := [name for name in wanted if name not in BACKENDS]:
        raise typer.BadParameter(f"--backend is {unknown[0]!r}; it must be cuda or triton")
    if peer not in ("cpu", "reference"):
        raise typer.BadParameter(f"--peer is {peer!r}; it must be cpu or reference")
    if jobs is not None and jobs < 1:
        raise typer.BadParameter(f"--jobs is {jobs}; it must be 1 or more")
    jobs = jobs or os.cpu_count() or 1
    archs = [architecture(name) for name in arch or []]
    targets, reasons = available(wanted, archs or (None if quick else [*ARCHS, *AMD]), bool(backend and arch))
    given = ["--quick"] if quick else []
    given += [] if registers else ["--no-registers"]
    given += ["--steps"] if (not quick if steps is None else steps) else []
    run(workers(targets, jobs, [*given, "--only", only, "--peer", peer]), jobs, begin + seconds if seconds else None)
    if targets:
        console.print(table(targets))
    for name, reason in reasons.items():
        console.print(f"[yellow]{name} not run:[/] {escape(reason)}")
    ran, wrong = sum(t.cases for t in targets), sum(len(t.wrong) for t in targets)
    left = sum(t.left for t in targets)
    rest = f", {left} left for want of time" if left else ""
    console.print(f"{ran} cases, {wrong} wrong{rest}; {time.monotonic() - begin:.0f} s")
    if output is not None:
        output.write_text(json.dumps([record(t) for t in targets], indent=1) + "\n")
    if not ran and targets:
        console.print(f"[red]no case has all of the words {escape(repr(only))}[/]" if only else "[red]no case ran[/]")
    raise typer.Exit(1 if wrong or (targets and not ran) else 2 if reasons else 0)


def available(wanted: list[str], archs: list[int | str] | None, all_asked: bool) -> tuple[list[Target], dict[str, str]]:
    """What can run, and why the rest cannot. Without `archs` those whose PTX is at hand, and one of AMD's.

    all_asked: each backend was asked for on each architecture; else CUDA on NVIDIA's alone."""
    targets, reasons = [], {}
    for name in wanted:
        if (reason := (build if name == "cuda" else triton_host).unavailable_reason()) is not None:
            reasons[name] = reason
            continue
        for arch in archs or (build.carried() if name == "cuda" else [90, next(iter(AMD))]):
            target = Target(name, arch)
            if name == "cuda" and arch in AMD:
                if all_asked:
                    reasons[target.name] = "CUDA's kernels are for NVIDIA's GPUs; Triton's serve AMD's"
                continue
            if (reason := unknown_architecture(target)) is not None:
                reasons[target.name] = reason
            else:
                targets.append(target)
    return targets, reasons


def unknown_architecture(target: Target) -> str | None:
    if target.backend == "triton" or not isinstance(target.arch, int) or target.arch in build.carried():
        return None
    nvcc = build.compiler("CUDA")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    if f"compute_{target.arch}" in known:
        return None
    return f"{nvcc} knows {', '.join(known)}; name others with --arch"


def workers(targets: list[Target], jobs: int, options: list[str]) -> list[Worker]:
    """Several for each target where there are more processors than targets."""
    parts = max(jobs // max(len(targets), 1), 1)
    command = [sys.executable, "-m", "tests.ptx.worker"]
    return [
        Worker(t, [*command, t.backend, str(t.arch), f"{n + 1}/{parts}", *options])
        for t in targets
        for n in range(parts)
    ]


if __name__ == "__main__":
    typer.run(main)
