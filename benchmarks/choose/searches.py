"""The rules for lr of docs/choose.md, and every stored search of the methods that have one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from benchmarks.convergence.page import stored as convergence
from benchmarks.convergence.search import EPS
from benchmarks.llm import page as gpu
from benchmarks.llm import stored_cpu
from benchmarks.llm.demo import FILE as DEMO
from benchmarks.llm.methods import METHODS
from benchmarks.llm.search import next_lr
from benchmarks.parts import Record, load
from benchmarks.rewards.run import FORWARDS
from benchmarks.rewards.run import METHODS as CLIMBERS
from zokern.optim import rate

SAMPLES, REWARDS = "samples-cpu.json", "rewards-cpu.json"
LONG = 2000  # forwards, above which a search counts as one of long runs
TWICE = 4  # directions of one-sided MeZO that convergence.md has searched, too


class Rule(NamedTuple):
    """lr of a method, in words and from trained parameters P, directions n of a step, and eps. steps: which it is for."""

    label: str
    steps: str
    text: str
    lr: Callable[[int, int, float], float]


MEZO = Rule("MeZO, two-sided", "n directions", "0.04 n / P^0.4", lambda p, n, eps: rate.mezo(p, n))
RULES = {
    "mezo": MEZO,
    "mezo-onesided": MEZO._replace(label="MeZO, one-sided"),
    "fzoo": Rule("FZOO", "8 directions", "eps / 200", lambda p, n, eps: eps / 200),
    "es": Rule("ES", "8 directions both ways", "eps / 150", lambda p, n, eps: eps / 150),
}


class Found(NamedTuple):
    """A search: what each lr came to, the lower the better.

    n: directions of a step; both ways count once. forwards: of a run. how: what lr did in it. start: loss before it, None
    where that is not stored.
    """

    method: str
    parameters: int
    n: int
    eps: float
    forwards: int
    how: str
    start: float | None
    tried: dict[float, float]

    @property
    def rule(self) -> float:
        return RULES[self.method].lr(self.parameters, self.n, self.eps)

    @property
    def lr(self) -> float:
        """The best that was tried."""
        return min(self.tried, key=lambda lr: (self.tried[lr], lr))

    @property
    def below(self) -> float | None:
        return max((lr for lr in self.tried if lr < self.lr), default=None)

    @property
    def above(self) -> float | None:
        return min((lr for lr in self.tried if lr > self.lr), default=None)


def found() -> list[Found]:
    """All searches of methods that have a rule, each method's shortest runs first, of the smallest model."""
    every = (*_small(), *_samples(), *_large(), *_rewards(), *_gpu())
    return sorted(every, key=lambda one: (list(RULES).index(one.method), one.forwards > LONG, one.parameters, one.n))


def directions(method: str, settings: Record) -> int:
    default = METHODS["fzoo"].settings["candidates"] if method == "fzoo" else 1  # FZOO's own default
    names = ("num_samples", "candidates", "num_directions")
    return int(next((settings[name] for name in names if name in settings), default))


def _tried(grid: Iterable[Record], loss: str = "loss") -> dict[float, float]:
    """Without a loss: it has diverged."""
    return {point["lr"]: math.inf if point[loss] is None else point[loss] for point in grid}


def _falling(method: str, task: Record, chosen: Record, settings: Record) -> Found:
    n = directions(method, chosen["settings"])
    tried = _tried(chosen["grid"], "validation_loss")
    start = task["start"]["validation"]["loss"]
    return Found(method, task["task"]["parameters"], n, EPS, settings["budget"], "falling", start, tried)


def _small() -> Iterator[Found]:
    """Of docs/convergence.md."""
    for task in convergence()["results"].values():
        for method in RULES:
            yield _falling(method, task, task["methods"][method], task)


def _samples() -> Iterator[Found]:
    """Of run.py."""
    record = load(SAMPLES)
    for chosen in record["results"]["methods"].values():
        if directions("mezo-onesided", chosen["settings"]) != TWICE:
            yield _falling("mezo-onesided", record["results"], chosen, record["settings"])


def _parameters() -> int:
    """Of SmolLM2-135M."""
    count: int = load(DEMO)["results"][0]["summary"]["parameters"]
    return count


def _constant(method: str, record: Record, forwards: int, how: str, start: Any) -> Found:
    n, eps = directions(method, record["settings"]), record.get("eps", EPS)
    return Found(method, _parameters(), n, eps, forwards, how, start, _tried(record["grid"]))


def _large() -> Iterator[Found]:
    """Of docs/llm.md on a CPU; searches that are done."""
    for method, record in stored_cpu.results().get("methods", {}).items():
        if method in RULES and record["grid"] and next_lr(METHODS[method].grid, record["grid"]) is None:
            start = stored_cpu.results()["start"]["validation"]["loss"]
            yield _constant(method, record, stored_cpu.stored(stored_cpu.RUNS)["settings"]["trial"], "constant", start)


def _gpu() -> Iterator[Found]:
    """Of docs/llm.md on a GPU, in bfloat16."""
    settings, results = gpu.stored()["settings"], gpu.stored()["results"]
    for method in RULES:
        if results.get(method, {}).get("grid"):
            start = results["start"]["validation"]["loss"]
            yield _constant(method, results[method], settings["trial"], "constant, bfloat16", start)


def _rewards() -> Iterator[Found]:
    """Of docs/trl.md: minus the reward, whose start on those prompts is not stored."""
    record = load(REWARDS)
    eps, forwards = record["settings"]["eps"], record["settings"]["trial"] * FORWARDS
    for method, chosen in record["results"]["methods"].items():
        about = {"settings": CLIMBERS[method], "eps": eps, "grid": chosen["grid"]}
        yield _constant(method, about, forwards, "constant, rewards along rank 1", None)
