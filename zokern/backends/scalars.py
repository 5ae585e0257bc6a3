"""What a pass, or a chain of passes, is told besides its tensors: a few numbers, as tensors in host or device memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zokern.contract.rules import RULES, Rule

MAX_STAGES, MAX_CHAIN_SEEDS = 32, 128  # csrc/pass.h
MAX_PASS_SEEDS = ((1 << 31) - 1) // 3  # kernels count coefficients, up to three a seed, in 32 bits


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


def _padded(t: Tensor) -> int:
    """Bytes to the next 16-byte boundary: Triton compiles a kernel anew for addresses that are not on one."""
    return -(-t.nbytes // 16) * 16


class Parcel:
    """Tensors for a device: those that the host has go there together, in one transfer that nothing waits for.

    Their places on the device are known before it is sent, so that a table of addresses can go along: `room` bytes of it.
    For the host there is nothing to do.
    """

    def __init__(self, tensors: Iterable[Tensor | None], device: torch.device, room: int = 0) -> None:
        given = [t for t in tensors if t is not None and t.device.type == "cpu"]
        self._host = {} if device.type == "cpu" else {id(t): t.detach().contiguous() for t in given}
        self._there: dict[int, Tensor] = {}
        self._buffer: Tensor | None = None
        if self._host or (room and device.type != "cpu"):
            self._size = sum(map(_padded, self._host.values()))
            self._buffer = torch.empty(self._size + room, dtype=torch.uint8, device=device)
            as_dtype = {t.dtype: self._buffer.view(t.dtype) for t in self._host.values()}
            at = 0
            for key, t in self._host.items():
                self._there[key] = as_dtype[t.dtype].as_strided(t.shape, t.stride(), at // t.itemsize)
                at += _padded(t)

    def __getitem__(self, t: Tensor) -> Tensor:
        """Its place on the device; or the tensor itself, which need not travel."""
        return self._there.get(id(t), t)

    def moved(self, scalars: Scalars) -> Scalars:
        if not self._there:
            return scalars
        s = scalars
        rounding, enabled = (None if t is None else self[t] for t in (s.rounding_seed, s.enabled))
        return Scalars(self[s.seeds], self[s.coefs], self[s.shared], rounding, enabled)

    def send(self, table: Tensor | None = None) -> Tensor | None:
        """Everything, and `table` in the room that was kept for it; returns it as it is on the device."""
        if self._buffer is None:
            return table
        packed = bytearray().join(t.numpy().tobytes().ljust(_padded(t), b"\0") for t in self._host.values())
        if table is not None:
            packed += table.numpy().tobytes()
        if packed:
            self._buffer.copy_(torch.frombuffer(packed, dtype=torch.uint8).pin_memory(), non_blocking=True)
        return None if table is None else self._buffer[self._size :].view(table.dtype).view(table.shape)


def on_device(scalars: Scalars, device: torch.device, *, carried: bool = False) -> Scalars:
    """A pass' numbers on `device`. carried: one seed and rounding seeds that the host knows go with the launch and stay."""
    seeds = None if carried and scalars.seeds.numel() == 1 else scalars.seeds
    rounding = None if carried else scalars.rounding_seed
    parcel = Parcel((seeds, scalars.coefs, scalars.shared, rounding, scalars.enabled), device)
    parcel.send()
    return parcel.moved(scalars)


def chain_on_device(chain: Chain, device: torch.device, room: int = 0) -> tuple[Chain, Parcel]:
    """The chain with all of its numbers in a parcel to `device`, which is yet to be sent."""
    every = [t for _, s in chain.stages for t in (s.seeds, s.coefs, s.shared, s.rounding_seed)]
    parcel = Parcel([*every, chain.enabled], device, room)
    stages = [(kind, parcel.moved(replace(scalars, enabled=None))) for kind, scalars in chain.stages]
    return replace(chain, stages=stages, enabled=None if chain.enabled is None else parcel[chain.enabled]), parcel
