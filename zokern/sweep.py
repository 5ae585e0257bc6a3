"""Runs passes over the active parameters and counts them: the only place where an optimizer touches memory."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from zokern import backends, ops
from zokern.backends.scalars import Kind, Scalars
from zokern.contract.rules import RULES

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
    _near: dict[object, Scalars] = field(default_factory=dict, repr=False, compare=False)

    @functools.cached_property
    def rounded(self) -> tuple[Tensor, Tensor]:
        """coefs [G, C, K] and shared [G, S] as a pass reads them: rounded to float32, once."""
        which = RULES[self.rule]
        coefs = torch.stack([self.coefs[name] for name in which.coefs], dim=1)
        shared = self.shared or {"decay": torch.ones(coefs.shape[0], dtype=torch.float64, device=coefs.device)}
        scalars = torch.stack([shared[name] for name in which.scalars], dim=1)
        return coefs.to(torch.float32).contiguous(), scalars.to(torch.float32).contiguous()

    def near(self, device: torch.device, backend: ModuleType | None = None) -> Scalars:
        """All of it for tensors on `device`: what another device has is sent over, what the host has stays there.

        backend: everything is where its passes read it, for all passes with these numbers.
        """
        key = device, backend
        if key not in self._near:
            if backend is None:
                coefs, shared = self.rounded
                rounding = self.rounding_seeds
                if isinstance(rounding, tuple):
                    rounding = torch.tensor(rounding, dtype=torch.int64)
                self._near[key] = Scalars(
                    seed_tensor(self.seeds, device),
                    _sent_between_devices(coefs, device),
                    _sent_between_devices(shared, device),
                    rounding,
                )
            else:
                self._near[key] = backend.near(self.near(device), device)
        return self._near[key]

    def how(self) -> dict[str, bool]:
        """For a listener."""
        return {
            "stochastic": self.stochastic,
            "rounded": self.rounding_seeds is not None,
            "square_of_sum": self.square_of_sum,
            "keep_second": self.keep_second,
        }


class _Part(NamedTuple):
    """The members of a sweep that are on one device, as ops.launch takes them."""

    device: torch.device
    backend: ModuleType
    at: list[int]
    src: list[Tensor]
    tensor_ids: list[int]
    offsets: list[int]
    groups: list[int]
    launches: int


class _Lists(NamedTuple):
    """What else a part's launch takes of one kind: with these states, to these copies or probes."""

    part: _Part
    out: list[Tensor] | None
    states: list[list[Tensor]]
    probes: list[Tensor | None]
    prepared: ops.Prepared


class _Sweep:
    """Members, sorted out once, and the lists for each kind of pass over them."""

    def __init__(self, members: Sequence[Member], backend: str) -> None:
        by_device: dict[torch.device, list[int]] = {}
        for i, member in enumerate(members):
            by_device.setdefault(member.param.device, []).append(i)
        self.members = members
        self.parts = [
            _Part(
                device,
                backends.choose(backend, device),
                at,
                [members[i].param.detach() for i in at],
                [members[i].tensor_id for i in at],
                [0] * len(at),
                [members[i].group for i in at],
                len({members[i].param.dtype for i in at}),
            )
            for device, at in by_device.items()
        ]
        self.numel = sum(t.numel() for part in self.parts for t in part.src)
        self._kinds: dict[object, tuple[object, list[_Lists]]] = {}

    def lists(
        self, states: Sequence[str], out: Sequence[Tensor] | None = None, probes: Sequence[Tensor | None] = ()
    ) -> list[_Lists]:
        """For each part. `out` and `probes` are held, so their ids mean no other lists."""
        key = tuple(states), id(out), id(probes)
        if key not in self._kinds:
            made = [
                _Lists(
                    part,
                    None if out is None else [out[i].detach() for i in part.at],
                    [[self.members[i].states[name] for i in part.at] for name in states],
                    [probes[i] for i in part.at] if probes else [],
                    ops.Prepared(),
                )
                for part in self.parts
            ]
            self._kinds[key] = (out, probes), made
        return self._kinds[key][1]


@dataclass
class Passes:
    distribution: str
    backend: str
    counters: Counters = field(default_factory=Counters)
    recorder: Listener | None = None
    gate: Tensor | None = None  # int32 [1] on the device: a zero there makes every pass write nothing
    _sweeps: dict[int, _Sweep] = field(default_factory=dict, repr=False)  # by the id of the list of members

    def forget(self) -> None:
        """At a step's end: lists of members are looked at anew, and tensors are held no longer."""
        self._sweeps.clear()

    def _sweep(self, members: Sequence[Member]) -> _Sweep:
        """A step sweeps over the same few lists again and again. Each holds its list, so an id means no other one."""
        if id(members) not in self._sweeps:
            self._sweeps[id(members)] = _Sweep(members, self.backend)
        return self._sweeps[id(members)]

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

        The numbers are rounded to float32 here, once. counted False: a piece of a sweep that the caller counts. The lists
        and what is in them stay as they are until `forget`: addresses are asked for once.
        """
        if not members:
            return
        if self.gate is not None:
            enabled = self.gate if enabled is None else enabled * self.gate
        sweep = self._sweep(members)
        for part, dst, states, _, prepared in sweep.lists(RULES[numbers.rule].states, out):
            flag = None if enabled is None else _sent_between_devices(enabled, part.device)
            # A flag that the host has goes with the numbers, in one transfer.
            alone = flag is None or flag.device == part.device
            scalars = numbers.near(part.device, part.backend if alone else None)
            ops.launch(
                part.src,
                dst,
                states=states,
                tensor_ids=part.tensor_ids,
                offsets=part.offsets,
                groups=part.groups,
                seeds=scalars.seeds,
                coefs=scalars.coefs,
                shared=scalars.shared,
                rounding_seed=scalars.rounding_seed,
                enabled=flag,
                rule=numbers.rule,
                distribution=self.distribution,
                rounding="stochastic" if numbers.stochastic else "nearest",
                square_of_sum=numbers.square_of_sum,
                keep_second=numbers.keep_second,
                backend=self.backend,
                prepared=prepared,
            )
            self.counters.launches += part.launches
        if out is None:
            self._tell(numbers, enabled)
        self.counters.passes += counted
        self.counters.elements_moved += 2 * sweep.numel

    def chain(
        self,
        members: Sequence[Member],
        stages: Sequence[Numbers],
        rule: str,
        *,
        probes: Sequence[Tensor | None] = (),
        enabled: Tensor | None = None,
    ) -> None:
        """Passes over the same members, one after another while an element is at hand: one sweep (ops.launch_chain).

        Each stage's rule is `rule` or the perturbation that goes with it. probes: the last stage, a perturbation, goes
        there instead, also where `enabled` leaves the others out. Lists stay as they are, as for `run`.
        """
        sweep = self._sweep(members)
        for part, _, states, targets, prepared in sweep.lists(RULES[rule].states, probes=probes):
            told = [
                (
                    Kind(
                        RULES[stage.rule],
                        self.distribution,
                        "stochastic" if stage.stochastic else "nearest",
                        stage.square_of_sum,
                        stage.keep_second,
                    ),
                    stage.near(part.device),
                )
                for stage in stages
            ]
            ops.launch_chain(
                part.src,
                told,
                states=states,
                tensor_ids=part.tensor_ids,
                offsets=part.offsets,
                groups=part.groups,
                rule=rule,
                probes=targets,
                enabled=None if enabled is None else _sent_between_devices(enabled, part.device),
                backend=self.backend,
                prepared=prepared,
            )
            self.counters.launches += part.launches
        for stage in stages[:-1] if probes else stages:
            self._tell(stage, enabled)
        self.counters.passes += 1
        self.counters.elements_moved += 2 * sweep.numel
        self.counters.elements_moved += sum(probe.numel() for probe in probes if probe is not None)

    def _tell(self, numbers: Numbers, enabled: Tensor | None) -> None:
        if self.recorder is not None:
            self.recorder.add(numbers.rule, numbers.seeds, *numbers.rounded, enabled, numbers.how())


def multiples(terms: Terms, seeds: Sequence[Seed], device: torch.device) -> Tensor:
    """The terms of `seeds`, in that order, float64 [K], on the device of those that are tensors or else on `device`."""
    values = [terms.get(seed, 0.0) for seed in seeds]
    device = next((v.device for v in values if isinstance(v, Tensor)), device)
    # Numbers are filled in, not made a tensor of: a copy from the host to a device could not be captured in a graph.
    return torch.stack(
        [
            sent(v, device).to(torch.float64)
            if isinstance(v, Tensor)
            else torch.full((), v, dtype=torch.float64, device=device)
            for v in values
        ]
    )


def perturbation(eps: Tensor, terms: Terms, seeds: Sequence[Seed]) -> Tensor:
    """Coefficients [R, K] of a perturbation: each row's eps times the terms of `seeds`."""
    row = multiples(terms, seeds, eps.device)
    return sent(eps, row.device)[:, None] * row


def seed_tensor(seeds: Sequence[Seed], device: torch.device) -> Tensor:
    """int64 [K]: on the host where it knows them all, else on `device`."""
    if not any(isinstance(seed, Tensor) for seed in seeds):
        return torch.tensor(seeds, dtype=torch.int64)
    # Filled in, as in `multiples`.
    return torch.stack(
        [
            sent(seed, device) if isinstance(seed, Tensor) else torch.full((), seed, dtype=torch.int64, device=device)
            for seed in seeds
        ]
    )


def sent(t: Tensor, device: torch.device) -> Tensor:
    """t on `device`: nothing waits on the way to a device, but a copy for the host is read there at once."""
    return t.to(device, non_blocking=device.type != "cpu")


def _sent_between_devices(t: Tensor, device: torch.device) -> Tensor:
    """What the host has stays there: a backend sends all of it in one transfer."""
    return t if t.device.type == "cpu" else sent(t, device)
