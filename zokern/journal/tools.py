"""What the command line says of journals: what is in one, and where two differ."""

from __future__ import annotations

import itertools
import math
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from zokern import drawing
from zokern._checks import difference
from zokern.journal.format import BROKEN_OFF, SKIPPED, JournalError
from zokern.journal.reader import Reader, Step
from zokern.optim import METHODS


def printable(value: object) -> str:
    """As text that a terminal only shows: a stranger's file may hold its control characters."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value))


def parts(step: Step) -> dict[str, Any]:
    """A step's frame by name: the numbers of its passes, each group's lr, the loss."""
    groups = step.signature["groups"]
    return {
        "scalars": step.frame[: len(step.frame) - groups - 1],
        "lr": step.frame[len(step.frame) - groups - 1 : -1],
        "loss": float(step.frame[-1]),
    }


def summary(path: Path) -> dict[str, Any]:
    """What a journal is of, its state, how long it is, and its curves of loss and lr. Damage ends these: see `wrong`."""
    reader, skipped, broken, folds, wrong = Reader(path), 0, 0, 0, ""
    steps, losses, lrs = array("q"), array("d"), array("d")
    try:
        for step in reader.steps():
            skipped += bool(step.flags & SKIPPED)
            broken += bool(step.flags & BROKEN_OFF)
            folds += step.fold
            if not step.flags & BROKEN_OFF and not step.fold:
                named = parts(step)
                steps.append(step.number)
                losses.append(named["loss"])
                lrs.append(float(named["lr"][0]))
    except JournalError as error:
        wrong = str(error)
    params = reader.layout.get("params", [])
    return {
        "header": reader.header,
        "version": reader.version,
        "parameters": sum(math.prod(shape) for _, _, shape, *_ in params),
        "tensors": len(params),
        "steps": steps,
        "loss": losses,
        "lr": lrs,
        "skipped": skipped,
        "broken_off": broken,
        "folds": folds,
        "state": reader.state,
        "explained": reader.explain(),
        "wrong": wrong,
        "bytes": reader.size,
        "marks": reader.marks,
    }


def plot(found: dict[str, Any], path: Path) -> None:
    """Loss and learning rate of a journal's steps, as PNG."""
    figure = drawing.figure(figsize=(7, 5), layout="constrained")
    loss = np.array(found["loss"], np.float64)
    window = max(len(loss) // 50, 1)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot(found["steps"], loss, color="0.8", linewidth=0.8, label="loss of each step")
    if len(loss) > window > 1:
        smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
        above.plot(found["steps"][window - 1 :], smooth, label=f"mean of {window} steps")
    above.set_ylabel("loss")
    above.legend()
    below.plot(found["steps"], found["lr"], color="tab:orange")
    below.set_ylabel("lr")
    below.set_xlabel("step")
    title = f"{printable(found['header']['method'])}, {len(loss)} steps, {found['bytes'] / 1000:,.1f} kB"
    drawing.plain(above.set_title(""), title)
    figure.savefig(path, dpi=120)


def _run_of(reader: Reader) -> dict[str, Any]:
    """A header with all options: what became a setting after a journal was written was at its default."""
    header = reader.header
    cls = next((one for one in METHODS.values() if one.__name__ == header["method"]), None)
    return header if cls is None else {**header, "options": cls.completed(header["options"])}


def first_difference(a: Path, b: Path) -> str | None:
    """Where two runs first differ and in what; None if their steps are the same. A torn end is a difference, as far as the
    other has steps there.

    Raises:
        JournalError: where one of them is damaged, before a difference was found.
    """
    one, two = Reader(a), Reader(b)
    a_run, b_run = _run_of(one), _run_of(two)
    for name in ("contract", "method", "options", "placement", "seed", "first_step", "base"):
        if a_run.get(name) != b_run.get(name):
            where, *both = difference(name, a_run.get(name), b_run.get(name))
            return f"before the first step, in {where}: {' and '.join(both)}"
    for first, second in itertools.zip_longest(one.steps(), two.steps()):
        if first is None or second is None:
            longer, step = (a, first) if second is None else (b, second)
            shorter = two if second is None else one
            ends = f"; {printable(shorter.path)}: {shorter.explain()}" if shorter.torn else ""
            if step.fold:
                return f"after step {step.number}, after which only {printable(longer)} was folded by hand{ends}"
            return f"at step {step.number}, which only {printable(longer)} has{ends}"
        where = f"at step {first.number}"
        if first.layout != second.layout:
            return f"{where}, in the parameters that are trained"
        if first.fold != second.fold:
            return f"after step {min(first.number, second.number)}, where only one of them was folded by hand"
        if first.flags != second.flags or first.number != second.number:
            return f"{where}, in whether it was done: flags {first.flags} and {second.flags}"
        if first.signature != second.signature:
            return f"{where}, in its passes: {first.signature['passes']} and {second.signature['passes']}"
        left, right = parts(first), parts(second)
        for name, what in (("lr", "lr"), ("scalars", "a scalar of its passes"), ("loss", "loss")):
            x, y = np.atleast_1d(np.float32(left[name])), np.atleast_1d(np.float32(right[name]))
            unlike = np.flatnonzero(x.view(np.uint32) != y.view(np.uint32))
            if len(unlike):
                return f"{where}, in {what}: {x[unlike[0]]:.9g} and {y[unlike[0]]:.9g}"
    return None
