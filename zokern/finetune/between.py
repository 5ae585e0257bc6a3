"""A run that was best in between: an evaluation that was clearly better than the last one, and how to have its weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

from zokern.finetune import learnt
from zokern.finetune.display import measured
from zokern.finetune.loop import Result
from zokern.finetune.records import Record, score

SHARES = ("accuracy", "exact_match", "token_f1")  # means over the rows of what is 0 to 1 for each
ERRORS = 2  # standard errors, which are clearly more than chance
LOST = 0.5  # of what the loss had fallen by: so much is lost again, where the metric is no share


def better(records: Sequence[Record], result: Result, metric: str, rows: int) -> Record | None:
    """The best evaluation before the last one, where it is clearly better. rows: held out, of which `metric` is."""
    held = [record for record in records if record["kind"] == "eval" and 0 < record["step"] < result.steps]
    if metric in SHARES:
        top = max(held, key=score, default=None)
        return top if top is not None and clearly(score(top), result.accuracy[1], rows) else None
    top = min((one for one in held if one["loss"] is not None), key=lambda one: float(one["loss"]), default=None)
    if top is None:
        return None
    (before, after), least = result.loss, float(top["loss"])
    kept = after <= least + LOST * (before - least)  # False for nan
    return top if learnt.fallen(before, least) and not kept else None


def clearly(best: float, last: float, rows: int) -> bool:
    """Whether one share is above another by more than the error of a share of so many rows."""
    middle = min((best + last) / 2, 1.0)
    return best - last > ERRORS * math.sqrt(middle * (1 - middle) / rows)


def said(top: Record, result: Result, metric: str, replay: str | None) -> list[str]:
    """What the summary says of it. replay: the command that makes a model again, up to its -o; None: no journal."""
    figures = f"{metric.replace('_', ' ')} {measured(metric, score(top))}"
    end = measured(metric, result.accuracy[1])
    if metric not in SHARES:
        figures, end = f"held-out loss {top['loss']:.4f}, {figures}", f"{result.loss[1]:.4f}, {end}"
    step = top["step"]
    again = "without a journal they are gone" if replay is None else f"{replay} -o step-{step} --until {step}"
    return [
        f"{figures} after step {step}, at the end {end}: a lower --lr or a shorter run keeps it",
        f"the weights of step {step} again: {again}",
    ]
