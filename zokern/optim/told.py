"""The numbers of a StepEvent that are on a device, in one row of float32: as the event has them, and back on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zokern.optim.events import StepEvent

WIDE = (torch.int64, torch.float64)  # two of a row's floats each, bit for bit, and before the others: aligned
Row = npt.NDArray[np.float32]


def is_far(t: Tensor) -> bool:
    """Whether the host would wait for its value."""
    return not t.is_cpu


def now(number: float | Tensor) -> float | Tensor:
    """A group's, as it is at this step: a scheduler changes a device's in place."""
    if isinstance(number, Tensor) and is_far(number):
        return number.detach().reshape(()).to(torch.float32, copy=True)
    return float(number)


def tensors(event: StepEvent, wanted: Callable[[Tensor], bool]) -> list[Tensor]:
    """Those that are wanted, in the order in which `with_tensors` asks for them."""
    found: list[Any] = [event.ok, event.loss, *event.lrs, *event.memory]
    for _, told in event.passes:
        found += (told.seeds, told.coefs, told.shared, told.enabled)
    return [t for t in found if isinstance(t, Tensor) and wanted(t)]


def with_tensors(event: StepEvent, taken: Sequence[Tensor], wanted: Callable[[Tensor], bool]) -> StepEvent:
    """The event with `taken` in the places of `tensors(event, wanted)`."""
    rest = iter(taken)

    def of(t: Any) -> Any:
        return next(rest) if isinstance(t, Tensor) and wanted(t) else t

    ok, loss, lrs, memory = of(event.ok), of(event.loss), tuple(map(of, event.lrs)), tuple(map(of, event.memory))
    passes = []
    for spec, told in event.passes:
        seeds, coefs, shared, enabled = map(of, (told.seeds, told.coefs, told.shared, told.enabled))
        own = replace(told, seeds=seeds, coefs=coefs, shared=shared, enabled=enabled, elsewhere={})
        passes.append((spec, own))
    return replace(event, ok=ok, loss=loss, lrs=lrs, memory=memory, passes=tuple(passes), row=None)


def is_here(event: StepEvent) -> bool:
    """Whether the host has all of its numbers."""
    for _, told in event.passes:
        if not (told.coefs.is_cpu and told.shared.is_cpu and told.seeds.is_cpu):
            return False
        if told.enabled is not None and not told.enabled.is_cpu:
            return False
    return not any(isinstance(t, Tensor) and is_far(t) for t in (event.ok, event.loss, *event.lrs, *event.memory))


def row_of(event: StepEvent) -> list[Tensor]:
    """What torch.cat makes the event's row of; nothing where all of it is on the host."""
    if event.row is not None:
        return [event.row] if is_far(event.row) else []
    return packed(tensors(event, is_far))


def on_the_host(event: StepEvent, row: Tensor) -> StepEvent:
    """The event with the numbers of its row, float32, as it has come from the device."""
    there = None if event.row is None else event.row.device
    wanted = is_far if there is None else (lambda t: t.device == there)
    return with_tensors(event, unpacked(tensors(event, wanted), row), wanted)


def packed(every: Sequence[Tensor]) -> list[Tensor]:
    """What a row is put together from with torch.cat."""
    wide = [t.reshape(-1).view(torch.float32) for t in every if t.dtype in WIDE]
    return wide + [t.reshape(-1).to(torch.float32) for t in every if t.dtype not in WIDE]


def unpacked(every: Sequence[Tensor], row: Tensor) -> list[Tensor]:
    """Views of a row, float32 [width], in the places of the tensors that it was packed from; those that were neither wide
    nor float32 as float32."""
    return [
        (part.view(t.dtype) if t.dtype in WIDE else part).view(t.shape)
        for t, part in zip(every, _parts(every, row), strict=True)
    ]


def _parts(every: Sequence[Tensor], row: Tensor) -> Iterator[Tensor]:
    wide, narrow = 0, sum(2 * t.numel() for t in every if t.dtype in WIDE)
    for t in every:
        if t.dtype in WIDE:
            yield row[wide : wide + 2 * t.numel()]
            wide += 2 * t.numel()
        else:
            yield row[narrow : narrow + t.numel()]
            narrow += t.numel()
