"""Held-out loss of every method on two real tasks, for the same number of forwards.

    python benchmarks/bench_convergence.py                         # both tasks, all methods: an hour on one core
    python benchmarks/bench_convergence.py --tasks lm --methods mezo fzoo --budget 400     # a look, in two minutes
    python benchmarks/convergence_page.py                          # table and pictures of docs/convergence.md, anew

Tasks: `demo` is what `zokern finetune` without options does, `lm` a small language model that has read docstrings and is
tuned to write code. A run may spend --budget forwards on training (0: the default of each task); Adam by backpropagation
is drawn for reference and pays 3 forwards for a forward and a backward.

How large a step is depends on the method: FZOO and ES divide by a spread, momentum adds up, signs have size one. So the
grid is not of lr but of the distance that the weights travel: a dry run at a tiny lr measures it, and for each method lr
is set so that the rms change of a weight per forward takes the same values. Each method starts with the same grid; where
the lowest validation loss lies at its edge, the grid grows there. Chosen with seed 0 on one half of the held-out data,
told of for three seeds on the other half.

Runs that are finished are kept in --cache: an interrupted benchmark goes on where it was. Results of all methods that are
finished for the settings at hand go to benchmarks/results/convergence-cpu.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from convergence_tasks import Demo, LanguageModel, Task
from rich.console import Console
from rich.progress import Progress, TaskID

import zokern
from zokern.bench.record import store
from zokern.finetune.loop import factor

Settings = dict[str, Any]
EPS = 1e-3
SCHEDULE = "linear"
SEEDS = (0, 1, 2)
MAX_EXTENSIONS = 4  # of a grid, beyond its edges
BACKPROPAGATION = 3  # forwards that one forward and backward count as
TASKS: dict[str, Settings] = {
    # budget and dry in forwards; points of a curve; sizes: rms change of a weight per forward, in the dry run
    "demo": {"budget": 192, "batch_size": 12, "points": 12, "dry": 48, "sizes": [5e-5, 1.25e-4, 3.125e-4]},
    "lm": {"budget": 1600, "batch_size": 8, "points": 20, "dry": 192, "sizes": [1e-5, 2.5e-5, 6.25e-5, 1.5625e-4]},
}


@dataclass
class Method:
    """A way to build an optimizer, and what a step of it costs.

    settings: beside lr, eps and seed. trials: other settings, tried at the best size of `settings` and at the one below.
    """

    label: str
    build: Callable[..., Any]
    forwards: int
    settings: Settings = field(default_factory=dict)
    trials: list[Settings] = field(default_factory=list)
    sign: float = 1.0  # of the closure's value: ES maximises


def _lezo(model: torch.nn.Module, share: float, **options: Any) -> Any:
    blocks = len(zokern.layers.find_blocks(model))
    return zokern.LeZO(model, num_dropped=round(share * blocks), **options)


def _adam(model: torch.nn.Module, lr: float, eps: float, seed: int) -> torch.optim.Adam:
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)


METHODS: dict[str, Method] = {
    "mezo": Method("MeZO", zokern.MeZO, 2),
    "mezo-onesided": Method("MeZO, one-sided, n=4", zokern.MeZO, 5, {"num_samples": 4, "one_sided": True}),
    "lezo": Method("LeZO", _lezo, 2, {"share": 0.7}),
    "hizoo": Method("HiZOO", zokern.HiZOO, 3, {"smoothing": 1e-6}, [{"smoothing": 1e-8}, {"smoothing": 1e-4}]),
    "helene": Method("HELENE", zokern.HELENE, 2, {"floor": 1.0}, [{"floor": 30.0}, {"floor": 1e3}]),
    "mezo-gv": Method("MeZO-GV", zokern.MeZOGV, 6),
    "mezo-greedy": Method("MeZO-Greedy", zokern.MeZOGreedy, 5),
    "fzoo": Method("FZOO", zokern.FZOO, 9),
    "es": Method("ES, N=8 antithetic", zokern.ES, 16, {"num_directions": 8, "antithetic": True}, sign=-1.0),
    "mezo-momentum": Method("MeZO, momentum", zokern.MeZO, 2, {"update": "momentum"}),
    "mezo-adam": Method("MeZO, Adam", zokern.MeZO, 2, {"update": "adam"}),
    "mezo-adamezo": Method("MeZO, AdaMeZO", zokern.MeZO, 2, {"update": "adamezo"}),
    "mezo-sign": Method("MeZO, sign", zokern.MeZO, 2, {"update": "sign"}),
    "adam": Method("Adam (backpropagation)", _adam, BACKPROPAGATION),
}


# ---------------------------------------------------------------------------------------------------------- one run


def clock() -> float:
    """Seconds of training: on one thread those of the processor, which other work on the machine does not lengthen."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _closure(task: Task, method: Method, optimizer: Any, batch: Any) -> Callable[[], Any]:
    def closure() -> Any:
        if method.build is not _adam:
            return method.sign * task.loss(batch)
        optimizer.zero_grad()
        loss = task.loss(batch)
        loss.backward()
        return loss

    return closure


def train(
    task: Task,
    method: Method,
    settings: Settings,
    lr: float,
    seed: int,
    config: Settings,
    advance: Callable[[int], None],
) -> Settings:
    """One run from the starting weights: its curve on part of the reported texts, and where it ends."""
    task.reset()
    optimizer = method.build(task.model, lr=lr, eps=EPS, seed=seed, **settings)
    steps = max(config["budget"] // method.forwards, 1)
    share = factor(SCHEDULE, 0, steps)
    looks = {round(i * steps / config["points"]) for i in range(1, config["points"] + 1)}
    batches = task.batches(config["batch_size"], seed)
    curve = [{"forwards": 0, "seconds": 0.0, **task.evaluate("curve")}]
    seconds = wall = 0.0
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * share(step)
        batch = next(batches)
        start, wall_start = clock(), time.perf_counter()
        optimizer.step(_closure(task, method, optimizer, batch))
        seconds, wall = seconds + clock() - start, wall + time.perf_counter() - wall_start
        advance(method.forwards)
        if step + 1 in looks:
            curve.append({"forwards": (step + 1) * method.forwards, "seconds": seconds, **task.evaluate("curve")})
            if not math.isfinite(curve[-1]["loss"]):
                break  # it has diverged, and stays so
    return {"steps": steps, "seconds": seconds, "wall_seconds": wall, "curve": curve,
            "validation": task.evaluate("validation"), "report": task.evaluate("report")}  # fmt: skip


def travel(task: Task, method: Method, settings: Settings, config: Settings) -> float:
    """Rms change of a weight per forward and per unit of lr, near the starting weights.

    Net change over `dry` forwards, so that momentum and several forwards a step count as what they are. lr is set so low
    that the weights hardly move: then the change is proportional to lr.
    """

    def distance(lr: float, steps: int) -> float:
        task.reset()
        optimizer = method.build(task.model, lr=lr, eps=EPS, seed=1 << 20, **settings)
        batches = task.batches(config["batch_size"], 1 << 20)
        for _ in range(steps):
            optimizer.step(_closure(task, method, optimizer, next(batches)))
        return task.moved()

    steps = max(config["dry"] // method.forwards, 1)
    lr = 1e-6
    lr *= 1e-5 / math.sqrt(steps) / distance(lr, 1)  # far above float32's resolution, far below what the loss sees
    return distance(lr, steps) / (lr * steps * method.forwards)


# ------------------------------------------------------------------------------------------------ the whole benchmark


class Cache:
    """One JSON file for each finished piece of work, named by a hash of all that it depends on."""

    def __init__(self, folder: Path, redo: bool) -> None:
        self.folder, self._redo = folder, redo
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: Settings, make: Callable[[], Any] | None) -> Any:
        """What is kept for `key`, or what `make` gives; None where nothing is kept and nothing can be made."""
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
        path = self.folder / f"{key['task']}-{key['method']}-{name}.json"
        if path.is_file() and not (self._redo and make):
            return json.loads(path.read_text())["value"]
        if make is None:
            return None
        value = make()
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"key": key, "value": value}))
        os.replace(temporary, path)
        return value


class Search:
    """Chooses lr and settings of one method on one task, then runs all seeds. With task None: only what is cached."""

    def __init__(self, name: str, method: str, config: Settings, cache: Cache, task: Task | None, say: Any) -> None:
        self.task_name, self.method_name, self.method = name, method, METHODS[method]
        self.config, self.cache, self.task, self.say = config, cache, task, say
        self.grid: list[Settings] = []

    def _run(self, settings: Settings, size: float, seed: int) -> Settings | None:
        task = self.task
        base = {"task": self.task_name, "method": self.method_name, "settings": settings, "eps": EPS,
                "batch_size": self.config["batch_size"]}  # fmt: skip
        per_lr = self.cache.get(
            {**base, "dry": self.config["dry"]},
            task and (lambda: travel(task, self.method, settings, self.config)),
        )
        if per_lr is None:
            return None
        lr = float(f"{size / per_lr:.3g}")
        key = {**base, "size": f"{size:.4g}", "lr": lr, "seed": seed, "budget": self.config["budget"],
               "schedule": SCHEDULE}  # fmt: skip
        run = self.cache.get(key, task and (lambda: self.say(self, settings, size, lr, seed, self.config["budget"])))
        return run and {**run, "lr": lr, "size": size, "settings": settings}

    def _try(self, settings: Settings, size: float) -> float | None:
        run = self._run(settings, size, SEEDS[0])
        if run is None:
            return None
        loss = run["validation"]["loss"]
        loss = loss if math.isfinite(loss) else math.inf
        self.grid.append({"settings": settings, "size": size, "lr": run["lr"],
                          "validation_loss": round(loss, 5) if loss < math.inf else None})  # fmt: skip
        return loss

    def result(self) -> Settings | None:
        """The record of this method, or None where it is not finished."""
        sizes = list(self.config["sizes"])
        ratio = sizes[1] / sizes[0]
        found = {}
        settings = dict(self.method.settings)
        if self.method_name == "helene":
            settings["batch_size"] = self.config["batch_size"]
        for size in sizes:
            found[size] = self._try(settings, size)
        for _ in range(MAX_EXTENSIONS):
            if None in found.values():
                return None
            best = min(found, key=found.get)
            if best == min(found):
                size = best / ratio
            elif best == max(found):
                size = best * ratio
            else:
                break
            found[size] = self._try(settings, size)
        if None in found.values():
            return None
        size = min(found, key=found.get)
        lowest, chosen = found[size], settings
        for trial in self.method.trials:
            for near in [s for s in sorted(found) if s <= min(found, key=found.get)][-2:]:
                loss = self._try({**settings, **trial}, near)
                if loss is None:
                    return None
                if loss < lowest:
                    lowest, size, chosen = loss, near, {**settings, **trial}
        runs = [self._run(chosen, size, seed) for seed in SEEDS]
        return None if None in runs else self._summary(chosen, size, runs)

    def _summary(self, settings: Settings, size: float, runs: list[Settings]) -> Settings:
        keys = list(runs[0]["report"])
        curves = list(zip(*(run["curve"] for run in runs), strict=False))
        curve = {"forwards": [points[0]["forwards"] for points in curves],
                 "seconds": [round(statistics.mean(p["seconds"] for p in points), 3) for points in curves]}  # fmt: skip
        for key in keys:
            curve[key] = [_spread([p[key] for p in points]) for points in curves]
        return {
            "label": self.method.label,
            "settings": settings,
            "lr": runs[0]["lr"],
            "size": size,
            "forwards_per_step": self.method.forwards,
            "steps": runs[0]["steps"],
            "seconds": round(statistics.mean(run["seconds"] for run in runs), 2),
            "wall_seconds": round(statistics.mean(run["wall_seconds"] for run in runs), 2),
            "final": {key: _spread([run["report"][key] for run in runs]) for key in keys},
            "grid": self.grid,
            "curve": curve,
        }


def _spread(values: list[float]) -> Settings:
    return {"mean": round(statistics.mean(values), 5), "std": round(statistics.stdev(values), 5),
            "each": [round(v, 5) for v in values]}  # fmt: skip


def configs(args: argparse.Namespace) -> Iterator[tuple[str, Settings]]:
    for name in args.tasks:
        yield name, {**TASKS[name], "budget": args.budget or TASKS[name]["budget"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), help="default: both")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD",
                        help=f"default: all of {', '.join(METHODS)}")  # fmt: skip
    parser.add_argument(
        "--budget", type=int, default=0, help="forwards that a run may spend; 0 (default): as TASKS says"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1, on which seconds mean most)")
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    parser.add_argument("--cache", type=Path, default=home / "zokern-convergence", help="where finished runs are kept")
    parser.add_argument("--redo", action="store_true", help="run what is in the cache again")
    parser.add_argument("--redo-pretraining", action="store_true", help="pre-train the language model again")
    parser.add_argument("--finished", action="store_true", help="run nothing: store the methods that are finished")
    parser.add_argument("--json", type=Path, help="where to store the results, in place of benchmarks/results")
    args = parser.parse_args()
    if args.budget < 0 or args.threads < 1:
        parser.error("--budget must be at least 0 and --threads at least 1")
    torch.set_num_threads(args.threads)
    console, cache = Console(), Cache(args.cache, args.redo)
    results: Settings = {}
    for name, config in configs(args):
        task: Task = Demo() if name == "demo" else LanguageModel(args.cache, redo=args.redo_pretraining)
        task.reset()
        results[name] = {
            **config,
            "task": task.describe(),
            "start": {part: task.evaluate(part) for part in ("validation", "report")},
            "methods": {},
        }
        with Progress(console=console, transient=True) as progress:
            for method in args.methods:

                def say(search: Search, settings: Settings, size: float, lr: float, seed: int, budget: int) -> Settings:
                    shown = " ".join(f"{k}={v}" for k, v in settings.items())
                    title = f"{search.task_name} {search.method_name} {shown} size {size:.3g} lr {lr:.3g} seed {seed}"
                    bar: TaskID = progress.add_task(title, total=budget)
                    assert search.task is not None
                    run = train(search.task, search.method, settings, lr, seed, search.config,
                                lambda count: progress.advance(bar, count))  # fmt: skip
                    progress.remove_task(bar)
                    end = ", ".join(f"{key} {value:.4f}" for key, value in run["validation"].items())
                    console.print(f"{title}: validation {end}, {run['seconds']:.1f} s", highlight=False, soft_wrap=True)
                    return run

                found = Search(name, method, config, cache, None if args.finished else task, say).result()
                if found is not None:
                    results[name]["methods"][method] = found
                    loss = found["final"]["loss"]
                    console.print(f"[bold]{name} {found['label']}: {loss['mean']:.4f} +- {loss['std']:.4f}[/]")
    settings = {"eps": EPS, "schedule": SCHEDULE, "seeds": list(SEEDS), "backpropagation_counts_as": BACKPROPAGATION}
    path = store("convergence", torch.device("cpu"), settings, results, args.json)
    console.print(f"stored in {path}; now python benchmarks/convergence_page.py")


if __name__ == "__main__":
    main()
