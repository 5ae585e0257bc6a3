"""The tables of docs/choose.md, from the stored runs of other studies and of run.py beside this file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import mean

from benchmarks.choose import searches
from benchmarks.choose.searches import LONG, RULES, SAMPLES, Found, found
from benchmarks.convergence.page import stored as convergence
from benchmarks.llm import page as gpu
from benchmarks.llm import stored_cpu
from benchmarks.llm.methods import METHODS, SEEDS
from benchmarks.parts import Record, load, made_on, signed, table

LABELS = {"mezo": "MeZO, two-sided"}  # where convergence.md's is too short


def millions(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count < 1e7 else f"{count / 1e6:.0f}M"


# ----------------------------------------------------------------------------------------------------------- which lr


def _at(one: Found, lr: float | None) -> str:
    """An lr that was tried, and the loss that it gave."""
    if lr is None:
        return "none"
    loss = one.tried[lr]
    return f"{lr:.2g}: {'none' if math.isinf(loss) else format(loss, '.3f')}"


def rules() -> str:
    """Each search beside its rule."""
    rows = [
        [RULES[one.method].label, str(one.n), millions(one.parameters), f"{one.forwards:,}, {one.how}",
         "" if one.start is None else f"{one.start:.3f}", _at(one, one.below), f"**{_at(one, one.lr)}**",
         _at(one, one.above), f"{one.rule:.2g}", f"{one.rule / one.lr:.2f}"]
        for one in found()
    ]  # fmt: skip
    head = ["method", "n", "model", "forwards, lr", "loss before", "next lower lr: loss", "best lr: loss",
            "next higher lr: loss", "the rule's lr", "over the best"]  # fmt: skip
    return table(head, rows)


def short() -> list[Found]:
    return [one for one in found() if one.forwards <= LONG]


def rule() -> str:
    """The rules themselves, how far they are off, and what an lr beside the best does."""
    lines = [f"- {one.label}, {one.steps}: lr = {one.text}" for one in RULES.values()]
    over = [one.rule / one.lr for one in short()]
    long = [one for one in found() if one.forwards > LONG]
    told = (
        f"In the {len(over)} searches of up to {max(one.forwards for one in short()):,} forwards, the rule's lr is "
        f"{min(over):.2f} to {max(over):.2f} times the best one that was tried. In those of {long[0].forwards:,} forwards: "
        + ", ".join(f"{RULES[one.method].label} {one.rule / one.lr:.1f}" for one in long)
        + " times."
    )
    return "\n".join([*lines, "", told, "", _beside()])


def _beside() -> str:
    """How often the neighbours of the best lr ended worse than no training."""

    def worse(neighbour: str) -> str:
        pairs = [(one, getattr(one, neighbour)) for one in found()]
        ends = [one.tried[lr] > one.start for one, lr in pairs if lr is not None and one.start is not None]
        return f"{sum(ends)} of {len(ends)}"

    return (
        "**Too small an lr is slow; too large a one undoes the model.** The next higher lr, 2.5 to 3.3 times the best, "
        f"ended worse than no training in {worse('above')} searches; the next lower one in {worse('below')}."
    )


def long_runs() -> str:
    """Of docs/llm.md on a GPU: what became of the lr that a shorter search had chosen."""
    lines = []
    searched = {one.method: one for one in found() if one.forwards > LONG}
    budget = gpu.stored()["settings"]["budget"]
    for name in ("mezo-onesided", "mezo"):
        method = gpu.finished()[name]
        looks = [100 * gpu.at(method, share) for share in gpu.SHARES]
        share = method["lr"] / searched[name].rule
        lines.append(
            f"- {RULES[name].label}, n={searched[name].n}, lr {method['lr']:g}, {share:.1f} of the rule's: "
            f"{max(looks):.1f} % at the best of {len(looks)} looks, {looks[-1]:.1f} % after {budget:,} forwards"
        )
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------- which method, n


def methods() -> str:
    """What each method reached with the same forwards, on each of the three models."""
    tasks = convergence()["results"]
    small, demo = tasks["lm"]["methods"], tasks["demo"]["methods"]
    large = stored_cpu.ran()
    whole = bool(large) and {len(part["runs"]) for part in large.values()} == {len(SEEDS)}
    shown = large if whole else {}
    known = [*small, *(name for name in METHODS if name in large and name not in small)]
    order = sorted(known, key=lambda name: (_backward(name), *_place(name, small, shown)))
    rows = [[_label(name, small), *_cells(name, small, demo, large)] for name in order]
    rows.append(["before tuning", f"{tasks['lm']['start']['report']['loss']:.2f}",
                 f"{100 * tasks['demo']['start']['report']['accuracy']:.1f}"])  # fmt: skip
    head = ["method", f"0.2M, {tasks['lm']['budget']:,} forwards: loss", f"23M, {tasks['demo']['budget']}: accuracy, %"]
    if large:  # else nothing is there to show
        head.append(f"135M, {stored_cpu.stored(stored_cpu.RUNS)['settings']['budget']}: accuracy, %")
        rows[-1].append(f"{100 * stored_cpu.results()['start']['test']['accuracy']:.1f}")
    return table(head, [row[: len(head)] for row in rows])


def _backward(name: str) -> bool:
    return name in METHODS and METHODS[name].backward


def _place(name: str, small: Record, large: Record) -> tuple[float, float]:
    """By accuracy on the largest model where all its seeds are there, then by loss on the smallest."""
    accuracy = mean(stored_cpu.ends(large[name]["runs"])) if name in large else -math.inf
    return -accuracy, small[name]["final"]["loss"]["mean"] if name in small else math.inf


def _label(name: str, small: Record) -> str:
    label: str = LABELS.get(name) or (small[name]["label"] if name in small else METHODS[name].label)
    return label


def _cells(name: str, small: Record, demo: Record, large: Record) -> list[str]:
    loss, share = (
        part[name]["final"][key] if name in part else None for part, key in ((small, "loss"), (demo, "accuracy"))
    )
    return [
        f"{loss['mean']:.2f} ± {loss['std']:.2f}" if loss else "",
        f"{100 * share['mean']:.1f} ± {100 * share['std']:.1f}" if share else "",
        stored_cpu.spread(stored_cpu.ends(large[name]["runs"])) if name in large else "",
    ]


def samples() -> str:
    """The number of directions of one-sided MeZO."""
    record = load(SAMPLES)
    ones = record["results"]["methods"].values()
    least = min(one["final"]["loss"]["mean"] for one in ones)
    rows = []
    for one in ones:
        count, loss = searches.directions("mezo-onesided", one["settings"]), one["final"]["loss"]
        rows.append([str(count), str(one["steps"]), f"{one['lr']:.2g}", f"{count / (count + 1):.2f}",
                     f"{loss['mean']:.3f} ± {loss['std']:.3f}", signed(loss["mean"] - least, 3)])  # fmt: skip
    head = ["n", "steps", "best lr tried", "learns from, of its forwards", "held-out loss", "minus the least"]
    return f"{table(head, rows)}\n\n{made_on(record)}."


PAGES: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "docs/choose.md": {"methods": methods, "samples": samples, "rule": rule, "rules": rules, "long": long_runs}
}
