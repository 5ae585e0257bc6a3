"""Writes down what an optimizer does to the weights: every pass that changed them, as the pass read its numbers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from zokern.interrupts import HeldInterrupts
from zokern.journal import alike
from zokern.journal import format as journal
from zokern.journal.behind import LAG, Arrived, Behind, Entry
from zokern.journal.signatures import Directions, Signatures, floats
from zokern.optim import told
from zokern.optim.events import StepEvent
from zokern.passes.spec import PassNumbers, PassSpec
from zokern.passes.update import CPU

NAN = torch.tensor(float("nan"), dtype=torch.float32, device=CPU)


class Recorder:
    """Appends the record of each step that it is told of: at once where its numbers are on the host, else when they have
    come, in order. layout: the parameters' as the file has them. arrive: puts the file in its place.

    broken: the step whose record could not be written; nothing follows. following: the step that comes next. closed: the
    process ends.
    """

    def __init__(self, writer: journal.Writer, directions: Directions, layout: Any, lag: int | float = LAG) -> None:
        self.writer, self.layout = writer, layout
        self.signatures = Signatures(writer, directions)
        self.behind = Behind(lag)
        self.broken: int | None = None
        self.following: int | None = None
        self.closed = False
        self.arrive: Callable[[], None] | None = None
        self._lrs: tuple[tuple[float | Tensor, ...], Tensor] = (), NAN

    def know(self, signatures: Sequence[dict[str, Any]], frames: Sequence[journal.Frame]) -> None:
        """What the journal has where this one goes on: its first signatures, and each one's last numbers."""
        self.signatures.know(signatures, frames)

    def before_step(self) -> None:
        """Refuses, before anything is changed, a step whose record could not follow on the last one's."""
        if self.broken is not None:
            raise journal.JournalError(
                f"the record of step {self.broken} could not be written, so the journal ends before it and cannot go on; "
                "leave the block that writes it, and start another one"
            )

    def before_load(self, same: bool) -> None:
        """Refuses a load that no record could tell of: what follows would be replayed from other numbers."""
        if not same:
            raise journal.JournalError(
                "load_state_dict was called while a journal is written, which cannot tell of it, and its replay would end "
                "with other weights: load before the journal is begun, or leave the block that writes it; a run with "
                "states is taken up from its own journal with zokern.journal.resume"
            )

    def __call__(self, event: StepEvent) -> None:
        """A step that broke off before any pass leaves no record."""
        self.before_step()
        if self.following not in (None, event.step):  # nobody told of the one between
            self.flush()
            self.broken = self.following
            self.before_step()
        self._take(event, journal.STEP)
        self.following = event.step + (event.ok is not None)
        if event.ok is None:
            self.flush()

    def folded(self, event: StepEvent) -> None:
        """What waited was added to the weights, after the event's step."""
        self.before_step()
        self._take(event, journal.FOLD)

    def flush(self) -> None:
        """Writes all that is done; waits for the device. Nothing, where a record could not be written."""
        with HeldInterrupts():
            while len(self.behind) and self.broken is None:
                self._ask(functools.partial(self.behind.take, wait=True))

    def give_up(self) -> None:
        """What has not been written never will be."""
        self.behind.clear()

    def _take(self, event: StepEvent, kind: int) -> None:
        if not len(self.behind) and told.is_here(event):
            self._write_whole(event, kind)
            return
        self.behind.put(event, kind)
        self._ask(functools.partial(self.behind.take, wait=False))
        while self.behind.late() and self.broken is None:
            self._ask(self.behind.wait)

    def _ask(self, what: Callable[[Callable[[Arrived], None]], None]) -> None:
        """Has what has come written."""
        first = self.behind.first
        try:
            what(self._write_arrived)
        except Warning:  # that is an error: everything has been written
            raise
        except BaseException:
            if self.broken is None and first is not None:  # what failed was the device, or the copy
                self.broken = (self.behind.first or first).event.step
            raise

    def _write_arrived(self, arrived: Arrived) -> None:
        for run in alike.runs(arrived, self.layout):
            found = alike.alike(arrived, run)
            if found is not None and self._write_alike(arrived.entries[run.i : run.j], found):
                continue
            for i in range(run.i, run.j):
                event, kind, _ = arrived.entries[i]
                self._write_whole(told.with_tensors(event, arrived.together.tensors(i, arrived.vectors)), kind)

    def _write_alike(self, entries: Sequence[Entry], found: alike.Alike) -> bool:
        """All of their records in one go, or nothing of them; False where they have no signature yet, or several."""
        frames, signatures = found.frames, self.signatures
        seeds = [drawn.tolist() for drawn in found.seeds]
        numbers = {
            signatures.known(entry.event, entry.event.passes, [drawn[i] for drawn in seeds], frames.shape[1])
            for i, entry in enumerate(entries)
        }
        number = numbers.pop()
        if numbers or number is None:
            return False
        self.broken = entries[0].event.step
        self.writer.append_all(alike.bodies(number, frames, signatures.frames[number]))
        signatures.frames[number] = frames[-1]
        self.broken = None
        self._arrived()
        return True

    def _arrived(self) -> None:
        """A step is in the file."""
        if self.arrive is not None:
            self.arrive()
            self.arrive = None

    def _write_whole(self, event: StepEvent, kind: int) -> None:
        """All of a record, or nothing of it."""
        self.broken, at, crc = event.step, self.writer.at, self.writer.crc
        try:
            self._write(event, kind)
        except BaseException:
            self._cut(at)
            self.writer.at, self.writer.crc = at, crc
            raise
        self.broken = None
        if event.ok is not None:
            self._arrived()

    def _cut(self, end: int) -> None:
        """Takes off what was written of a step, so that the file ends with the last whole one."""
        with contextlib.suppress(OSError, ValueError):  # a file that cannot be written at all
            self.writer.file.seek(end)
            self.writer.file.truncate()

    def _write(self, event: StepEvent, kind: int) -> None:
        done = [(spec, told) for spec, told in event.passes if told.enabled is None or int(told.enabled)]
        if event.rows is not None:
            done = [(spec, _of_rows(told, event.rows)) for spec, told in done]
        fold = kind == journal.FOLD
        broken_off = event.ok is None and not fold
        if broken_off and not done:
            return
        flags = 0 if fold else journal.BROKEN_OFF if event.ok is None else 0 if bool(event.ok) else journal.SKIPPED
        if not fold and event.layout is not self.layout:
            if event.layout != self.layout:
                self.writer.append_json(journal.LAYOUT, event.layout)
            self.layout = event.layout
        frame = self._frame(event, done)
        signatures = self.signatures
        seeds = [told.seeds.tolist() for _, told in done]
        number = signatures.number(event, done, seeds, len(frame))
        self.writer.append(journal.encode_step(number, flags, frame, signatures.frames[number], kind))
        signatures.frames[number] = frame

    def _frame(self, event: StepEvent, done: Sequence[tuple[PassSpec, PassNumbers]]) -> journal.Frame:
        values = [x for _, numbers in done for x in (numbers.coefs, numbers.shared)]
        if event.memory:
            values.append(torch.tensor(floats(event.memory), dtype=torch.float64, device=CPU).view(torch.float32))
        if event.lrs != self._lrs[0] or not all(type(lr) is float for lr in event.lrs):
            self._lrs = event.lrs, torch.tensor(floats(event.lrs), dtype=torch.float32, device=CPU)
        values += (self._lrs[1], NAN if event.loss is None else event.loss)
        if not all(x.dtype is torch.float32 and x.is_cpu for x in values):
            values = [x.to(CPU, torch.float32) for x in values]
        frame: journal.Frame = _flatten_dense_tensors(values).numpy()
        return frame


def _of_rows(told: PassNumbers, rows: tuple[int, ...]) -> PassNumbers:
    return replace(told, coefs=told.coefs[list(rows)], shared=told.shared[list(rows)], elsewhere={})
