"""What a step asks of a pass, in the method's terms: float64 by name, before it is rounded once to what a pass reads.

Rows are the parameter groups, or finer where a method needs it; coefs are [R, K], shared numbers [R].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from zokern.contract.rules import Rule
from zokern.passes.spec import PassNumbers

BEYOND = 2.0**128 - 2.0**103  # the least number that float32 rounds to infinity
CPU = torch.device("cpu")  # for what the host reads: torch.set_default_device is of the user's tensors
# A direction's seed: known to the host, or (a 0-d int64 tensor) to the device alone. Tensors are told apart by identity.
Seed = int | Tensor
# Multiples of eps by seed, each a number or a 0-d float64 tensor: one probe is at theta + eps sum_k a_k z(seed_k).
Terms = Mapping[Seed, float | Tensor]


def same_seed(a: Seed | None, b: Seed | None) -> bool:
    """As far as the host knows."""
    return a is b or (isinstance(a, int) and isinstance(b, int) and a == b)


@dataclass(frozen=True)
class Update:
    """A pass of `rule`: coefs [R, K] by name, A without what restores the weights; shared [R] by name.

    idle: the values of shared with which the rule leaves its states alone, for a step that is skipped.
    """

    seeds: Sequence[Seed]
    coefs: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]
    rule: str = "axpy"
    idle: Mapping[str, float] = field(default_factory=dict)
    square_of_sum: bool = False
    keep_second: bool = False

    def values(self) -> Tensor:
        """All of its numbers as the pass reads them, float32, in one row."""
        every = (*self.coefs.values(), *self.shared.values())
        return torch.cat(list(map(torch.flatten, every))).to(torch.float32)

    @functools.cached_property
    def plain(self) -> dict[str, Any]:
        """Its numbers where the host has them: by name R lists of K, or R numbers. A look at these is no call of torch."""
        every = {**self.coefs, **self.shared}
        return dict(zip(every, map(Tensor.tolist, every.values()), strict=True))

    def fits(self) -> bool:
        """Whether all of `plain` is finite as the pass reads it."""
        of = self.plain.__getitem__
        every = list(chain.from_iterable(chain.from_iterable(map(of, self.coefs))))
        every += chain.from_iterable(map(of, self.shared))
        return all(map(math.isfinite, every)) and max(every) < BEYOND and min(every) > -BEYOND


def sent(t: Tensor, device: torch.device) -> Tensor:
    """t on `device`: nothing waits on the way to a device, but a copy for the host is read there at once."""
    return t if t.device == device else t.to(device, non_blocking=device.type != "cpu")


def is_known(ok: Tensor, gate: Tensor | None) -> bool:
    """Whether the host knows that a step is ok: not where a captured one may turn out otherwise."""
    return ok.is_cpu and gate is None and bool(ok)


def seed_tensor(seeds: Sequence[Seed]) -> Tensor:
    """int64 [K]: on the host where it knows them all, else on the device of those that it does not know."""
    for seed in seeds:
        if isinstance(seed, Tensor):
            device = seed.device
            break
    else:
        return torch.tensor(seeds, dtype=torch.int64, device=CPU)
    # Numbers are filled in, not made a tensor of: a copy from the host to a device could not be captured in a graph.
    return torch.stack(
        [s if isinstance(s, Tensor) else torch.full((), s, dtype=torch.int64, device=device) for s in seeds]
    )


def along(eps: Tensor, terms: Terms, seeds: Sequence[Seed]) -> Tensor:
    """[R, K]: each row's eps times the terms of `seeds`, 0 for those that have none."""
    columns = []
    for seed in seeds:
        value = terms.get(seed, 0.0)
        if isinstance(value, Tensor) and value.device != eps.device:
            eps = sent(eps, value.device)
        columns.append(eps * value)
    return columns[0][:, None] if len(columns) == 1 else torch.stack([sent(c, eps.device) for c in columns], dim=1)


def perturbation(eps: Tensor, terms: Terms, still: Tensor, enabled: Tensor | None) -> PassNumbers:
    """Of the pass that goes to theta + eps sum_k a_k z(seed_k) from theta. still [R, 1]: ones, the decay."""
    seeds = list(terms)
    coefs = along(eps, terms, seeds).to(torch.float32).unsqueeze(1)
    return PassNumbers(seed_tensor(seeds), coefs, still, None, enabled)


def packed(rule: Rule, coefs: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """coefs [R, C, K] and shared [R, S] in the order that `rule` has them, rounded to float32, once."""
    return (
        torch.stack(list(map(coefs.__getitem__, rule.coefs)), dim=1).to(torch.float32),
        torch.stack(list(map(shared.__getitem__, rule.scalars)), dim=1).to(torch.float32),
    )
