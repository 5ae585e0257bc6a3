"""Runs passes over the active parameters and counts them: the only place where an optimizer touches memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zokern import ops


@dataclass(frozen=True)
class Member:
    """An active parameter: its tensor id, its parameter group, and its name for messages."""

    param: Tensor
    tensor_id: int
    group: int
    name: str


@dataclass
class Counters:
    """What a run has done so far. A pass is one sweep over the active parameters, however many dtypes or devices."""

    steps: int = 0
    forwards: int = 0
    passes: int = 0
    launches: int = 0
    elements_moved: int = 0  # read or written: in place or not, two for each element of a pass


@dataclass
class Passes:
    distribution: str
    backend: str
    counters: Counters = field(default_factory=Counters)

    def run(
        self,
        members: Sequence[Member],
        seeds: Sequence[int],
        coefs: Tensor,
        *,
        decays: Tensor | None = None,
        out: Sequence[Tensor] | None = None,
        rounding_seed: int | None = None,
        enabled: Tensor | None = None,
    ) -> None:
        """dst <- round(decays[g]*param + sum_k coefs[g, k] z(seeds[k])) for every member, g its group.

        coefs [G, K] and decays [G] are rounded to float32 here, once. rounding_seed None means rounding to nearest.
        """
        if not members:
            return
        if decays is None:
            decays = torch.ones(coefs.shape[0], dtype=torch.float64)
        by_device: dict[torch.device, list[int]] = {}
        for i, member in enumerate(members):
            by_device.setdefault(member.param.device, []).append(i)
        for device, at in by_device.items():
            chosen = [members[i] for i in at]
            ops.launch(
                [m.param.detach() for m in chosen],
                None if out is None else [out[i] for i in at],
                tensor_ids=[m.tensor_id for m in chosen],
                offsets=[0] * len(at),
                groups=[m.group for m in chosen],
                seeds=torch.tensor(list(seeds), dtype=torch.int64),
                coefs=_float32_near(coefs, device),
                decays=_float32_near(decays, device),
                rounding_seed=None if rounding_seed is None else torch.tensor([rounding_seed], dtype=torch.int64),
                enabled=None if enabled is None else enabled.to(device, non_blocking=True),
                distribution=self.distribution,
                rounding="nearest" if rounding_seed is None else "stochastic",
                backend=self.backend,
            )
            self.counters.launches += len({m.param.dtype for m in chosen})
        self.counters.passes += 1
        self.counters.elements_moved += 2 * sum(m.param.numel() for m in members)


def _float32_near(t: Tensor, device: torch.device) -> Tensor:
    """float32, on the host or on `device`: a host tensor stays there, one from another device is sent over."""
    t = t.to(torch.float32)
    return t if t.device.type == "cpu" or t.device == device else t.to(device, non_blocking=True)
