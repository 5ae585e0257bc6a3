"""The tables of docs/choose.md, from the stored runs of other studies and of run.py beside this file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from statistics import mean
from typing import Any, NamedTuple

from benchmarks.convergence.page import stored as convergence
from benchmarks.convergence.run import EPS
from benchmarks.llm import page as gpu
from benchmarks.llm import page_cpu
from benchmarks.llm.demo import FILE as DEMO
from benchmarks.llm.methods import METHODS
from benchmarks.llm.search import best, next_lr
from benchmarks.parts import Record, load, made_on, signed, table
from benchmarks.rewards.run import METHODS as CLIMBERS

SAMPLES, REWARDS = "samples-cpu.json", "rewards-cpu.json"
TWICE = 4  # directions of one-sided MeZO that convergence.md has searched, too
FZOO_CANDIDATES = 8  # its default, which that study takes


class Rule(NamedTuple):
    """lr of a method, in words and from trained parameters P, directions n of a step, and eps."""

    label: str
    text: str
    lr: Callable[[int, int, float], float]


RULES = {
    "mezo": Rule("MeZO, two-sided, one direction", "0.05 / P^0.4", lambda p, n, eps: 0.05 / p**0.4),
    "mezo-onesided": Rule(
        "MeZO, one-sided, n directions", "0.05 n^0.9 / P^0.4", lambda p, n, eps: 0.05 * n**0.9 / p**0.4
    ),
    "fzoo": Rule("FZOO", "eps / 100", lambda p, n, eps: eps / 100),
    "es": Rule("ES", "eps / 100", lambda p, n, eps: eps / 100),
}


class Found(NamedTuple):
    """The best lr that a search tried, and between which others it lies."""

    method: str
    where: str
    parameters: int
    n: int
    eps: float
    lr: float
    below: float
    above: float

    @property
    def rule(self) -> float:
        return RULES[self.method].lr(self.parameters, self.n, self.eps)


def found() -> list[Found]:
    """All searches of methods that have a rule, each method's smallest model first."""
    every = (*_small(), *_samples(), *_large(), *_rewards())
    return sorted(every, key=lambda one: (list(RULES).index(one.method), one.parameters, one.n))


def _found(method: str, where: str, parameters: int, n: int, eps: float, lr: float, tried: Iterable[float]) -> Found:
    """tried: all lr, of which `lr` is the best; 0 and inf where none lies beyond it."""
    every = [0.0, *tried, math.inf]
    below, above = max(one for one in every if one < lr), min(one for one in every if one > lr)
    return Found(method, where, parameters, n, eps, lr, below, above)


def directions(method: str, settings: Record) -> int:
    """Of a step; both ways count once."""
    default = FZOO_CANDIDATES if method == "fzoo" else 1
    names = ("num_samples", "candidates", "num_directions")
    return int(next((settings[name] for name in names if name in settings), default))


def _small() -> Iterator[Found]:
    """Of docs/convergence.md, lr falling to 0."""
    for name, task in convergence()["results"].items():
        for method in RULES:
            chosen = task["methods"][method]
            tried = [point["lr"] for point in chosen["grid"]]
            n = directions(method, chosen["settings"])
            yield _found(method, f"`{name}`, falling", task["task"]["parameters"], n, EPS, chosen["lr"], tried)


def _samples() -> Iterator[Found]:
    """Of run.py, lr falling to 0."""
    study = load(SAMPLES)["results"]
    for chosen in study["methods"].values():
        tried, n = [point["lr"] for point in chosen["grid"]], directions("mezo-onesided", chosen["settings"])
        if n != TWICE:
            parameters = study["task"]["parameters"]
            yield _found("mezo-onesided", "`lm`, falling", parameters, n, EPS, chosen["lr"], tried)


def _parameters() -> int:
    """Of SmolLM2-135M."""
    count: int = load(DEMO)["results"][0]["summary"]["parameters"]
    return count


def _large() -> Iterator[Found]:
    """Of docs/llm.md, lr constant; searches that are done."""
    for method, record in page_cpu.results().get("methods", {}).items():
        if method in RULES and record["grid"] and next_lr(METHODS[method].grid, record["grid"]) is None:
            tried, n = [point["lr"] for point in record["grid"]], directions(method, record["settings"])
            yield _found(method, "sentences, constant", _parameters(), n, record["eps"], best(record["grid"]), tried)


def _rewards() -> Iterator[Found]:
    """Of docs/trl.md, lr constant."""
    record = load(REWARDS)
    for method, chosen in record["results"]["methods"].items():
        tried, n = [point["lr"] for point in chosen["grid"]], directions(method, CLIMBERS[method])
        eps = record["settings"]["eps"]
        yield _found(method, "rewards, constant", _parameters(), n, eps, chosen["lr"], tried)


# ---------------------------------------------------------------------------------------------------------- the tables


def millions(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count < 1e7 else f"{count / 1e6:.0f}M"


def rules() -> str:
    """Each search beside its rule."""
    rows = [
        [RULES[one.method].label.rpartition(",")[0] or RULES[one.method].label, str(one.n), millions(one.parameters),
         one.where, f"{one.eps:g}", f"{one.lr:.2g}",
         " to ".join("?" if edge in (0.0, math.inf) else f"{edge:.2g}" for edge in (one.below, one.above)),
         f"{one.rule:.2g}", f"{one.rule / one.lr:.2f}"]
        for one in found()
    ]  # fmt: skip
    head = ["method", "n", "model", "task, lr", "eps", "best lr tried", "between", "the rule's", "rule over best"]
    return table(head, rows)


def rule() -> str:
    """The rules themselves, and how far they are off."""
    lines = [f"- {one.label}: lr = {one.text}" for one in RULES.values()]
    off = [max(one.rule / one.lr, one.lr / one.rule) for one in found()]
    told = f"In all {len(off)} searches the rule is within a factor {max(off):.1f} of the best lr that was tried."
    return "\n".join([*lines, "", told])


def methods() -> str:
    """What each method reached with the same forwards, on each of the three models."""
    tasks = convergence()["results"]
    small, demo = tasks["lm"]["methods"], tasks["demo"]["methods"]
    large = {name: part for name, part in page_cpu.results().get("methods", {}).items() if part["runs"]}
    order = sorted(large.keys() | small.keys(), key=lambda name: (_backward(name), *_place(name, small, large)))
    rows = [[_label(name, small), *_cells(name, small, demo, large)] for name in order]
    before = ["before tuning", f"{tasks['lm']['start']['report']['loss']:.2f}",
              f"{100 * tasks['demo']['start']['report']['accuracy']:.1f}"]  # fmt: skip
    start = page_cpu.results().get("start")
    rows.append([*before, f"{100 * start['test']['accuracy']:.1f}" if start else ""])
    budget = page_cpu.stored(page_cpu.RUNS).get("settings", {}).get("budget", "")
    head = ["method", f"0.2M, {tasks['lm']['budget']} forwards: loss", f"23M, {tasks['demo']['budget']}: accuracy, %",
            f"135M, {budget}: accuracy, %"]  # fmt: skip
    return table(head, rows)


def _backward(name: str) -> bool:
    return name == "adam" or (name in METHODS and METHODS[name].backward)


def _place(name: str, small: Record, large: Record) -> tuple[float, float]:
    """By accuracy on the largest model, then by loss on the smallest."""
    accuracy = mean(page_cpu.ends(large[name])) if name in large else -math.inf
    return -accuracy, small[name]["final"]["loss"]["mean"] if name in small else math.inf


def _label(name: str, small: Record) -> str:
    label: str = METHODS[name].label if name in METHODS else small[name]["label"]
    return label


def _cells(name: str, small: Record, demo: Record, large: Record) -> list[str]:
    loss = f"{small[name]['final']['loss']['mean']:.2f}" if name in small else ""
    accuracy = f"{100 * demo[name]['final']['accuracy']['mean']:.1f}" if name in demo else ""
    return [loss, accuracy, page_cpu.spread(page_cpu.ends(large[name])) if name in large else ""]


def samples() -> str:
    """The number of directions of one-sided MeZO."""
    record = load(SAMPLES)
    found = record["results"]["methods"].values()
    least = min(one["final"]["loss"]["mean"] for one in found)
    rows = []
    for one in found:
        count, loss = one["settings"]["num_samples"], one["final"]["loss"]
        rows.append([str(count), str(one["steps"]), f"{one['lr']:.2g}", f"{count / (count + 1):.2f}",
                     f"{loss['mean']:.3f} ± {loss['std']:.3f}", signed(loss["mean"] - least, 3)])  # fmt: skip
    head = ["n", "steps", "best lr", "seen in a forward, n / (n + 1)", "held-out loss", "minus the least"]
    return f"{table(head, rows)}\n\n{made_on(record)}."


def long_runs() -> str:
    """Of docs/llm.md on a GPU: what became of the lr that a short search had chosen."""
    lines = []
    for name in ("mezo-onesided", "mezo"):
        method = gpu.finished()[name]
        looks = [100 * gpu.at(method, share) for share in gpu.SHARES]
        least, most = looks[-1], max(looks)
        budget = gpu.stored()["settings"]["budget"]
        lines.append(
            f"- {method['label']}, lr {method['lr']:g}: {most:.1f} % at best, {least:.1f} % after {budget:,} forwards"
        )
    return "\n".join(lines)


PAGES: dict[str, dict[str, Callable[[], Any]]] = {
    "docs/choose.md": {
        "methods": methods, "samples": samples, "rule": rule, "rules": rules, "long": long_runs,
    }
}  # fmt: skip
