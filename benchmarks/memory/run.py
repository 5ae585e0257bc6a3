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
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from benchmarks import resident, study
from benchmarks.memory.formulas import MEASURED
from benchmarks.memory.shapes import SMALL, Shape
from benchmarks.memory.worker import work
from zokern.bench.record import RESULTS, store
from zokern.cli.waiting import spin_briefly

TOKENS = ((16, 28), (16, 128))  # rows, tokens of each
PRELOADED = ["torch", "transformers.models.llama.modeling_llama", "peft", "zokern", "benchmarks.memory.worker"]


def one(way: str, shape: Shape, rows: int, length: int, threads: int) -> dict[str, int]:
    """Of a fresh process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    here, there = context.Pipe()
    process = context.Process(target=work, args=(there, threads, way, shape, rows, length))
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


def main() -> None:
    args = study.parser(
        __doc__, models=(list(SMALL), f"of {', '.join(SMALL)} (default: all)"), threads=(2, "of each process"),
        redo=(False, "measure all anew"),
    ).parse_args()  # fmt: skip
    if unknown := [name for name in args.models if name not in SMALL]:
        raise SystemExit(f"--models: there is no {', '.join(unknown)}; there are {', '.join(SMALL)}")
    spin_briefly()  # the processes inherit both
    os.environ.update(resident.GIVES_BACK)
    path = args.output or RESULTS / "memory-cpu.json"
    settings = {"threads": args.threads, "dtype": "float32", "shapes": {name: s.facts() for name, s in SMALL.items()}}
    found = {} if args.redo else former(path, settings)
    wanted = [
        (name, rows, length, way) for name, (rows, length), way in itertools.product(args.models, TOKENS, MEASURED)
        if key(name, rows, length, way) not in found
    ]  # fmt: skip
    whole = len(SMALL) * len(TOKENS) * len(MEASURED)
    for name, rows, length, way in track(wanted, description="memory", console=Console(stderr=True)):
        found[key(name, rows, length, way)] = one(way, SMALL[name], rows, length, args.threads)
        store("memory", torch.device("cpu"), settings, found, path, complete=len(found) == whole)
    print(f"stored {path}: {len(found)} of {whole}")


if __name__ == "__main__":
    main()
