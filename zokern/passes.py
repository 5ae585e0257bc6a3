"""Runs passes over the active parameters and counts them: the only place where an optimizer touches memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from zokern import ops
from zokern.rules import RULES

# A direction's seed: known to the host, or (a 0-d int64 tensor) to the device alone. Tensors are told apart by identity.
Seed = int | Tensor
# Multiples of eps by seed, each a number or a 0-d float64 tensor.
Terms = Mapping[Seed, float | Tensor]


@dataclass(frozen=True)
class Member:
    """An active parameter: its tensor id, its row of the coefficients, its name for messages, its states by name."""

    param: Tensor
    tensor_id: int
    group: int
    name: str
    states: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class Counters:
    """What a run has done so far. A pass is one sweep over the active parameters, however many dtypes or devices."""

    steps: int = 0
    forwards: int = 0
    passes: int = 0
    launches: int = 0
    elements_moved: int = 0  # of weights, read or written: in place or not, two for each element of a pass


class Listener(Protocol):
    """Is told of every pass that writes to the weights' own storage, with its numbers as float32: a journal's recorder."""

    def add(
        self,
        rule: str,
        seeds: Sequence[Seed],
        coefs: Tensor,
        shared: Tensor,
        enabled: Tensor | None,
        how: Mapping[str, bool],
    ) -> None: ...


@dataclass
class Passes:
    distribution: str
    backend: str
    counters: Counters = field(default_factory=Counters)
    recorder: Listener | None = None

    def run(
        self,
        members: Sequence[Member],
        seeds: Sequence[Seed],
        coefs: Mapping[str, Tensor],
        shared: Mapping[str, Tensor] | None = None,
        *,
        rule: str = "axpy",
        out: Sequence[Tensor] | None = None,
        rounding_seeds: tuple[int, int] | None = None,
        stochastic: bool = False,
        enabled: Tensor | None = None,
        square_of_sum: bool = False,
        keep_second: bool = False,
        counted: bool = True,
    ) -> None:
        """One pass of `rule` over every member, whose row g of the coefficients and scalars is its own.

        coefs: each of the rule's coefs, [G, K]; shared: each of its scalars, [G] (none given: no decay). They are rounded
        to float32 here, once. rounding_seeds: the weights' and a state's; stochastic says whether weights use theirs.
        counted False: a piece of a sweep that the caller counts.
        """
        if not members:
            return
        which = RULES[rule]
        stacked = torch.stack([coefs[name] for name in which.coefs], dim=1)
        if shared is None:
            shared = {"decay": torch.ones(stacked.shape[0], dtype=torch.float64)}
        scalars = torch.stack([shared[name] for name in which.scalars], dim=1)
        by_device: dict[torch.device, list[int]] = {}
        for i, member in enumerate(members):
            by_device.setdefault(member.param.device, []).append(i)
        for device, at in by_device.items():
            chosen = [members[i] for i in at]
            ops.launch(
                [m.param.detach() for m in chosen],
                None if out is None else [out[i] for i in at],
                states=[[m.states[name] for m in chosen] for name in which.states],
                tensor_ids=[m.tensor_id for m in chosen],
                offsets=[0] * len(at),
                groups=[m.group for m in chosen],
                seeds=_seed_tensor(seeds, device),
                coefs=_float32_near(stacked, device),
                shared=_float32_near(scalars, device),
                rounding_seed=None if rounding_seeds is None else torch.tensor(rounding_seeds, dtype=torch.int64),
                enabled=None if enabled is None else enabled.to(device, non_blocking=True),
                rule=rule,
                distribution=self.distribution,
                rounding="stochastic" if stochastic else "nearest",
                square_of_sum=square_of_sum,
                keep_second=keep_second,
                backend=self.backend,
            )
            self.counters.launches += len({m.param.dtype for m in chosen})
        if self.recorder is not None and out is None:
            how = {
                "stochastic": stochastic,
                "rounded": rounding_seeds is not None,
                "square_of_sum": square_of_sum,
                "keep_second": keep_second,
            }
            self.recorder.add(rule, seeds, stacked.to(torch.float32), scalars.to(torch.float32), enabled, how)
        self.counters.passes += counted
        self.counters.elements_moved += 2 * sum(m.param.numel() for m in members)


def multiples(terms: Terms, seeds: Sequence[Seed]) -> Tensor:
    """The terms of `seeds`, in that order, float64 [K], on the device of those that are tensors; 0 for none."""
    values = [terms.get(seed, 0.0) for seed in seeds]
    tensors = [v for v in values if isinstance(v, Tensor)]
    if not tensors:
        return torch.tensor(values, dtype=torch.float64)
    return torch.stack([torch.as_tensor(v, dtype=torch.float64).to(tensors[0].device) for v in values])


def perturbation(eps: Tensor, terms: Terms, seeds: Sequence[Seed]) -> Tensor:
    """Coefficients [R, K] of a perturbation: each row's eps times the terms of `seeds`."""
    row = multiples(terms, seeds)
    return eps.to(row.device, non_blocking=True)[:, None] * row


def _seed_tensor(seeds: Sequence[Seed], device: torch.device) -> Tensor:
    if not any(isinstance(seed, Tensor) for seed in seeds):
        return torch.tensor(seeds, dtype=torch.int64)
    return torch.stack([torch.as_tensor(seed, dtype=torch.int64).to(device, non_blocking=True) for seed in seeds])


def _float32_near(t: Tensor, device: torch.device) -> Tensor:
    """float32, on the host or on `device`: a host tensor stays there, one from another device is sent over."""
    t = t.to(torch.float32)
    return t if t.device.type == "cpu" or t.device == device else t.to(device, non_blocking=True)
