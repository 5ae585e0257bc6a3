"""What the papers of the methods report, in our words, beside what was found here: a table of docs/llm.md."""

from __future__ import annotations

from benchmarks.llm import stored_cpu
from benchmarks.llm.methods import METHODS
from benchmarks.llm.stored_cpu import spread
from benchmarks.parts import Record, table

ARXIV = "https://arxiv.org/abs/"
# method: paper, year, and what it reports of itself; over MeZO, where it does not say otherwise
CLAIMS: dict[str, tuple[str, int, str]] = {
    "mezo": (
        "2305.17333", 2023,
        "OPT-13B: ahead of zero-shot and of examples in the prompt; with the best of all weights, LoRA and prefix, within "
        "a point of backpropagation on 7 of 11 tasks",
    ),
    "lezo": ("2410.09823", 2024, "OPT: over 3 times faster by the clock on three tasks, at no loss of accuracy"),
    "hizoo": ("2402.15173", 2024, "SST-2: 8 times faster; fewer steps in all; up to 5.1 points more on a 66B model"),
    "helene": ("2411.10696", 2024, "RoBERTa-large, OPT-1.3B: up to 20 times faster, 1.5 points more on average"),
    "mezo-gv": (
        "2601.04710", 2026,
        "of both its methods: a larger decrease of the loss in a step; on OPT-13B ahead of the forward-only methods that "
        "it compares with on 11 tasks, and of backpropagation on 9",
    ),
    "mezo-greedy": ("2601.04710", 2026, "as above"),
    "fzoo": (
        "2506.09034", 2025,
        "on average 3 points more with a third of the forwards; RoBERTa-large: 5.6 points more with an 18th of them",
    ),
    "es": ("2509.24372", 2025, "ahead of reinforcement learning in several respects, as samples needed; not of MeZO"),
    "lowrank": ("2410.07698", 2024, "of LOZO, a relative: ahead of other forward-only methods"),
}  # fmt: skip


def pairs(method: Record, other: Record, key: str) -> list[tuple[float | None, float | None]]:
    """The ends of both, for each seed that both have."""
    ends = [{run["seed"]: run["curve"][-1][key] for run in one["runs"]} for one in (method, other)]
    return [(ends[0][seed], ends[1][seed]) for seed in ends[0] if seed in ends[1]]


def _cells(method: Record, mezo: Record) -> list[str]:
    """Differences of loss and of accuracy, and the number of seeds."""
    found = pairs(method, mezo, "loss")
    if any(None in pair for pair in found):
        return ["diverged", "diverged", str(len(found))]
    points = [100 * (a - b) for a, b in pairs(method, mezo, "accuracy")]
    loss = [a - b for a, b in found]
    return [spread(loss, 3, sign=True), spread(points, sign=True), str(len(found))] if found else [""] * 3


def papers() -> str:
    """A line for each method that has a paper."""
    found = stored_cpu.ran()
    if "mezo" not in found:
        return stored_cpu.NONE
    rows = []
    for name, (number, year, claim) in CLAIMS.items():
        here = _cells(found[name], found["mezo"]) if name in found and name != "mezo" else [""] * 3
        rows.append([METHODS[name].label, f"[{year}]({ARXIV}{number}): {claim}", *here])
    return table(
        ["method", "its paper reports", "here: loss minus MeZO's", "points minus MeZO's", "seeds"], rows, tight=True
    )


PAGES = {"docs/llm.md": {"cpu-papers": papers}}
