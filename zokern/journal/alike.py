"""Records of several steps at once, where they are alike: the same passes, numbers in the same places, all of them done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from zokern.journal import format as journal
from zokern.journal.behind import Arrived
from zokern.optim.events import StepEvent
from zokern.optim.told import Numbers, Place

Frames = npt.NDArray[np.float32]  # [n, F]


class Run(NamedTuple):
    """Steps i to j of those that have arrived."""

    i: int
    j: int


class Alike(NamedTuple):
    """Of a run: a frame for each step, and the seeds of each pass, int64 [n, K]."""

    frames: Frames
    seeds: list[npt.NDArray[np.int64]]


def runs(arrived: Arrived, layout: Any) -> Iterator[Run]:
    """All steps, in order, those that may be alike together."""
    entries, i = arrived.entries, 0
    for j in range(1, len(entries) + 1):
        if j == len(entries) or not _may_join(arrived, i, j, layout):
            yield Run(i, j)
            i = j


def _may_join(arrived: Arrived, i: int, j: int, layout: Any) -> bool:
    a, b = arrived.entries[i], arrived.entries[j]
    one, other = a.event, b.event
    return (
        a.kind == b.kind == journal.STEP
        and one.layout is other.layout is layout
        and one.deferred == other.deferred
        and len(one.passes) == len(other.passes)
        and all(p is q or p == q for (p, _), (q, _) in zip(one.passes, other.passes, strict=True))
        and list(map(type, one.lrs + one.memory)) == list(map(type, other.lrs + other.memory))
        and len(one.lrs) == len(other.lrs)
        and arrived.together.places[i] == arrived.together.places[j]
    )


def alike(arrived: Arrived, run: Run) -> Alike | None:
    """None for a single step, and where one of them was skipped, broke off or left a pass out."""
    i, j = run
    events = [entry.event for entry in arrived.entries[i:j]]
    if j - i < 2 or any(event.ok is None or event.loss is None for event in events):
        return None
    together, count = arrived.together, j - i
    rest = iter(together.places[i])
    sizes = together.sizes(i)

    def table() -> Numbers:
        """Of the next tensor, [n, count]."""
        place: Place = next(rest)
        start = together.starts[i].get(place.vector, 0)
        size = sizes[place.vector]
        whole = arrived.vectors[place.vector][start : start + count * size].reshape(count, size)
        return whole[:, place.start : place.start + place.size]

    ok, loss = table(), table()
    lrs = _columns(events, "lrs", np.float32, table)
    memory = _columns(events, "memory", np.float64, table)
    columns, seeds, done = list[Numbers](), [], bool(ok.all())
    for _, told in events[0].passes:
        drawn = np.ascontiguousarray(table())
        seeds.append(drawn.view(np.int64))  # of a row they are pairs of floats
        columns += (table(), table())
        if told.enabled is not None:
            done = bool(table().all()) and done
    if not done:
        return None
    return Alike(np.concatenate([*columns, *memory, *lrs, loss], axis=1, dtype=np.float32), seeds)


def _columns(events: Sequence[StepEvent], name: str, dtype: Any, table: Any) -> list[Frames]:
    """Of the groups' rates, or of what a method remembers: each as the frame has it, [n, 1] or, float64, [n, 2]."""
    made = []
    for k, value in enumerate(getattr(events[0], name)):
        if isinstance(value, Tensor):
            column = np.ascontiguousarray(table())
        else:
            column = np.array([[getattr(event, name)[k]] for event in events], dtype)
        made.append(column.view(np.float32) if dtype is np.float64 else column.astype(np.float32))
    return made


def bodies(number: int, frames: Frames, last: journal.Frame) -> list[bytes]:
    """Of the steps' records, all of one signature, whose last frame is `last`: what encode_step makes, one by one."""
    bits = np.concatenate([last[None], frames]).view(np.uint32)
    changed = bits[1:] != bits[:-1]
    masks = np.packbits(changed, axis=1, bitorder="little")
    values, ends = frames[changed].astype("<f4").tobytes(), 4 * np.cumsum(changed.sum(axis=1))
    head, starts = bytes([journal.STEP]) + journal.varint(number), [0, *ends[:-1].tolist()]
    return [
        head + mask.tobytes() + values[start:end] for mask, start, end in zip(masks, starts, ends.tolist(), strict=True)
    ]
