"""Runs passes over the active parameters and counts them: the only place where an optimizer touches memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from zokern import ops
from zokern.backends.scalars import Kind, Scalars
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


@dataclass(frozen=True)
class Numbers:
    """What a pass is told besides its members, as `Passes.run` takes it: for the passes of a chain."""

    seeds: Sequence[Seed]
    coefs: Mapping[str, Tensor]
    shared: Mapping[str, Tensor] | None = None
    rule: str = "axpy"
    rounding_seeds: tuple[int, int] | Tensor | None = None
    stochastic: bool = False
    square_of_sum: bool = False
    keep_second: bool = False

    def stacked(self) -> tuple[Tensor, Tensor]:
        """coefs [G, C, K] and shared [G, S], not yet rounded."""
        which = RULES[self.rule]
        coefs = torch.stack([self.coefs[name] for name in which.coefs], dim=1)
        shared = self.shared or {"decay": torch.ones(coefs.shape[0], dtype=torch.float64, device=coefs.device)}
        return coefs, torch.stack([shared[name] for name in which.scalars], dim=1)

    def how(self) -> dict[str, bool]:
        """For a listener."""
        return {
            "stochastic": self.stochastic,
            "rounded": self.rounding_seeds is not None,
            "square_of_sum": self.square_of_sum,
            "keep_second": self.keep_second,
        }


@dataclass
class Passes:
    distribution: str
    backend: str
    counters: Counters = field(default_factory=Counters)
    recorder: Listener | None = None
    gate: Tensor | None = None  # int32 [1] on the device: a zero there makes every pass write nothing

    def run(
        self,
        members: Sequence[Member],
        numbers: Numbers,
        *,
        out: Sequence[Tensor] | None = None,
        enabled: Tensor | None = None,
        counted: bool = True,
    ) -> None:
        """One pass over every member, whose row g of the coefficients and scalars is its own.

        The numbers are rounded to float32 here, once. counted False: a piece of a sweep that the caller counts.
        """
        if not members:
            return
        if self.gate is not None:
            enabled = self.gate if enabled is None else enabled * self.gate
        stacked, scalars = numbers.stacked()
        for device, at in _by_device(members).items():
            chosen = [members[i] for i in at]
            ops.launch(
                [m.param.detach() for m in chosen],
                None if out is None else [out[i] for i in at],
                states=[[m.states[name] for m in chosen] for name in RULES[numbers.rule].states],
                tensor_ids=[m.tensor_id for m in chosen],
                offsets=[0] * len(at),
                groups=[m.group for m in chosen],
                seeds=seed_tensor(numbers.seeds, device),
                coefs=_float32_near(stacked, device),
                shared=_float32_near(scalars, device),
                rounding_seed=_rounding_tensor(numbers),
                enabled=None if enabled is None else enabled.to(device, non_blocking=True),
                rule=numbers.rule,
                distribution=self.distribution,
                rounding="stochastic" if numbers.stochastic else "nearest",
                square_of_sum=numbers.square_of_sum,
                keep_second=numbers.keep_second,
                backend=self.backend,
            )
            self.counters.launches += len({m.param.dtype for m in chosen})
        if out is None:
            self._tell(numbers, stacked, scalars, enabled)
        self.counters.passes += counted
        self.counters.elements_moved += 2 * sum(m.param.numel() for m in members)

    def chain(
        self,
        members: Sequence[Member],
        stages: Sequence[Numbers],
        rule: str,
        *,
        probes: Sequence[Tensor | None] = (),
        enabled: Tensor | None = None,
    ) -> None:
        """Passes over the same members, one after another while an element is in registers: one sweep (ops.launch_chain).

        Each stage's rule is `rule` or the perturbation that goes with it. probes: the last stage, a perturbation, goes
        there instead, also where `enabled` leaves the others out.
        """
        stacked = [stage.stacked() for stage in stages]
        for device, at in _by_device(members).items():
            chosen = [members[i] for i in at]
            told = [
                (
                    Kind(
                        RULES[stage.rule],
                        self.distribution,
                        "stochastic" if stage.stochastic else "nearest",
                        stage.square_of_sum,
                        stage.keep_second,
                    ),
                    Scalars(
                        seed_tensor(stage.seeds, device),
                        _float32_near(coefs, device).contiguous(),
                        _float32_near(shared, device).contiguous(),
                        _rounding_tensor(stage),
                    ),
                )
                for stage, (coefs, shared) in zip(stages, stacked, strict=True)
            ]
            ops.launch_chain(
                [m.param.detach() for m in chosen],
                told,
                states=[[m.states[name] for m in chosen] for name in RULES[rule].states],
                tensor_ids=[m.tensor_id for m in chosen],
                offsets=[0] * len(at),
                groups=[m.group for m in chosen],
                rule=rule,
                probes=[probes[i] for i in at] if probes else (),
                enabled=None if enabled is None else enabled.to(device, non_blocking=True),
                backend=self.backend,
            )
            self.counters.launches += len({m.param.dtype for m in chosen})
        for stage, (coefs, shared) in zip(stages[:-1] if probes else stages, stacked, strict=False):
            self._tell(stage, coefs, shared, enabled)
        self.counters.passes += 1
        self.counters.elements_moved += 2 * sum(m.param.numel() for m in members)
        self.counters.elements_moved += sum(probe.numel() for probe in probes if probe is not None)

    def _tell(self, numbers: Numbers, coefs: Tensor, shared: Tensor, enabled: Tensor | None) -> None:
        if self.recorder is not None:
            coefs, shared = coefs.to(torch.float32), shared.to(torch.float32)
            self.recorder.add(numbers.rule, numbers.seeds, coefs, shared, enabled, numbers.how())


def _by_device(members: Sequence[Member]) -> dict[torch.device, list[int]]:
    found: dict[torch.device, list[int]] = {}
    for i, member in enumerate(members):
        found.setdefault(member.param.device, []).append(i)
    return found


def _rounding_tensor(numbers: Numbers) -> Tensor | None:
    if numbers.rounding_seeds is None or isinstance(numbers.rounding_seeds, Tensor):
        return numbers.rounding_seeds
    return torch.tensor(numbers.rounding_seeds, dtype=torch.int64)


def multiples(terms: Terms, seeds: Sequence[Seed], device: torch.device) -> Tensor:
    """The terms of `seeds`, in that order, float64 [K], on the device of those that are tensors or else on `device`."""
    values = [terms.get(seed, 0.0) for seed in seeds]
    device = next((v.device for v in values if isinstance(v, Tensor)), device)
    # Numbers are filled in, not made a tensor of: a copy from the host to a device could not be captured in a graph.
    return torch.stack(
        [
            v.to(device, torch.float64)
            if isinstance(v, Tensor)
            else torch.full((), v, dtype=torch.float64, device=device)
            for v in values
        ]
    )


def perturbation(eps: Tensor, terms: Terms, seeds: Sequence[Seed]) -> Tensor:
    """Coefficients [R, K] of a perturbation: each row's eps times the terms of `seeds`."""
    row = multiples(terms, seeds, eps.device)
    return eps.to(row.device, non_blocking=True)[:, None] * row


def seed_tensor(seeds: Sequence[Seed], device: torch.device) -> Tensor:
    """int64 [K]: on the host where it knows them all, else on `device`."""
    if not any(isinstance(seed, Tensor) for seed in seeds):
        return torch.tensor(seeds, dtype=torch.int64)
    return torch.stack([torch.as_tensor(seed, dtype=torch.int64).to(device, non_blocking=True) for seed in seeds])


def _float32_near(t: Tensor, device: torch.device) -> Tensor:
    """float32, on the host or on `device`: a host tensor stays there, one from another device is sent over."""
    t = t.to(torch.float32)
    return t if t.device.type == "cpu" or t.device == device else t.to(device, non_blocking=True)
