"""What is said of the whole: the loss, whether it is the same function twice, eps against the weights' spacing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from zokern.checking.result import NO_EFFECT, Finding, Row
from zokern.checking.runs import Reacting, Runs
from zokern.checking.subject import listed
from zokern.contract.streams import matrices
from zokern.optim.pairing import by_itself, draws
from zokern.placement import Forward
from zokern.sweep import Member

# Share of a dtype's elements that eps z has to change. Where the rest is rounded away, what is left of normal noise and
# the noise that an update follows have a correlation of 0.97 at 0.7, 0.65 at 0.1 and 0.29 at 0.01.
ENOUGH, LEAST = 0.5, 0.1


def of_loss(reacting: Reacting, runs: Runs, module: nn.Module | None) -> list[Finding]:
    """Of the loss itself."""
    found = []
    loss = float(reacting.base.mean())
    if not reacting.finite:
        text = f"the loss of the clean weights is {loss}: every step would be skipped; nothing was perturbed"
        found.append(Finding("loss", text, True))
    if runs.coarse is not None:
        found.append(Finding("loss", _coarse(runs.coarse, loss, cast=runs.coarse not in runs.dtypes), True))
    if not reacting.same_twice and reacting.finite:
        found.append(Finding("same function", _twice(reacting, runs, module), True))
    elif runs.around.changed:
        text = f"the closure changes {listed(list(runs.around.changed))}, and would do so with perturbed weights"
        found.append(Finding("buffers", text))
    return found


def of_forward(placement: Forward, members: Sequence[Member]) -> Finding:
    """What placement="forward" adds to products, and what it copies."""
    lower, copied = placement.split(members)
    text = f"forward adds to the products of {len(lower)} matrices, and copies {len(copied)} other tensors"
    large = [members[i].name for i in copied if matrices(members[i].param.shape, placement.rank) is not None]
    if large:
        said = [f"{name} ({placement.copied[name]})" if name in placement.copied else name for name in large]
        text += f", among them matrices that something else uses: {listed(said)}"
    return Finding("placement", text)


def spacing(value: float, dtype: torch.dtype) -> float:
    """Between neighbouring numbers of `dtype` at `value`."""
    about = torch.finfo(dtype)
    exponent = math.floor(math.log2(max(abs(value), about.tiny))) if value else math.floor(math.log2(about.tiny))
    return float(2.0**exponent * about.eps)


def _coarse(dtype: torch.dtype, loss: float, *, cast: bool) -> str:
    """cast: it comes in another dtype."""
    name = str(dtype).removeprefix("torch.")
    between = ""
    if math.isfinite(loss):
        between = f", where neighbouring numbers are {spacing(loss, dtype):.2g} apart at {loss:.4g}"
    said = "all losses are numbers of" if cast else "the closure returns it in"
    return (
        f"{said} {name}{between}: smaller differences are lost; compute it in float32, for example "
        "torch.nn.functional.cross_entropy(logits.float(), labels)"
    )


def _twice(reacting: Reacting, runs: Runs, module: nn.Module | None) -> str:
    said = "the closure is not the same function twice"
    if reacting.exact:
        dropping = active_dropout(module)
        cause = f"random numbers: active dropout in {listed(dropping)}; call model.eval()" if dropping else (
            "random numbers, which the closure draws (sampling, augmentation)"
        )  # fmt: skip
        if runs.around.changed:
            cause += f", or buffers that it changes: {listed(list(runs.around.changed))}"
        return f"{said} ({cause}). Tensors were perturbed with equal random states"
    return (
        f"{said}, also with equal random states and buffers (another batch each time, a generator of its own, kernels that "
        f"add up in no fixed order). Its losses spread over {reacting.noise:.2g}; smaller reactions were not seen"
    )


def active_dropout(module: nn.Module | None) -> list[str]:
    """Names of the modules that draw in training mode, with their kind where that does not say so: attention with a share
    of its own, RReLU."""
    found = []
    for name, child in () if module is None else module.named_modules():
        kind = type(child).__name__
        called = "dropout" in kind.lower()
        own = by_itself(child) or (draws(child) and not any(map(draws, child.children())))
        if own or (called and child.training and getattr(child, "p", 0.0) > 0.0):
            found.append((name or "the model") + ("" if called else f" ({kind})"))
    return found


def of_tensors(rows: list[Row], flat: bool, reacting: Reacting, runs: Runs) -> list[Finding]:
    """rows: of the tensors that were looked at. flat: the loss reacted to none."""
    found = []
    if flat:
        found.append(Finding("tensors", _flat(rows, reacting, runs), True))
    else:
        without = [row for row in rows if row.state == NO_EFFECT]
        faults = [row.name for row in without if row.suspicious]
        if faults:
            found.append(Finding("tensors", f"no effect seen of {len(faults)}: {listed(faults)}", True))
        if len(without) > len(faults):
            names = listed([row.name for row in without if not row.suspicious])
            found.append(Finding("tensors", f"no effect seen of {names}, which may be normal"))
    return found + _of_eps(rows)


def _flat(rows: list[Row], reacting: Reacting, runs: Runs) -> str:
    causes = []
    loss = float(reacting.base.mean())
    if float(loss).is_integer() or any(not dtype.is_floating_point for dtype in runs.dtypes):
        causes.append(f"the loss, {loss:g}, counts something: a step function, which small changes do not move")
    if runs.coarse is not None:
        causes.append("it comes in 16 bits")
    causes += dict.fromkeys(row.why for row in rows if row.suspicious)
    causes.append("it is computed from something that is kept from one call to the next")
    return "the loss reacted to none of the tensors: " + "; or ".join(causes)


def _of_eps(rows: list[Row]) -> list[Finding]:
    """Whether eps z survives its rounding to the weights' dtype."""
    found = []
    for dtype in dict.fromkeys(row.dtype for row in rows):
        own = [(row, math.prod(row.shape)) for row in rows if row.dtype == dtype and row.moved is not None]
        share = sum((row.moved or 0.0) * size for row, size in own) / max(sum(size for _, size in own), 1)
        name = str(dtype).removeprefix("torch.")
        still = [row.name for row, _ in own if (row.moved or 0.0) < 0.01]
        if share < ENOUGH:
            text = (
                f"eps z changes {share:.1%} of the elements in {name}, as it is small beside the distance of neighbouring "
                "numbers; take a larger eps, or float32 weights"
            )
            found.append(Finding("eps", text, share < LEAST))
        elif still:
            found.append(Finding("eps", f"eps z changes less than 1 % of {listed(still)}, in {name}"))
    return found
