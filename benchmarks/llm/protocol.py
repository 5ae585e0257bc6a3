"""The protocol of MeZO and its followers on a language model of 135 million parameters, at the scale of two CPU cores.

    python -m benchmarks.llm.protocol --model FOLDER --threads 2                   # all of it: some six hours
    python -m benchmarks.llm.protocol --model FOLDER --methods mezo es --seconds 3600    # a part, an hour of it
    python -m benchmarks.pages docs/llm.md                                         # its tables and pictures anew

1,000 sentences of film reviews to learn from, 500 that choose lr, 1,000 that are told of; the words " great" and
" terrible" after "... It was"; batches of 16; lr constant. Every method may spend the same number of forwards; a forward
and a backward count as 3.

First all methods search: each lr of the grid with seed 3 for --trial forwards, and the one with the lowest loss on the
validation set is taken. Where that lies at an edge of the grid, one more is tried there, twice at most. Then all methods
run for --budget forwards with seed 0, then all with seed 1, then with seed 2: whenever it ends, what is there can be
compared. Beside them: the model as it is (zero-shot), and with 16 examples in its prompt.

Each run is stored as it ends, and the same command goes on where it was. With --seconds it ends in time: no run is begun
that would not fit by its estimate, and one that does not fit after all is dropped and done again by the next call.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import study
from benchmarks.convergence.run import SEEDS
from benchmarks.llm import context, packed, reviews
from benchmarks.llm.methods import METHODS, Method, step
from benchmarks.llm.packed import Reviews
from benchmarks.llm.task import LONGEST
from zokern.bench.record import RESULTS, machine, store

Settings = dict[str, Any]
BATCH = 16
SEARCH_SEED = 3
LOOKS = 2  # at the test set, in a run
MAX_GROWN = 2  # lr beyond the edges of a grid
CONTEXT = "in-context"


class OutOfTime(Exception):
    """--seconds are over, or would be."""


class Job(NamedTuple):
    """One piece of work. lr: None for the examples in a prompt. forwards: its own, without evaluations."""

    name: str
    lr: float | None
    seed: int
    forwards: int


def half_decade(lr: float, up: bool) -> float:
    """The next one of ..., 1e-5, 3e-5, 1e-4, ..."""
    digit, exponent = f"{lr:.0e}".split("e")
    if up:
        return float(f"3e{exponent}") if digit == "1" else float(f"1e{int(exponent) + 1}")
    return float(f"1e{exponent}") if digit == "3" else float(f"3e{int(exponent) - 1}")


def best(grid: list[Settings]) -> float:
    """The lr with the lowest validation loss; the lowest lr where all have diverged."""
    return float(min((math.inf if point["loss"] is None else point["loss"], point["lr"]) for point in grid)[1])


def next_lr(method: Method, grid: list[Settings]) -> float | None:
    """What a search tries next; None: it is done."""
    tried = [point["lr"] for point in grid]
    for lr in method.grid:
        if lr not in tried:
            return lr
    found = best(grid)
    if len(tried) - len(method.grid) >= MAX_GROWN or min(tried) < found < max(tried):
        return None
    return half_decade(found, up=found == max(tried))


class Bench:
    """All runs. results: as they are stored, anew after each. subject(adapter): the task with a model that has it.

    now: seconds, of any clock. say: takes a line.
    """

    def __init__(
        self, subject: Callable[[str], Reviews], keep: Callable[[Settings], None], options: Any, results: Settings,
        now: Callable[[], float] = time.perf_counter, say: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        self._make, self.keep, self.options, self.results, self.now, self.say = (
            subject,
            keep,
            options,
            results,
            now,
            say,
        )
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
        if {key: record[key] for key in facts} != facts:
            raise SystemExit(
                f"the results have runs of {name} with other settings, { ({key: record[key] for key in facts}) }; remove "
                "them from the file, or give another --output"
            )
        return record

    def jobs(self) -> Iterator[Job]:
        """What is left, in its order. It looks at the results anew after each."""
        for name in self.options.methods:
            while (lr := next_lr(METHODS[name], self._record(name)["grid"])) is not None:
                yield Job(name, lr, SEARCH_SEED, self.options.trial)
        for seed in SEEDS:
            if seed not in [run["seed"] for run in self.results[CONTEXT]["runs"]]:
                yield Job(CONTEXT, None, seed, 0)
            for name in self.options.methods:
                record = self._record(name)
                if seed not in [run["seed"] for run in record["runs"]]:
                    record["lr"] = best(record["grid"])
                    yield Job(name, record["lr"], seed, self.options.budget)

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
        done = [run["seed"] for run in self.results[CONTEXT]["runs"]]
        return searches + runs + [Job(CONTEXT, None, seed, 0) for seed in SEEDS if seed not in done]

    # ------------------------------------------------------------------------------------------------------------- time

    def left(self) -> float:
        """Seconds."""
        return (self.options.seconds or math.inf) - (self.now() - self.begun)

    def estimate(self, job: Job) -> float:
        """Seconds that a job takes: by the method's last run, else by a plain forward of a batch."""
        inference = self.results["inference"]["seconds"]
        evaluation = inference * (context.EXAMPLES if job.name == CONTEXT else 1)
        if job.name == CONTEXT:
            return evaluation * reviews.SIZES["test"] / BATCH
        record = self._record(job.name)
        known = [*record["grid"], *record["runs"]]
        forward = known[-1]["seconds"] / known[-1]["forwards"] if known else 1.3 * inference
        texts = reviews.SIZES["validation"] if job.seed == SEARCH_SEED else LOOKS * reviews.SIZES["test"]
        return float(forward * job.forwards + evaluation * texts / BATCH)

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
        found = context.evaluate(task, "test", job.seed)
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
            record["runs"].append({"lr": job.lr, **run})
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
            step(method, optimizer, lambda batch=batch: task.loss(batch))
            seconds += self.now() - start
            if done in looks:
                if hasattr(optimizer, "fold"):
                    optimizer.fold()  # updates that wait
                curve.append({"forwards": done * method.forwards, **_finite(task.evaluate(part))})
            if self.left() < 0 and done < steps:
                self.say("    the time is over: this run is dropped, and done again by the next call")
                raise OutOfTime
        return {"seed": seed, "steps": steps, "forwards": steps * method.forwards, "seconds": seconds, "curve": curve}


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


# ------------------------------------------------------------------------------------------------------------------ main


def former(path: Path, settings: Mapping[str, Any], here: Mapping[str, Any]) -> Settings:
    """The results so far, where they have the same settings and machine; whole ones too, for --methods may be more."""
    if not path.is_file():
        return {}
    stored: Settings = json.loads(path.read_text())
    for what, now, then in (("settings", settings, stored["settings"]), ("machine", here, stored["machine"])):
        if then != now:
            apart = {key: (then.get(key), now.get(key)) for key in {**then, **now} if then.get(key) != now.get(key)}
            raise SystemExit(f"{path} is of another {what}, {{name: (there, here)}}: {apart}; give another --output")
    results: Settings = stored["results"]
    return results


def settings_of(options: Any) -> Settings:
    return {
        "dtype": "float32", "batch_size": BATCH, "tokens": LONGEST, "budget": options.budget, "trial": options.trial,
        "seeds": list(SEEDS), "search_seed": SEARCH_SEED, "template": reviews.TEMPLATE, "words": list(reviews.WORDS),
        "sizes": reviews.SIZES,
    }  # fmt: skip


def parse() -> Any:
    parser = study.parser(
        __doc__,
        model=(str, "a folder that save_pretrained wrote, or a .gguf file"),
        texts=("~/.cache/zokern/movieReviewSnippets_GroundTruth.txt", "where the sentences are kept"),
        methods=(list(METHODS), f"of {', '.join(METHODS)} (default: all)"),
        budget=(500, "forwards of a run"), trial=(200, "forwards of a run that chooses lr"),
        seconds=(0, "end after so many; 0: when all is done"), threads=(2, "of torch"),
    )  # fmt: skip
    options = parser.parse_args()
    if unknown := [name for name in options.methods if name not in METHODS]:
        parser.error(f"unknown methods {', '.join(unknown)}; there are {', '.join(METHODS)}")
    if options.model is None:
        parser.error("--model is missing: a folder that save_pretrained wrote, or a .gguf file")
    least = max(method.forwards for method in METHODS.values())
    if min(options.budget, options.trial) < least or options.threads < 1 or options.seconds < 0:
        parser.error(f"--budget and --trial are at least {least}, --threads at least 1, --seconds not negative")
    return options


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    device, settings = torch.device("cpu"), settings_of(options)
    path = options.output or RESULTS / "llm-cpu.json"
    results = former(path, settings, machine(device))
    sets = packed.read(Path(options.texts).expanduser())

    def keep(found: Settings, complete: bool = False) -> None:
        store("llm", device, settings, found, path, complete=complete)

    bench = Bench(
        lambda adapter: packed.load(options.model, sets, adapter), keep, options, results,
        say=lambda line: print(f"{time.strftime('%H:%M:%S')} {line}", flush=True),
    )  # fmt: skip
    try:
        with torch.no_grad():
            bench.all()
    except OutOfTime:
        print(f"the same command goes on with {path}")
        return 0
    keep(results, not set(METHODS) - set(results["methods"]))
    print(f"stored {path}; now python -m benchmarks.pages docs/llm.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
