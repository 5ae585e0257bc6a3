"""What a step of each method of protocol.py takes, in seconds and bytes: each measured in a process of its own.

    python -m benchmarks.llm.cost --threads 2           # a quarter of an hour, on a machine that is quiet
    python -m benchmarks.llm.cost --methods mezo adam --redo

Seconds are medians over steps on the same batch, after a warm-up, each beside a forward of that batch in the same round,
so that what else the machine does falls on both. Bytes are what torch's allocator held at most while the optimizer was made
and took its first steps, beyond the weights: states, copies and activations; beside it that of a forward alone.

Stored apart from the long runs, in benchmarks/results/llm-cost-cpu.json, after each method. What is there is not measured
again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks import study
from benchmarks.llm import packed, reviews
from benchmarks.llm.bench import BATCH
from benchmarks.llm.methods import METHODS, Method, step
from benchmarks.llm.packed import Reviews
from benchmarks.llm.protocol import former
from zokern.bench.budget import peak_bytes
from zokern.bench.record import RESULTS, machine, store

Settings = dict[str, Any]
SEED = 0


def measure(task: Reviews, method: Method, rounds: int) -> Settings:
    """One method, from the starting weights. rounds: of a step and a forward, after one that is not counted."""
    task.reset()  # every weight is written once: a page that is mapped from a file is copied then, and not in a step
    batch = task.take("train", list(range(BATCH)))
    cpu = torch.device("cpu")

    def forward() -> None:
        task.loss(batch).item()

    made: list[Any] = []
    window = method.settings.get("fold_every", 1)  # steps, of which one writes the updates of all

    def begin() -> None:
        """Until a step has all that it ever has: with updates that wait, when as many wait as ever do."""
        made.append(method.optimizer(task.model, method.grid[0], SEED))
        steps(max(window, 2))

    def steps(count: int) -> None:
        for _ in range(count):
            step(method, made[0], lambda: task.loss(batch))

    forward()
    bytes_forward, bytes_step = peak_bytes(forward, cpu), peak_bytes(begin, cpu)
    seconds = [(_timed(lambda: steps(window)) / window, _timed(forward)) for _ in range(rounds + 1)][1:]
    each, forwards = ([one[i] for one in seconds] for i in (0, 1))
    return {
        "seconds": median(each), "each": [round(one, 4) for one in each], "forward_seconds": median(forwards),
        "bytes": bytes_step, "forward_bytes": bytes_forward, "forwards_per_step": method.forwards,
        "parameters": sum(p.numel() for p in task.model.parameters() if p.requires_grad), "packed": task.why is None,
    }  # fmt: skip


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _alone(options: Any, name: str) -> Settings:
    """What a process of its own measures."""
    command = [sys.executable, "-m", "benchmarks.llm.cost", "--one", name, "--model", options.model]
    command += ["--threads", str(options.threads), "--rounds", str(options.rounds)]
    environment = {"KINETO_LOG_LEVEL": "99", **os.environ}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"measuring {name} ended with {done.returncode}; what it said is above")
    found: Settings = json.loads(done.stdout.splitlines()[-1])
    return found


def parse() -> Any:
    parser = study.parser(
        __doc__,
        model=("smollm2", "as zokern finetune takes it: smollm2, a folder that save_pretrained wrote, or a .gguf file"),
        methods=(list(METHODS), f"of {', '.join(METHODS)} (default: all)"),
        rounds=(7, "of a step and a forward, of which the medians are taken"), threads=(2, "of torch"),
        redo=(False, "measure again what is there"), one=(str, "measure this one here, and print it"),
    )  # fmt: skip
    options = parser.parse_args()
    if unknown := [name for name in [*options.methods, *([options.one] if options.one else [])] if name not in METHODS]:
        parser.error(f"unknown methods {', '.join(unknown)}; there are {', '.join(METHODS)}")
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    return options


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.one:
        task = packed.load(options.model, reviews.read(), METHODS[options.one].adapter)
        with torch.no_grad():
            print(json.dumps(measure(task, METHODS[options.one], options.rounds)))
        return 0
    device, settings = torch.device("cpu"), {"batch_size": BATCH, "rounds": options.rounds, "dtype": "float32"}
    path = options.output or RESULTS / "llm-cost-cpu.json"
    results = former(path, settings, machine(device))
    for name in options.methods:
        if name in results and not options.redo:
            continue
        results[name] = found = _alone(options, name)
        store("llm-cost", device, settings, results, path, complete=not set(METHODS) - set(results))
        extra = (found["bytes"] - found["forward_bytes"]) / 1e6
        print(f"{name}: {found['seconds']:.2f} s a step, {found['seconds'] / found['forward_seconds']:.2f} forwards; "
              f"{extra:.1f} MB beside a forward", flush=True)  # fmt: skip
    print(f"stored {path}; now python -m benchmarks.pages docs/llm.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
