"""How many directions a step: one-sided MeZO with n of them on a small language model, for the same forwards.

    python -m benchmarks.choose.run                       # a quarter of an hour on one core
    python -m benchmarks.choose.run --samples 1 4 16 --output FILE   # some of them
    python -m benchmarks.pages docs/choose.md             # its table anew

The task is `lm` of benchmarks/convergence, with its budget, schedule, grids and seeds: for each n lr is chosen anew, on
texts that are not told of. A step of n directions costs n + 1 forwards, so more directions are fewer steps.

Runs that are finished are kept in --cache, together with those of that benchmark: an interrupted one goes on where it was.
Stores benchmarks/results/samples-cpu.json.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from rich.progress import Progress

import zokern
from benchmarks import study
from benchmarks.convergence.methods import Method
from benchmarks.convergence.run import TASKS, cache_home
from benchmarks.convergence.search import CHOOSING, SCHEDULE, SEEDS, Cache, Search
from benchmarks.convergence.tasks import LanguageModel
from zokern.bench.record import store

SAMPLES = (1, 2, 4, 8, 16, 32)
TASK = "lm"


def method(samples: int) -> Method:
    settings = {"num_samples": samples, "one_sided": True}
    return Method(f"MeZO, one-sided, n={samples}", zokern.MeZO, samples + 1, settings)


def main() -> int:
    parser = study.parser(
        __doc__,
        samples=(list(SAMPLES), "directions a step (default: 1 to 32 by doubling)"),
        budget=(TASKS[TASK]["budget"], "forwards that a run may spend"), threads=(1, "of torch"),
        cache=(cache_home(), "where finished runs and the pre-trained model are kept"),
    )  # fmt: skip
    options = parser.parse_args()
    if min(options.samples) < 1 or options.threads < 1 or options.budget <= max(options.samples):
        parser.error("--samples and --threads are at least 1, and --budget allows a step: more than the samples")
    default = set(options.samples) == set(SAMPLES) and options.budget == TASKS[TASK]["budget"]
    if not default and options.output is None:
        parser.error("--samples or --budget other than the default needs --output: the stored study has all of them")
    torch.set_num_threads(options.threads)
    config, results = {**TASKS[TASK], "budget": options.budget}, dict[str, Any]()
    known = {f"mezo-n{samples}": method(samples) for samples in sorted(set(options.samples))}
    cache, task = Cache(options.cache, redo=False, finished=False), LanguageModel(options.cache, redo=False)
    task.reset()
    start = {part: task.evaluate(part) for part in ("validation", "report")}
    with Progress(transient=True) as progress:
        for name in known:
            found = Search(TASK, name, config, cache, task, progress, known).result()
            results[name] = found
            loss = found["final"]["loss"]
            progress.console.print(f"[bold]{found['label']}: {loss['mean']:.4f} +- {loss['std']:.4f}[/]")
    settings = {**config, "schedule": SCHEDULE, "seeds": list(SEEDS), "choosing": list(CHOOSING)}
    found = {"task": task.describe(), "start": start, "methods": results}
    path = store("samples", torch.device("cpu"), settings, found, options.output)
    print(f"stored {path}; now python -m benchmarks.pages docs/choose.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
