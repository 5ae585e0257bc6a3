"""Held-out loss after equal forwards, along dense directions and along those of low rank.

    python -m benchmarks.lowrank.learning                      # both tasks, five seeds: a quarter of an hour on one core
    python -m benchmarks.lowrank.learning --tasks lm --seeds 0 1

Tasks, batches, budgets and schedule are those of benchmarks.convergence, and so is lr: what was best for MeZO with dense
directions there (benchmarks/results/convergence-cpu.json). A direction of any kind has mean 0 and variance 1, so the same
lr is the same step. Nothing is tuned for low rank. Stores benchmarks/results/lowrank-learning-cpu.json.
"""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

import torch
from rich.progress import Progress

import zokern
from benchmarks import study
from benchmarks.convergence.run import TASKS, cache_home
from benchmarks.convergence.search import EPS, SCHEDULE
from benchmarks.convergence.tasks import Demo, LanguageModel, Task
from benchmarks.parts import load, made_on, table
from zokern.bench.record import store
from zokern.finetune.loop import factor

DIRECTIONS = {"dense": "normal", "rank 1": "lowrank:1", "rank 4": "lowrank:4"}


def train(task: Task, config: dict[str, Any], distribution: str, lr: float, seed: int, progress: Progress) -> float:
    """The loss on the reported data at the end of a run."""
    task.reset()
    opt = zokern.MeZO(task.model, lr, eps=EPS, seed=seed, distribution=distribution)
    batches, steps = task.batches(config["batch_size"], seed), config["budget"] // 2
    share, bar = factor(SCHEDULE, 0, steps), progress.add_task(f"{distribution}, seed {seed}", total=steps)
    for step in range(steps):
        opt.param_groups[0]["lr"] = lr * share(step)
        batch = next(batches)
        opt.step(lambda batch=batch: task.loss(batch))
        progress.advance(bar)
    progress.remove_task(bar)
    return task.evaluate("report")["loss"]


def main() -> None:
    parser = study.parser(
        __doc__, seeds=([0, 1, 2, 3, 4], "of the runs: batches and directions"), threads=(1, "of torch"),
        tasks=(list(TASKS), "demo, lm or both"), redo_pretraining=(False, "pre-train the language model again"),
    )  # fmt: skip
    args = parser.parse_args()
    if unknown := [name for name in args.tasks if name not in TASKS]:
        parser.error(f"--tasks has {unknown[0]!r}; it takes {', '.join(TASKS)}")
    if args.threads < 1 or len(set(args.seeds)) < 2:
        parser.error("--threads must be at least 1, and --seeds two different ones at least")
    torch.set_num_threads(args.threads)
    known, results = load("convergence-cpu.json")["results"], {}
    for name in args.tasks:
        config, lr = TASKS[name], known[name]["methods"]["mezo"]["lr"]
        task: Task = Demo() if name == "demo" else LanguageModel(cache_home(), redo=args.redo_pretraining)
        task.reset()
        results[name] = {
            "lr": lr,
            "budget": config["budget"],
            "start": task.evaluate("report")["loss"],
            "directions": {},
        }
        with Progress(transient=True) as progress:
            for label, distribution in DIRECTIONS.items():
                each = [train(task, config, distribution, lr, seed, progress) for seed in args.seeds]
                found = {"mean": mean(each), "std": stdev(each), "each": each}
                results[name]["directions"][label] = {k: _rounded(v) for k, v in found.items()}
                progress.console.print(f"{name}, {label}: {found['mean']:.4f} +- {found['std']:.4f}", highlight=False)
    settings = {"eps": EPS, "schedule": SCHEDULE, "seeds": args.seeds}
    path = store("lowrank-learning", torch.device("cpu"), settings, results, args.output)
    print(f"stored in {path}; now python -m benchmarks.pages docs/lowrank.md")


def _rounded(value: Any) -> Any:
    return [round(v, 5) for v in value] if isinstance(value, list) else round(value, 5)


def learning_part() -> str:
    run = load("lowrank-learning-cpu.json")
    rows = []
    for name, task in run["results"].items():
        dense = task["directions"]["dense"]
        for label, found in task["directions"].items():
            apart = "" if label == "dense" else f"{found['mean'] - dense['mean']:+.3f}".replace("-", "−")
            cells = f"{found['mean']:.3f} ± {found['std']:.3f}"
            rows.append([f"`{name}`, {task['budget']} forwards", label, cells, apart, f"{task['start']:.3f}"])
    told = table(["task", "directions", "held-out loss", "minus dense", "before"], rows)
    return f"{made_on(run)}.\n\n{told}"


PAGES = {"docs/lowrank.md": {"learning": learning_part}}

if __name__ == "__main__":
    main()
