"""Numbers of a pass on their way to a device: all that the host has goes in one transfer, which nothing waits for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from zokern.passes.spec import Chain, PassNumbers


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
        self._device = device
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
        """Its place on the device; or the tensor itself, which need not travel. What another device has comes over."""
        there = self._there.get(id(t), t)
        away = there.device != self._device and there.device.type != "cpu"
        return there.to(self._device, non_blocking=True) if away else there

    def moved(self, s: PassNumbers) -> PassNumbers:
        given = (s.seeds, s.coefs, s.shared, s.rounding_seed, s.enabled)
        there = [None if t is None else self[t] for t in given]
        return s if all(a is b for a, b in zip(there, given, strict=True)) else PassNumbers(*there)  # type: ignore[arg-type]

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


def on_host(numbers: PassNumbers) -> PassNumbers:
    """A pass' numbers in host memory, which waits for those that a device has; once, however many passes have them."""
    if "host" not in numbers.elsewhere:
        given = (numbers.seeds, numbers.coefs, numbers.shared, numbers.rounding_seed, numbers.enabled)
        numbers.elsewhere["host"] = PassNumbers(*(None if t is None else t.cpu() for t in given))  # type: ignore[arg-type]
    return numbers.elsewhere["host"]


def chain_on_host(chain: Chain) -> Chain:
    stages = [(spec, on_host(numbers)) for spec, numbers in chain.stages]
    return replace(chain, stages=stages, enabled=None if chain.enabled is None else chain.enabled.cpu())


def on_device(numbers: PassNumbers, device: torch.device, *, carried: bool = False) -> PassNumbers:
    """A pass' numbers on `device`. carried: one seed and rounding seeds that the host knows go with the launch and stay."""
    seeds = None if carried and numbers.seeds.numel() == 1 else numbers.seeds
    rounding = None if carried else numbers.rounding_seed
    parcel = Parcel((seeds, numbers.coefs, numbers.shared, rounding, numbers.enabled), device)
    parcel.send()
    return parcel.moved(numbers)


def chain_on_device(chain: Chain, device: torch.device, room: int = 0) -> tuple[Chain, Parcel]:
    """The chain with all of its numbers in a parcel to `device`, which is yet to be sent."""
    every = [t for _, n in chain.stages for t in (n.seeds, n.coefs, n.shared, n.rounding_seed)]
    parcel = Parcel([*every, chain.enabled], device, room)
    stages = [(spec, parcel.moved(replace(numbers, enabled=None))) for spec, numbers in chain.stages]
    return replace(chain, stages=stages, enabled=None if chain.enabled is None else parcel[chain.enabled]), parcel
