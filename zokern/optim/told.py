"""The numbers of events, together on their way from a device to the host: which tensors an event has, and where they go.

Tensors of one type, of several events, are one vector; those of a device make one copy. A captured step has put all of its
tensors into one row already, which is then one of the vectors' parts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from zokern.optim.events import StepEvent

WIDE = (torch.int64, torch.float64)  # two of a row's floats each, bit for bit
Numbers = npt.NDArray[Any]


class Vector(NamedTuple):
    """Which of the vectors: of tensors on a device or not, and of this type; or of rows of captured steps."""

    far: bool
    dtype: torch.dtype
    rows: bool = False


class Place(NamedTuple):
    """Of a tensor: from `start` on, in the part of the vector that its event has, `size` of the vector's numbers."""

    vector: Vector
    start: int
    size: int


def is_far(t: Tensor) -> bool:
    """Whether the host would wait for its value."""
    return not t.is_cpu


def now(number: float | Tensor) -> float | Tensor:
    """A group's, as it is at this step: a scheduler changes a device's in place."""
    if isinstance(number, Tensor) and is_far(number):
        return number.detach().reshape(()).to(torch.float32, copy=True)
    return float(number)


def tensors(event: StepEvent) -> list[Tensor]:
    """All of them, in the order in which `with_tensors` puts them back."""
    found: list[Any] = [event.ok, event.loss, *event.lrs, *event.memory]
    for _, told in event.passes:
        found += (told.seeds, told.coefs, told.shared, told.enabled)
    return [t for t in found if isinstance(t, Tensor)]


def with_tensors(event: StepEvent, taken: Iterable[Tensor]) -> StepEvent:
    """The event with `taken` in the places of `tensors(event)`."""
    rest = iter(taken)

    def of(t: Any) -> Any:
        return next(rest) if isinstance(t, Tensor) else t

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


def row(every: Sequence[Tensor], more: Sequence[Tensor], device: torch.device) -> Tensor:
    """Those on `device` as one row, float32, wide ones first, then `more`. A captured step makes it."""
    own = [t for t in every if t.device == device]
    parts = [t.reshape(-1).view(torch.float32) for t in own if t.dtype in WIDE]
    parts += [t.reshape(-1).to(torch.float32) for t in (*(t for t in own if t.dtype not in WIDE), *more)]
    return torch.cat(parts)


# ------------------------------------------------------------------------------------------------------- several together


def places(event: StepEvent, every: Sequence[Tensor]) -> tuple[Place, ...]:
    """Of an event's tensors: those of events with equal ones are at the same distances."""
    if event.row is None:
        return _places(tuple([(t.dtype, is_far(t), t.numel(), False) for t in every]))
    device = event.row.device
    return _places(tuple([(t.dtype, is_far(t), t.numel(), t.device == device) for t in every]))


@functools.lru_cache(maxsize=64)  # one for each kind of step
def _places(kinds: tuple[tuple[torch.dtype, bool, int, bool], ...]) -> tuple[Place, ...]:
    """The last says whether it is in the event's row."""
    ends: dict[Vector, int] = {}
    found = []
    wide, narrow = 0, sum(2 * size for dtype, _, size, inside in kinds if inside and dtype in WIDE)
    for dtype, far, size, inside in kinds:
        if inside and dtype in WIDE:
            found.append(Place(Vector(far, torch.float32, True), wide, 2 * size))
            wide += 2 * size
        elif inside:
            found.append(Place(Vector(far, torch.float32, True), narrow, size))
            narrow += size
        else:
            vector = Vector(far, dtype)
            start = ends.get(vector, 0)
            ends[vector] = start + size
            found.append(Place(vector, start, size))
    return tuple(found)


class Together:
    """The tensors of some events, as vectors."""

    def __init__(self, events: Sequence[StepEvent]) -> None:
        self.every = list(map(tensors, events))
        self.places = [places(event, every) for event, every in zip(events, self.every, strict=True)]
        self.parts: dict[Vector, list[Tensor]] = {}
        self.starts: list[dict[Vector, int]] = []  # of each event's part
        self.ends: dict[Vector, int] = {}
        for event, every, where in zip(events, self.every, self.places, strict=True):
            self.starts.append(dict(self.ends))
            own: dict[Vector, int] = {}
            if event.row is not None:
                vector = Vector(is_far(event.row), torch.float32, True)
                self.parts.setdefault(vector, []).append(event.row)
                own[vector] = len(event.row)
            for t, (vector, start, size) in zip(every, where, strict=True):
                if not vector.rows:
                    if vector not in self.parts:
                        self.parts[vector] = []
                    self.parts[vector].append(t)
                    own[vector] = start + size
            for vector, size in own.items():
                self.ends[vector] = self.ends.get(vector, 0) + size

    def far(self) -> Tensor | None:
        """All that is on a device, as one tensor there, float32."""
        made = []
        for vector, parts in self.parts.items():
            if vector.far:
                flat = _flatten_dense_tensors(parts)
                made.append(flat.view(torch.float32) if vector.dtype in WIDE else flat.to(torch.float32))
        devices = {t.device for t in made}
        if len(devices) > 1:
            made = [t.to(made[0].device, non_blocking=True) for t in made]
        return torch.cat(made) if made else None

    def vectors(self, far: Tensor | None) -> dict[Vector, Numbers]:
        """By name, on the host; far: what `far` gave, as it has come."""
        made, at = {}, 0
        for vector, parts in self.parts.items():
            if not vector.far:
                made[vector] = _flatten_dense_tensors(parts).numpy()
                continue
            assert far is not None
            end = at + self.ends[vector] * (2 if vector.dtype in WIDE else 1)
            part = far[at:end]
            made[vector] = (part.clone().view(vector.dtype) if vector.dtype in WIDE else part).numpy()
            at = end
        return made

    def sizes(self, i: int) -> dict[Vector, int]:
        """Of event i's part of each vector."""
        after = self.starts[i + 1] if i + 1 < len(self.starts) else self.ends
        return {vector: end - self.starts[i].get(vector, 0) for vector, end in after.items()}

    def tensors(self, i: int, vectors: dict[Vector, Numbers]) -> Iterator[Tensor]:
        """Those of event i, on the host, of their types where these are wide or float32."""
        for t, place in zip(self.every[i], self.places[i], strict=True):
            start = self.starts[i].get(place.vector, 0) + place.start
            part = torch.from_numpy(vectors[place.vector][start : start + place.size].copy())
            yield (part.view(t.dtype) if place.vector.rows and t.dtype in WIDE else part).view(t.shape)
