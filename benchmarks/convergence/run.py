"""Held-out loss of every method on two real tasks, for the same number of forwards.

    python -m benchmarks.convergence.run                           # both tasks, all methods: an hour on one core
    python -m benchmarks.convergence.run --tasks lm --methods mezo fzoo --budget 400       # a look, in two minutes
    python -m benchmarks.pages docs/convergence.md                 # its tables and pictures anew

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

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.progress import Progress

import zokern
from benchmarks import study
from benchmarks.convergence.tasks import Demo, LanguageModel, Task
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


def lezo(model: torch.nn.Module, share: float, **options: Any) -> Any:
    blocks = len(zokern.layers.find_blocks(model))
    return zokern.LeZO(model, num_dropped=round(share * blocks), **options)


def adam(model: torch.nn.Module, lr: float, eps: float, seed: int) -> torch.optim.Adam:
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)


METHODS: dict[str, Method] = {
    "mezo": Method("MeZO", zokern.MeZO, 2),
    "mezo-onesided": Method("MeZO, one-sided, n=4", zokern.MeZO, 5, {"num_samples": 4, "one_sided": True}),
    "lezo": Method("LeZO", lezo, 2, {"share": 0.7}),
    "hizoo": Method("HiZOO", zokern.HiZOO, 3, {"smoothing": 1e-6}, [{"smoothing": 1e-8}, {"smoothing": 1e-4}]),
    "helene": Method("HELENE", zokern.HELENE, 2, {"floor": 1.0}, [{"floor": 30.0}, {"floor": 1e3}]),
    "mezo-gv": Method("MeZO-GV", zokern.MeZOGV, 6),
    "mezo-greedy": Method("MeZO-Greedy", zokern.MeZOGreedy, 5),
    "fzoo": Method("FZOO", zokern.FZOO, 9),
    "es": Method(
        "ES, N=8 antithetic", zokern.ES, 16, {"num_directions": 8, "antithetic": True, "maximize": True}, sign=-1.0
    ),
    "mezo-momentum": Method("MeZO, momentum", zokern.MeZO, 2, {"update": "momentum"}),
    "mezo-adam": Method("MeZO, Adam", zokern.MeZO, 2, {"update": "adam"}),
    "mezo-adamezo": Method("MeZO, AdaMeZO", zokern.MeZO, 2, {"update": "adamezo"}),
    "mezo-sign": Method("MeZO, sign", zokern.MeZO, 2, {"update": "sign"}),
    "adam": Method("Adam (backpropagation)", adam, BACKPROPAGATION),
}


def clock() -> float:
    """Seconds of training: on one thread those of the processor, which other work on the machine does not lengthen."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Unfinished(Exception):
    """What is not kept is asked for, and nothing is to be run."""


class Cache:
    """One JSON file for each finished piece of work, named by a hash of all that it depends on."""

    def __init__(self, folder: Path, redo: bool, finished: bool) -> None:
        self.folder, self._redo, self._finished = folder, redo, finished
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: Settings, make: Callable[[], Any]) -> Any:
        """What is kept for `key`, or what `make` gives; Unfinished where nothing is kept and nothing is to be made."""
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
        path = self.folder / f"{key['task']}-{key['method']}-{name}.json"
        if path.is_file() and (self._finished or not self._redo):
            return json.loads(path.read_text())["value"]
        if self._finished:
            raise Unfinished
        value = make()
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"key": key, "value": value}))
        os.replace(temporary, path)
        return value


class Search:
    """Chooses lr and settings of one method on one task, then runs all seeds.

    method: its name, of those that are known.
    """

    def __init__(
        self, name: str, method: str, config: Settings, cache: Cache, task: Task, progress: Progress,
        known: Mapping[str, Method] = METHODS,
    ) -> None:  # fmt: skip
        self.name, self.method, self.config = f"{name} {method}", known[method], config
        self.cache, self.task, self.progress = cache, task, progress
        self.base = {"task": name, "method": method, "eps": EPS, "batch_size": config["batch_size"]}
        self.grid: list[Settings] = []

    def _start(self, settings: Settings, lr: float, seed: int) -> tuple[Any, Iterator[Any]]:
        """From the starting weights: an optimizer, and batches."""
        self.task.reset()
        optimizer = self.method.build(self.task.model, lr=lr, eps=EPS, seed=seed, **settings)
        return optimizer, self.task.batches(self.config["batch_size"], seed)

    def _step(self, optimizer: Any, batch: Any) -> None:
        def closure() -> Any:
            if self.method.build is not adam:
                return self.method.sign * self.task.loss(batch)
            optimizer.zero_grad()
            loss = self.task.loss(batch)
            loss.backward()
            return loss

        optimizer.step(closure)

    def _travel(self, settings: Settings) -> float:
        """Rms change of a weight per forward and per unit of lr, near the starting weights.

        Net change over `dry` forwards, so that momentum and several forwards a step count as what they are. lr is set so
        low that the weights hardly move: then the change is proportional to lr.
        """

        def distance(lr: float, steps: int) -> float:
            optimizer, batches = self._start(settings, lr, 1 << 20)
            for _ in range(steps):
                self._step(optimizer, next(batches))
            return self.task.moved()

        steps = max(self.config["dry"] // self.method.forwards, 1)
        lr = 1e-6
        lr *= 1e-5 / math.sqrt(steps) / distance(lr, 1)  # far above float32's resolution, far below what the loss sees
        return distance(lr, steps) / (lr * steps * self.method.forwards)

    def _train(self, settings: Settings, title: str, lr: float, seed: int) -> Settings:
        """One run: its curve on part of the reported texts, and where it ends."""
        bar = self.progress.add_task(title, total=self.config["budget"])
        optimizer, batches = self._start(settings, lr, seed)
        evaluate, forwards, points = self.task.evaluate, self.method.forwards, self.config["points"]
        steps = max(self.config["budget"] // forwards, 1)
        share = factor(SCHEDULE, 0, steps)
        looks = {round(i * steps / points) for i in range(1, points + 1)}
        curve = [{"forwards": 0, "seconds": 0.0, **evaluate("curve")}]
        seconds = wall = 0.0
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * share(step)
            batch = next(batches)
            start, wall_start = clock(), time.perf_counter()
            self._step(optimizer, batch)
            seconds, wall = seconds + clock() - start, wall + time.perf_counter() - wall_start
            self.progress.advance(bar, forwards)
            if step + 1 in looks:
                curve.append({"forwards": (step + 1) * forwards, "seconds": seconds, **evaluate("curve")})
                if not math.isfinite(curve[-1]["loss"]):
                    break  # it has diverged, and stays so
        self.progress.remove_task(bar)
        run = {"steps": steps, "seconds": seconds, "wall_seconds": wall, "curve": curve,
               "validation": evaluate("validation"), "report": evaluate("report")}  # fmt: skip
        end = ", ".join(f"{key} {value:.4f}" for key, value in run["validation"].items())
        told = f"{title}: validation {end}, {run['seconds']:.1f} s"
        self.progress.console.print(told, highlight=False, soft_wrap=True)
        return run

    def _run(self, settings: Settings, size: float, seed: int) -> Settings:
        base = {**self.base, "settings": settings}
        per_lr = self.cache.get({**base, "dry": self.config["dry"]}, lambda: self._travel(settings))
        lr = float(f"{size / per_lr:.3g}")
        key = {**base, "size": f"{size:.4g}", "lr": lr, "seed": seed, "budget": self.config["budget"],
               "schedule": SCHEDULE}  # fmt: skip
        shown = " ".join(f"{name}={value}" for name, value in settings.items())
        title = f"{self.name} {shown} size {size:.3g} lr {lr:.3g} seed {seed}"
        return {**self.cache.get(key, lambda: self._train(settings, title, lr, seed)), "lr": lr}

    def _try(self, settings: Settings, size: float) -> float:
        run = self._run(settings, size, SEEDS[0])
        loss = run["validation"]["loss"]
        finite = math.isfinite(loss)
        self.grid.append({"settings": settings, "size": size, "lr": run["lr"],
                          "validation_loss": round(loss, 5) if finite else None})  # fmt: skip
        return loss if finite else math.inf

    def result(self) -> Settings:
        """The record of this method."""
        settings, sizes = dict(self.method.settings), self.config["sizes"]
        if self.method.build is zokern.HELENE:
            settings["batch_size"] = self.config["batch_size"]
        found, ratio = {size: self._try(settings, size) for size in sizes}, sizes[1] / sizes[0]
        for _ in range(MAX_EXTENSIONS):
            best = min(found, key=found.get)
            if min(found) < best < max(found):
                break
            size = best / ratio if best == min(found) else best * ratio
            found[size] = self._try(settings, size)
        best = min(found, key=found.get)
        lowest, size, chosen = found[best], best, settings
        for trial in self.method.trials:
            for near in [s for s in sorted(found) if s <= best][-2:]:
                loss = self._try({**settings, **trial}, near)
                if loss < lowest:
                    lowest, size, chosen = loss, near, {**settings, **trial}
        return self._summary(chosen, size, [self._run(chosen, size, seed) for seed in SEEDS])

    def _summary(self, settings: Settings, size: float, runs: list[Settings]) -> Settings:
        keys = list(runs[0]["report"])
        curves = list(zip(*(run["curve"] for run in runs), strict=False))
        curve = {"forwards": [points[0]["forwards"] for points in curves],
                 "seconds": [round(mean(p["seconds"] for p in points), 3) for points in curves]}  # fmt: skip
        for key in keys:
            curve[key] = [_spread([p[key] for p in points]) for points in curves]
        return {
            "label": self.method.label, "settings": settings, "lr": runs[0]["lr"], "size": size,
            "forwards_per_step": self.method.forwards, "steps": runs[0]["steps"],
            "seconds": round(mean(run["seconds"] for run in runs), 2),
            "wall_seconds": round(mean(run["wall_seconds"] for run in runs), 2),
            "final": {key: _spread([run["report"][key] for run in runs]) for key in keys},
            "grid": self.grid, "curve": curve,
        }  # fmt: skip


def _spread(values: list[float]) -> Settings:
    return {"mean": round(mean(values), 5), "std": round(stdev(values), 5), "each": [round(v, 5) for v in values]}


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
    settings = {"eps": EPS, "schedule": SCHEDULE, "seeds": list(SEEDS), "backpropagation_counts_as": BACKPROPAGATION}
    path = store("convergence", torch.device("cpu"), settings, results, args.output)
    print(f"stored in {path}; now python -m benchmarks.pages docs/convergence.md")


if __name__ == "__main__":
    main()
