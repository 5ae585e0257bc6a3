"""What a step costs: the method is asked for its probes, which nobody evaluates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from zokern.deltas import Delta
from zokern.directions import rank
from zokern.optim import ZerothOrderOptimizer, drivers
from zokern.optim.numbers import HostNumbers
from zokern.optim.update import Estimate
from zokern.passes.update import Seed, Terms
from zokern.placement import Forward, sites, stream
from zokern.placement.forward import extra_bytes
from zokern.sweep import Member, Passes


@dataclass(frozen=True)
class Cost:
    """Of one step of `method`.

    forwards: calls of the closure, a batch each. passes: over the active weights, by placement (pipelined=True saves one
    where there is room); with fold_every, those of a fold, shared out over its steps. weights, states: bytes of the
    trainable weights, and of what the method keeps for them. memory: bytes beside both, by placement, None where it cannot
    serve this model. seconds: of the forwards alone, as they were here.
    """

    method: str
    forwards: int
    passes: Mapping[str, float]
    weights: int
    states: int
    memory: Mapping[str, int | None]
    seconds: float


def cost(optimizer: ZerothOrderOptimizer, batches: int, forward_seconds: float) -> Cost:
    """batches: calls of the closure for each probe. forward_seconds: of one probe."""
    probes, every = _next(optimizer)[0], optimizer.fold_every
    trainable = _trainable(optimizer)
    shown = sum(bool(terms) for terms in probes) + 1  # a copy is made for each probe of other weights, then the update
    passes: dict[str, float] = {"inplace": _moves(probes) + 1, "shadow": shown, "stream": shown}
    if any(isinstance(p, Delta) for p in trainable):  # nothing can be written to
        passes = {}
    if rank(optimizer._passes.direction):
        passes["forward"] = 1 / every if every else 0
    return Cost(
        type(optimizer).__name__,
        optimizer.forwards() * batches,
        passes,
        sum(0 if isinstance(p, Delta) else p.nbytes for p in trainable),
        states(optimizer),
        memory(optimizer),
        optimizer.forwards() * forward_seconds,
    )


def states(optimizer: ZerothOrderOptimizer) -> int:
    """Bytes that the method keeps for the trainable weights from step to step."""
    each = sum(dtype.itemsize for dtype, _ in optimizer.state_spec.values())
    return each * sum(p.numel() for p in _trainable(optimizer))


def memory(optimizer: ZerothOrderOptimizer) -> dict[str, int | None]:
    """Bytes beside weights and states, by placement; None where it cannot serve this model."""
    trainable = _trainable(optimizer)
    copies = sites.sizes([Member(p, 0, 0, "") for p in trainable])
    copied = sum(size * dtype.itemsize for (_, dtype), size in copies.items())
    found = {"inplace": 0, "shadow": copied if optimizer.module is not None else None, "stream": _streamed(optimizer)}
    if any(isinstance(p, Delta) for p in trainable):
        found = dict.fromkeys(found)
    if rank(optimizer._passes.direction):
        found["forward"] = _forward(optimizer)
    return found


def placed(optimizer: ZerothOrderOptimizer) -> int:
    """Bytes beside weights and states that the optimizer's own placement takes."""
    held = memory(optimizer)[optimizer.placement]
    assert held is not None, "a placement that an optimizer has serves its model"
    return held


def needed(optimizer: ZerothOrderOptimizer) -> int:
    """Bytes beside the weights."""
    return states(optimizer) + placed(optimizer)


def _trainable(optimizer: ZerothOrderOptimizer) -> list[Tensor]:
    return [p for _, p in optimizer._parameters.trainable(optimizer)]


def _next(optimizer: ZerothOrderOptimizer) -> tuple[list[Terms], Estimate]:
    """The next step's probes, in order, and what it makes of them. Every loss is another number."""
    probes: list[Terms] = []

    def note(terms: Terms) -> Tensor:
        probes.append(dict(terms))
        return torch.tensor(float(len(probes)), dtype=torch.float64, device="cpu")

    step = optimizer.counters["steps"]
    optimizer.numbers = HostNumbers(optimizer.param_groups, optimizer.seed, step, optimizer.schedule)
    try:
        return probes, drivers.in_turn(optimizer.rounds(), note)
    finally:
        del optimizer.numbers


def _moves(probes: list[Terms]) -> int:
    """Passes that bring weights which are perturbed where they are from one probe to the next."""
    moves = 0
    at: dict[Seed, float] = {}
    for terms in probes:
        wanted = {seed: float(value) for seed, value in terms.items()}
        moves += any(wanted.get(seed, 0.0) != at.get(seed, 0.0) for seed in {**at, **wanted})
        at = wanted
    return moves


def _forward(optimizer: ZerothOrderOptimizer) -> int | None:
    """With fold_every=T the factors of T updates, the probe's among them, as none has more than an update; where only
    opt.fold() ends that, those that the first step makes room for."""
    if optimizer.module is None or optimizer.scaled:
        return None
    placement = Forward()
    placement.bind(optimizer.module, Passes(optimizer._passes.direction, optimizer._passes.backend))
    probes, estimate = _next(optimizer)
    every, taken, probe = optimizer.fold_every, len(estimate.gradient), max(map(len, probes))
    if every > 1:
        seeds = every * taken
    else:
        seeds = probe if every else 2 * probe
    return extra_bytes(placement, members_of(optimizer), seeds)


def members_of(optimizer: ZerothOrderOptimizer) -> list[Member]:
    """Every trainable tensor, by name."""
    names = optimizer._parameters.registry.names
    return [Member(p, 0, g, names[id(p)]) for g, p in optimizer._parameters.trainable(optimizer)]


def _streamed(optimizer: ZerothOrderOptimizer) -> int | None:
    if optimizer.module is None:
        return None
    try:
        stream.refuse(optimizer.module)
    except ValueError:
        return None
    return stream.extra_bytes(optimizer.module, prefetch=optimizer.prefetch)
