"""How the study chooses lr and settings of a method, runs all seeds, and keeps what is finished."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.progress import Progress

import zokern
from benchmarks.convergence.methods import METHODS, Method, Settings, adam
from benchmarks.convergence.tasks import Task
from zokern.finetune.loop import factor
from zokern.optim.base import ZerothOrderOptimizer

EPS = 1e-3
SCHEDULE = "linear"
SEEDS = (0, 1, 2, 3, 4)
CHOOSING = SEEDS[:2]  # of the runs by which lr and settings are chosen
MAX_EXTENSIONS = 4  # of a grid, beyond its edges


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


def seeing_updates(optimizer: Any) -> contextlib.AbstractContextManager[Any]:
    """Where an optimizer of ours has updates that wait, the weights have them in here."""
    return optimizer.folded() if isinstance(optimizer, ZerothOrderOptimizer) else contextlib.nullcontext()


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
            with seeing_updates(optimizer):
                return self.task.moved()

        steps = max(self.config["dry"] // self.method.forwards, 1)
        lr = 1e-6
        lr *= 1e-5 / math.sqrt(steps) / distance(lr, 1)  # far above float32's resolution, far below what the loss sees
        return distance(lr, steps) / (lr * steps * self.method.forwards)

    def _train(self, settings: Settings, title: str, lr: float, seed: int) -> Settings:
        """One run: its curve on part of the reported texts, and where it ends."""
        bar = self.progress.add_task(title, total=self.config["budget"])
        optimizer, batches = self._start(settings, lr, seed)
        forwards, points = self.method.forwards, self.config["points"]

        def evaluate(part: str) -> dict[str, float]:
            with seeing_updates(optimizer):
                return self.task.evaluate(part)

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
        runs = [self._run(settings, size, seed) for seed in CHOOSING]
        loss = mean(run["validation"]["loss"] for run in runs)
        finite = math.isfinite(loss)
        self.grid.append({"settings": settings, "size": size, "lr": runs[0]["lr"],
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
    std = stdev(values) if all(map(math.isfinite, values)) else math.nan  # a seed that diverged leaves no spread
    return {"mean": round(mean(values), 5), "std": round(std, 5), "each": [round(v, 5) for v in values]}
