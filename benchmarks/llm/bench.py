"""All runs of protocol.py: which comes next, how long it may take, and what is kept of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from benchmarks.llm import context, reviews
from benchmarks.llm.methods import METHODS, SEEDS, Method, states, step
from benchmarks.llm.packed import Reviews
from benchmarks.llm.search import best, lower, next_lr, wants_lower

Settings = dict[str, Any]
BATCH = 16
SEARCH_SEED = 3
LOOKS = 2  # at the test set, in a run
CONTEXT = "in-context"
CONTEXT_TIME = 4  # forwards that a batch behind examples takes, for an estimate


class OutOfTime(Exception):
    """--seconds are over, or would be."""


class Job(NamedTuple):
    """One piece of work. lr: None for the examples in a prompt. forwards: its own, without evaluations."""

    name: str
    lr: float | None
    seed: int
    forwards: int


class Bench:
    """All runs. results: as they are stored, anew after each. subject(adapter): the task with a model that has it.

    about: this process, as its processor and commit; kept with each run. now: seconds, of any clock. say: takes a line.
    """

    def __init__(
        self, subject: Callable[[str], Reviews], keep: Callable[[Settings], None], options: Any, results: Settings,
        about: Mapping[str, str], now: Callable[[], float] = time.perf_counter, say: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        self._make, self.keep, self.options, self.results = subject, keep, options, results
        self.about, self.now, self.say = dict(about), now, say
        self._made: tuple[str, Reviews] | None = None
        self.begun = now()
        results.setdefault("methods", {})
        results.setdefault(CONTEXT, {"examples": context.EXAMPLES, "runs": []})
        for name in options.methods:
            self._record(name)

    # -------------------------------------------------------------------------------------------------------- what to do

    def _record(self, name: str) -> Settings:
        method = METHODS[name]
        facts = {"label": method.label, "forwards_per_step": method.forwards, "eps": method.eps,
                 "adapter": method.adapter, "settings": method.settings}  # fmt: skip
        record: Settings = self.results["methods"].setdefault(name, {**facts, "grid": [], "runs": []})
        record.setdefault("lower", [])
        if {key: record[key] for key in facts} != facts:
            raise SystemExit(
                f"the results have runs of {name} with other settings, { ({key: record[key] for key in facts}) }; remove "
                "them from the file, or give another --output"
            )
        return record

    def jobs(self) -> Iterator[Job]:
        """What is left, in its order. It looks at the results anew after each."""
        for name in self.options.methods:
            while (lr := next_lr(METHODS[name].grid, self._record(name)["grid"])) is not None:
                yield Job(name, lr, SEARCH_SEED, self.options.trial)
        for seed in SEEDS:
            if seed not in [run["seed"] for run in self.results[CONTEXT]["runs"]]:
                yield Job(CONTEXT, None, seed, 0)
            for name in self.options.methods:
                record = self._record(name)
                if seed not in [run["seed"] for run in record["runs"]]:
                    # The one of its other seeds, whatever has been tried since.
                    record["lr"] = record["runs"][0]["lr"] if record["runs"] else best(record["grid"])
                    yield Job(name, record["lr"], seed, self.options.budget)
        for name in filter(self._again, self.options.methods):
            record = self._record(name)
            yield Job(name, lower(record["grid"], record["lr"]), SEEDS[0], self.options.budget)

    def _again(self, name: str) -> bool:
        return wants_lower(self._record(name), len(SEEDS))

    def remaining(self) -> list[Job]:
        """What is left as far as it is known; a grid may still grow."""
        searches = [
            Job(name, lr, SEARCH_SEED, self.options.trial)
            for name in self.options.methods
            for lr in METHODS[name].grid
            if lr not in [point["lr"] for point in self._record(name)["grid"]]
        ]
        runs = [
            Job(name, None, seed, self.options.budget)
            for seed in SEEDS
            for name in self.options.methods
            if seed not in [run["seed"] for run in self._record(name)["runs"]]
        ]
        runs += [Job(name, None, SEEDS[0], self.options.budget) for name in filter(self._again, self.options.methods)]
        done = [run["seed"] for run in self.results[CONTEXT]["runs"]]
        return searches + runs + [Job(CONTEXT, None, seed, 0) for seed in SEEDS if seed not in done]

    def complete(self) -> bool:
        """Whether nothing is left of any method, also of those that were not asked for."""
        found = self.results["methods"]
        return len(self.results[CONTEXT]["runs"]) == len(SEEDS) and all(
            name in found and len(found[name]["runs"]) == len(SEEDS) and not self._again(name) for name in METHODS
        )

    # ------------------------------------------------------------------------------------------------------------- time

    def left(self) -> float:
        """Seconds."""
        return (self.options.seconds or math.inf) - (self.now() - self.begun)

    def estimate(self, job: Job) -> float:
        """Seconds that a job takes: by the method's last run, else by a plain forward of a batch."""
        inference = self.results["inference"]["seconds"]
        if job.name == CONTEXT:
            return float(CONTEXT_TIME * inference * reviews.SIZES["test"] / BATCH)
        record = self._record(job.name)
        known = [*record["grid"], *record["runs"], *record["lower"]]
        forward = known[-1]["seconds"] / known[-1]["forwards"] if known else 1.3 * inference
        texts = reviews.SIZES["validation"] if job.seed == SEARCH_SEED else LOOKS * reviews.SIZES["test"]
        return float(forward * job.forwards + inference * texts / BATCH)

    # ----------------------------------------------------------------------------------------------------------- doing it

    def all(self) -> None:
        """Raises OutOfTime where something is left."""
        if "start" not in self.results:
            self._begin()
        for job in self.jobs():
            self._check_time(job)
            rest = self.remaining()
            hours = sum(map(self.estimate, rest)) / 3600
            self.say(f"{len(rest)} runs left, some {hours:.1f} h; now {self._named(job)}")
            start = self.now()
            told = self._context(job) if job.name == CONTEXT else self._tune(job)
            self.keep(self.results)
            self.say(f"    {told}; {self.now() - start:.0f} s")

    def _check_time(self, job: Job) -> None:
        needs = self.estimate(job)
        if needs > self.left():
            self.say(f"not begun: {self._named(job)} takes some {needs:.0f} s, and {self.left():.0f} s are left")
            raise OutOfTime

    def _named(self, job: Job) -> str:
        if job.name == CONTEXT:
            return f"{context.EXAMPLES} examples in the prompt, seed {job.seed}"
        what = "search" if job.seed == SEARCH_SEED else f"seed {job.seed}"
        return f"{METHODS[job.name].label}, lr {job.lr:g}, {what}, {job.forwards} forwards"

    def subject(self, adapter: str) -> Reviews:
        """One model at a time is in memory."""
        if self._made is None or self._made[0] != adapter:
            self._made = None
            self._made = (adapter, self._make(adapter))
        return self._made[1]

    def _begin(self) -> None:
        """What the model says as it is, and how long a forward of a batch takes."""
        task = self.subject("")
        task.reset()
        self.results["start"] = {part: task.evaluate(part) for part in ("validation", "test")}
        self.results["inference"] = {"seconds": forward_seconds(task, self.now)}
        self.keep(self.results)
        found = self.results["start"]["test"]
        self.say(f"zero-shot: accuracy {found['accuracy']:.3f}, loss {found['loss']:.3f}")

    def _context(self, job: Job) -> str:
        task = self.subject("")
        task.reset()
        found = {**context.evaluate(task, "test", job.seed), **self.about}
        self.results[CONTEXT]["runs"].append(found)
        return (
            f"accuracy {found['accuracy']:.3f}, loss {found['loss']:.3f}, {found['tokens']} tokens before each sentence"
        )

    def _tune(self, job: Job) -> str:
        method, record = METHODS[job.name], self._record(job.name)
        task = self.subject(method.adapter)
        record["packed"] = task.why is None
        assert job.lr is not None
        search = job.seed == SEARCH_SEED
        run = self.train(task, method, job.lr, job.seed, job.forwards, "validation" if search else "test")
        end = run["curve"][-1]
        if search:
            del run["curve"], run["seed"]
            record["grid"].append({"lr": job.lr, "loss": end["loss"], "accuracy": end["accuracy"], **run})
        else:
            record["runs" if job.lr == record["lr"] else "lower"].append({"lr": job.lr, **run})
        loss = "none" if end["loss"] is None else f"{end['loss']:.3f}"
        return f"accuracy {end['accuracy']:.3f}, loss {loss}, {run['seconds'] / run['steps']:.2f} s a step"

    def train(self, task: Reviews, method: Method, lr: float, seed: int, forwards: int, part: str) -> Settings:
        """From the starting weights. The curve has LOOKS looks at the test set, or the end at the validation set.

        Raises OutOfTime in the middle of it, with nothing kept.
        """
        task.reset()
        steps = max(forwards // method.forwards, 1)
        optimizer, batches = method.optimizer(task.model, lr, seed), task.batches(BATCH, seed)
        looks = {round(i * steps / LOOKS) for i in range(1, LOOKS + 1)} if part == "test" else {steps}
        curve, seconds = [], 0.0
        for done in range(1, steps + 1):
            batch, start = next(batches), self.now()
            step(method, optimizer, partial(task.loss, batch))
            seconds += self.now() - start
            if done in looks:
                if hasattr(optimizer, "fold"):
                    optimizer.fold()  # updates that wait
                curve.append({"forwards": done * method.forwards, **_finite(task.evaluate(part))})
            if self.left() < 0 and done < steps:
                self.say("    the time is over: this run is dropped, and done again by the next call")
                raise OutOfTime
        return {"seed": seed, "steps": steps, "forwards": steps * method.forwards, "seconds": seconds,
                **self.about, "states": states(optimizer), "curve": curve}  # fmt: skip


def _finite(found: dict[str, float]) -> dict[str, float | None]:
    """A loss that is none, after a run that has diverged, as None: JSON has no NaN."""
    return {key: value if math.isfinite(value) else None for key, value in found.items()}


def forward_seconds(task: Reviews, now: Callable[[], float], count: int = 5) -> float:
    """A forward of a training batch."""
    batch = task.take("train", list(range(BATCH)))
    task.loss(batch).item()
    start = now()
    for _ in range(count):
        task.loss(batch).item()
    return (now() - start) / count
