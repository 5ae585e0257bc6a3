"""Does a case, and says what came of it: hashes of weights, states and figures, counters, and its journal."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zokern
from zokern import journal

from .cases import ALL, DTYPES, STEPS, Case
from .model import EXAMPLES, Whole

SKIPPED_STEP, BROKEN_STEP = 1, 2


class BreaksOff(Exception):
    pass


def optimizer_of(case: Case) -> tuple[Whole, Any]:
    model = Whole(DTYPES[case.dtype])
    method, settings = ALL[case.method]
    settings = {
        "eps": 0.06, "seed": 1234, "placement": case.placement, "rounding": case.rounding,
        **settings, **case.settings,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", zokern.ZokernWarning)
        opt = method(model, lr=0.002, **settings)
    if case.what == "groups":  # the module stays known, so that copies can be shown
        *rest, last = opt.param_groups[0]["params"]
        opt.param_groups[0]["params"] = rest
        opt.add_param_group({"params": [last], "lr": 0.003, "eps": 0.03, "weight_decay": 0.3})
    return model, opt


def closure_of(case: Case, model: Whole, step: int) -> Callable[..., Any]:
    calls = itertools.count()

    def closure(example: int = 0) -> Tensor:
        if case.what == "vector":
            return torch.stack([model(i) for i in range(EXAMPLES + 1)])
        loss: Tensor = model(example)
        if case.what == "skipped" and step == SKIPPED_STEP:
            return loss * math.nan
        if case.what == "broken" and step == BROKEN_STEP and next(calls) == 1:
            raise BreaksOff
        return loss

    return closure


def steps(case: Case, model: Whole, opt: Any, first: int, last: int, figures: list[float]) -> None:
    """Steps first .. last-1; lr is half after two, and its figures are noted."""
    for step in range(first, last):
        for group in opt.param_groups if step == 2 else []:
            group["lr"] *= 0.5
        closure = closure_of(case, model, step)
        batches = list(range(EXAMPLES)) if case.what == "batches" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", zokern.ZokernWarning)
            if case.what == "broken" and step == BROKEN_STEP:
                try:
                    opt.step(closure)
                except BreaksOff:
                    closure = closure_of(case, model, -1)  # and once more, without
            loss = opt.step(closure, batches)
        figures += [float(loss), float(opt.metrics["projected_gradient"])]


def do(case: Case, path: Path, saved: bytes | None = None) -> dict[str, Any]:
    """Runs the case with a journal at `path`. saved: a state_dict of after two steps, from which "saved" goes on."""
    model, opt = optimizer_of(case)
    figures: list[float] = []
    found: dict[str, Any] = {"base": journal.hash_of(model.named_parameters())}
    if case.what == "resumed":
        with journal.write(opt, path):
            steps(case, model, opt, 0, 2, figures)
        model, opt = optimizer_of(case)
        with journal.resume(opt, path):
            steps(case, model, opt, 2, STEPS, figures)
    elif case.what == "saved":
        steps(case, model, opt, 0, 2, figures)
        own = io.BytesIO()
        torch.save(opt.state_dict(), own)
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        model, opt = optimizer_of(case)
        model.load_state_dict(weights, strict=False)
        loaded = torch.load(io.BytesIO(saved or own.getvalue()), weights_only=True)
        opt.load_state_dict(loaded)
        found["saved"] = own.getvalue()
        steps(case, model, opt, 2, STEPS, figures)
    elif case.what == "by-hand":
        with journal.write(opt, path):
            steps(case, model, opt, 0, 2, figures)
            found["folded"] = opt.fold()
            steps(case, model, opt, 2, STEPS, figures)
    else:
        with journal.write(opt, path):
            steps(case, model, opt, 0, STEPS, figures)
    names = {id(p): name for name, p in model.named_parameters()}
    states = [(f"{names[id(p)]}.{key}", t) for p, kept in opt.state.items() for key, t in kept.items()]
    return found | {
        "weights": journal.hash_of(model.named_parameters()),
        "states": journal.hash_of(states),
        "figures": hashlib.blake2b(
            torch.tensor(figures, dtype=torch.float32).numpy().tobytes(), digest_size=8
        ).hexdigest(),
        "counters": opt.counters,
        "skipped": opt.skipped_steps,
    }


def content(path: Path) -> Iterator[object]:
    """All that a journal says of a run, numbers as bits: not who wrote it in which format, and where it was taken up."""
    reader = journal.Reader(path)
    header = {**reader.header, "options": getattr(zokern, reader.header["method"]).completed(reader.header["options"])}
    yield {key: value for key, value in header.items() if key not in ("zokern", "features")}
    for step in reader.steps():
        yield step.number, step.flags, step.layout, step.signature, step.frame.tobytes()
    yield [mark[:4] for mark in reader.marks[-1:]], reader.state  # not where it stands in the file
