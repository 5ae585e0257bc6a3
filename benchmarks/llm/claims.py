"""What the papers of the methods report, in our words and from their abstracts, beside what was found here.

A paper's runs are of other models, tasks and lengths (20,000 steps are usual); most count steps, of which ours differ in
forwards. So a difference here that is not theirs is no refutation.
"""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

ARXIV = "https://arxiv.org/abs/"
# method: paper, year, and what it reports over MeZO (the first: over backpropagation)
CLAIMS: dict[str, tuple[str, int, str]] = {
    "mezo": (
        "2305.17333", 2023,
        "OPT-13B: within a point of backpropagation on 7 of 11 tasks, in the memory of inference; ahead of zero-shot and "
        "of examples in the prompt",
    ),
    "lezo": (
        "2410.09823", 2024,
        "OPT: over 3 times faster on three tasks, since passes over the weights took half of the time; no less accuracy",
    ),
    "hizoo": ("2402.15173", 2024, "SST-2: 8 times faster, in steps; up to 5.1 points more on a 66B model"),
    "helene": ("2411.10696", 2024, "RoBERTa-large, OPT-1.3B: up to 20 times faster, 1.5 points more on average"),
    "mezo-gv": (
        "2601.04710", 2026,
        "OPT-13B: ahead of all other forward-only methods on 11 tasks, of backpropagation on 9; its theory is of a step",
    ),
    "mezo-greedy": ("2601.04710", 2026, "the same paper; its theory is of a step"),
    "fzoo": (
        "2506.09034", 2025,
        "on average 3 points more with a third of the forwards; RoBERTa-large: 5.6 points more with an 18th of them",
    ),
    "es": ("2509.24372", 2025, "rewards without a derivative: ahead of reinforcement learning"),
    "lowrank": ("2410.07698", 2024, "of LOZO, a relative: ahead of other forward-only methods"),
}  # fmt: skip


def against(method: dict[str, Any], other: dict[str, Any], key: str) -> list[float] | None:
    """Of each seed that both have, the method's end minus the other's; None where one has diverged, [] for no such seed."""
    ends = [{run["seed"]: run["curve"][-1][key] for run in one["runs"]} for one in (method, other)]
    pairs = [(ends[0][seed], ends[1][seed]) for seed in ends[0] if seed in ends[1]]
    return None if any(None in pair for pair in pairs) else [a - b for a, b in pairs]


def said(values: list[float] | None, factor: float, digits: int) -> str:
    """Mean and standard deviation, 1/(N - 1), with a sign."""
    if not values:
        return "" if values == [] else "diverged"
    told = f"{factor * mean(values):+.{digits}f}"
    told += f" ± {factor * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return told.replace("-", "−")
