"""What a pass, or a chain of passes, is told besides its tensors: a few numbers, as tensors in host or device memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zokern.rules import RULES, Rule
from zokern.table import upload

MAX_STAGES, MAX_CHAIN_SEEDS = 32, 128  # csrc/pass.h


@dataclass(frozen=True)
class Scalars:
    """seeds int64 [K], coefs float32 [G, C, K], shared float32 [G, S], rounding_seed int64 [2], enabled int32 [1].

    C and S are the numbers of the rule's coefs and scalars. The two rounding seeds are the weights' and a state's.
    `enabled` with a zero in it makes the pass write nothing: a step is skipped without asking the device.
    """

    seeds: Tensor
    coefs: Tensor
    shared: Tensor
    rounding_seed: Tensor | None = None
    enabled: Tensor | None = None


@dataclass(frozen=True)
class Kind:
    """Which arithmetic. `square_of_sum`: V is (sum_k coef_k z_k)^2. `keep_second`: the second state is not written."""

    rule: Rule = RULES["axpy"]
    distribution: str = "normal"
    rounding: str = "nearest"
    square_of_sum: bool = False
    keep_second: bool = False


@dataclass(frozen=True)
class Chain:
    """Passes over the same tensors, done one after another in registers, each with its own rounding: the bits are theirs.

    Each is `rule` or `perturbation`, the rule that perturbs for it; their own `enabled` is not looked at. fork: the last,
    a perturbation, goes to the table's probes, and is done also where `enabled` says that nothing else is.
    """

    stages: Sequence[tuple[Kind, Scalars]]
    rule: Rule
    fork: bool = False
    enabled: Tensor | None = None

    @property
    def keep_second(self) -> bool:
        return not any(kind.rule.written == 2 and not kind.keep_second for kind, _ in self.stages)


def perturbation(rule: Rule) -> Rule:
    """What perturbs for a rule: directions over the root of the curvature where it has one."""
    return RULES["scaled_axpy" if rule.states == ("h",) else "axpy"]


def on_device(chain: Chain, device: torch.device) -> Chain:
    """The chain with all of its numbers on `device`, those of the host in one transfer that nothing waits for."""
    host: dict[int, Tensor] = {}
    for _, scalars in chain.stages:
        for t in (scalars.seeds, scalars.coefs, scalars.shared, scalars.rounding_seed):
            if t is not None and t.device != device and t.numel():
                host.setdefault(id(t), t)
    sizes = [-(-t.nbytes // 8) * 8 for t in host.values()]  # each begins at an 8-byte boundary
    packed = torch.empty(sum(sizes), dtype=torch.uint8)
    at = 0
    for t, size in zip(host.values(), sizes, strict=True):
        packed[at : at + t.nbytes] = t.contiguous().reshape(-1).view(torch.uint8)
        at += size
    sent, at = upload(packed, device), 0
    there: dict[int, Tensor] = {}
    for (key, t), size in zip(host.items(), sizes, strict=True):
        there[key] = sent[at : at + t.nbytes].view(t.dtype).reshape(t.shape)
        at += size

    def moved(t: Tensor) -> Tensor:
        return there.get(id(t), t)

    stages = [
        (
            kind,
            replace(
                s,
                seeds=moved(s.seeds),
                coefs=moved(s.coefs),
                shared=moved(s.shared),
                rounding_seed=None if s.rounding_seed is None else moved(s.rounding_seed),
            ),
        )
        for kind, s in chain.stages
    ]
    return replace(chain, stages=stages)
