"""Held-out loss of every method on two real tasks, for the same number of forwards.

    python -m benchmarks.convergence.run                           # both tasks, all methods: three hours on one core
    python -m benchmarks.convergence.run --tasks lm --methods mezo fzoo --budget 400       # a look, in two minutes
    python -m benchmarks.pages docs/convergence.md                 # its tables and pictures anew

Tasks: `demo` is what `zokern finetune` without options does, `lm` a small language model that has read docstrings and is
tuned to write code. A run may spend --budget forwards on training (0: the default of each task); Adam by backpropagation
is drawn for reference and pays 3 forwards for a forward and a backward.

How large a step is depends on the method: FZOO and ES divide by a spread, momentum adds up, signs have size one. So the
grid is not of lr but of the distance that the weights travel: a dry run at a tiny lr measures it, and for each method lr
is set so that the rms change of a weight per forward takes the same values. Each method starts with the same grid; where
the lowest validation loss lies at its edge, the grid grows there. Chosen by the mean of two seeds on one half of the
held-out data, told of for five seeds on the other half.

Runs that are finished are kept in --cache: an interrupted benchmark goes on where it was. Results of all methods that are
finished for the settings at hand go to benchmarks/results/convergence-cpu.json.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from rich.progress import Progress

from benchmarks import study
from benchmarks.convergence.methods import BACKPROPAGATION, METHODS, Settings
from benchmarks.convergence.search import CHOOSING, EPS, SCHEDULE, SEEDS, Cache, Search, Unfinished
from benchmarks.convergence.tasks import Demo, LanguageModel, Task
from zokern.bench.record import store

TASKS: dict[str, Settings] = {
    # budget and dry in forwards; points of a curve; sizes: rms change of a weight per forward, in the dry run
    "demo": {"budget": 192, "batch_size": 12, "points": 12, "dry": 48, "sizes": [5e-5, 1.25e-4, 3.125e-4]},
    "lm": {"budget": 1600, "batch_size": 8, "points": 20, "dry": 192, "sizes": [1e-5, 2.5e-5, 6.25e-5, 1.5625e-4]},
}


def cache_home() -> Path:
    """Where finished runs and the pre-trained model are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "zokern-convergence"


def main() -> None:
    parser = study.parser(
        __doc__, budget=(0, "forwards that a run may spend; 0: as TASKS says"),
        threads=(1, "of torch; on one, seconds mean most"),
        cache=(cache_home(), "where finished runs are kept"),
        redo=(False, "run what is in the cache again"), redo_pretraining=(False, "pre-train the language model again"),
        finished=(False, "run nothing: store the methods that are finished"),
    )  # fmt: skip
    for name, known in (("--tasks", TASKS), ("--methods", METHODS)):
        parser.add_argument(name, nargs="+", default=list(known), choices=list(known), help="default: all")
    args = parser.parse_args()
    if args.budget < 0 or args.threads < 1:
        parser.error("--budget must be at least 0 and --threads at least 1")
    torch.set_num_threads(args.threads)
    cache = Cache(args.cache, args.redo, args.finished)
    results: Settings = {}
    for name in args.tasks:
        config = {**TASKS[name], "budget": args.budget or TASKS[name]["budget"]}
        task: Task = Demo() if name == "demo" else LanguageModel(args.cache, redo=args.redo_pretraining)
        task.reset()
        start = {part: task.evaluate(part) for part in ("validation", "report")}
        results[name] = {**config, "task": task.describe(), "start": start, "methods": {}}
        with Progress(transient=True) as progress:
            for method in args.methods:
                try:
                    found = Search(name, method, config, cache, task, progress).result()
                except Unfinished:
                    continue
                results[name]["methods"][method] = found
                loss = found["final"]["loss"]
                progress.console.print(f"[bold]{name} {found['label']}: {loss['mean']:.4f} +- {loss['std']:.4f}[/]")
    settings = {
        "eps": EPS,
        "schedule": SCHEDULE,
        "seeds": list(SEEDS),
        "choosing": list(CHOOSING),
        "backpropagation_counts_as": BACKPROPAGATION,
    }
    path = store("convergence", torch.device("cpu"), settings, results, args.output)
    print(f"stored in {path}; now python -m benchmarks.pages docs/convergence.md")


if __name__ == "__main__":
    main()
