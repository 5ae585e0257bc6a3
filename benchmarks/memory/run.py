"""What training takes of memory beside the weights: by zeroth order in each placement, by LoRA and Adam, by Adam on all.

    python -m benchmarks.memory.run                       # what is missing of the results
    python -m benchmarks.memory.run --redo                # all anew
    python -m benchmarks.pages docs/memory.md             # the page

Each measurement is a process of its own, forked by one that has imported the libraries and done nothing: see worker.py.
malloc is told to give back what is freed at once (benchmarks/resident.py), so that what is held is measured.
Shapes are Llama's with random weights, up to SmolLM2-135M's; float32, on a CPU. The formulas of formulas.py are checked
against them, and give the page its larger models. Stores benchmarks/results/memory-cpu.json after each.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from benchmarks import resident, study
from benchmarks.memory.formulas import MEASURED
from benchmarks.memory.shapes import SMALL
from benchmarks.memory.worker import work
from zokern.bench.record import RESULTS, store
from zokern.cli.waiting import spin_briefly

TOKENS = ((16, 28), (16, 128))  # rows, tokens of each
PRELOADED = ["torch", "transformers.models.llama.modeling_llama", "peft", "zokern", "benchmarks.memory.worker"]


def one(done: Callable[..., None], threads: int, way: str, *args: Any) -> dict[str, int]:
    """What done(pipe, threads, way, ...) sends, in a fresh process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    here, there = context.Pipe()
    process = context.Process(target=done, args=(there, threads, way, *args))
    process.start()
    there.close()
    try:
        found: dict[str, int] = here.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"the process of '{way}' ended with code {process.exitcode}; what it said is above") from None
    process.join()
    return found


def key(name: str, rows: int, length: int, way: str) -> str:
    return f"{name} {rows}x{length} {way}"


def former(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call has stored, with the same settings."""
    if not path.is_file():
        return {}
    stored = json.loads(path.read_text())
    if stored["settings"] != settings:
        raise SystemExit(f"{path} was measured with other settings; give --redo, or another --output")
    found: dict[str, Any] = stored["results"]
    return found


def main(
    about: str | None = __doc__,
    name: str = "memory",
    subjects: Mapping[str, Any] = SMALL,
    ways: Collection[str] = tuple(MEASURED),
    dtype: str = "float32",
    done: Callable[..., None] = work,
) -> None:
    """name: of what is stored. done: a process's work, called with its pipe, the threads, a way, one of the subjects, rows
    and their length."""
    args = study.parser(
        about, models=(list(subjects), f"of {', '.join(subjects)} (default: all)"), threads=(2, "of each process"),
        redo=(False, "measure all anew"),
    ).parse_args()  # fmt: skip
    if unknown := [model for model in args.models if model not in subjects]:
        raise SystemExit(f"--models: there is no {', '.join(unknown)}; there are {', '.join(subjects)}")
    spin_briefly()  # the processes inherit both
    os.environ.update(resident.GIVES_BACK)
    path = args.output or RESULTS / f"{name}-cpu.json"
    shapes = {model: subject.facts() for model, subject in subjects.items()}
    settings = {"threads": args.threads, "dtype": dtype, "shapes": shapes}
    found = {} if args.redo else former(path, settings)
    wanted = [
        (model, rows, length, way) for model, (rows, length), way in itertools.product(args.models, TOKENS, ways)
        if key(model, rows, length, way) not in found
    ]  # fmt: skip
    whole = len(subjects) * len(TOKENS) * len(ways)
    for model, rows, length, way in track(wanted, description=name, console=Console(stderr=True)):
        found[key(model, rows, length, way)] = one(done, args.threads, way, subjects[model], rows, length)
        store(name, torch.device("cpu"), settings, found, path, complete=len(found) == whole)
    print(f"stored {path}: {len(found)} of {whole}")


if __name__ == "__main__":
    main()
