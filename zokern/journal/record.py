"""Writes down what an optimizer does to the weights: every pass that changed them, as the pass read its numbers."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from zokern.contract.streams import derive_seed
from zokern.journal import format as journal
from zokern.optim.events import StepEvent
from zokern.passes.spec import PassNumbers, PassSpec

SEARCHED_STEPS = 1 << 10


@dataclass
class Recorder:
    """Appends the record of each step that it is told of. Waits for the device: the numbers have to be on the host."""

    writer: journal.Writer
    run_seed: int
    layout: Any
    numbers: dict[str, int] = field(default_factory=dict)  # of signatures, by their JSON
    frames: list[journal.Frame] = field(default_factory=list)
    known: dict[int, tuple[int, int]] = field(default_factory=dict)  # seed -> step and direction
    broken: int | None = None  # the step whose record could not be written
    following: int | None = None  # the step that comes next
    arrive: Callable[[], None] | None = None  # puts the file in its place

    def know(self, signatures: Sequence[dict[str, Any]], frames: Sequence[journal.Frame]) -> None:
        """What the journal has where this one goes on: its first signatures, and each one's last numbers."""
        self.numbers = {json.dumps(signature): i for i, signature in enumerate(signatures[: len(frames)])}
        self.frames = [np.array(frame) for frame in frames]

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
            self.broken = self.following
            self.before_step()
        self._write_whole(event)
        self.following = event.step + (event.ok is not None)
        if self.arrive is not None and event.ok is not None:
            self.arrive()
            self.arrive = None

    def folded(self, event: StepEvent) -> None:
        """What waited was added to the weights, after the event's step."""
        self.before_step()
        self._write_whole(event, journal.FOLD)

    def _write_whole(self, event: StepEvent, kind: int = journal.STEP) -> None:
        """All of a record, or nothing of it."""
        self.broken, at, crc = event.step, self.writer.file.tell(), self.writer.crc
        try:
            self._write(event, kind)
        except BaseException:
            self._cut(at)
            self.writer.crc = crc
            raise
        self.broken = None

    def _cut(self, end: int) -> None:
        """Takes off what was written of a step, so that the file ends with the last whole one."""
        with contextlib.suppress(OSError, ValueError):  # a file that cannot be written at all
            self.writer.file.seek(end)
            self.writer.file.truncate()

    def _write(self, event: StepEvent, kind: int) -> None:
        done = [(spec, told) for spec, told in event.passes if told.enabled is None or int(told.enabled)]
        fold = kind == journal.FOLD
        broken_off = event.ok is None and not fold
        if broken_off and not done:
            return
        flags = 0 if fold else journal.BROKEN_OFF if event.ok is None else 0 if bool(event.ok) else journal.SKIPPED
        self.known.update({seed: (event.step, k) for seed, k in event.drawn.items()})
        if not fold and event.layout is not self.layout and event.layout != self.layout:
            self.layout = event.layout
            self.writer.append_json(journal.LAYOUT, event.layout)
        passes = [self._described(spec, told, event) for spec, told in done]
        values = [
            x.detach().cpu().numpy().astype(np.float32).reshape(-1)
            for _, told in done
            for x in (told.coefs, told.shared)
        ]
        loss = math.nan if event.loss is None else float(event.loss)
        memory = np.asarray(event.memory, np.float64).view(np.float32)
        frame = np.concatenate([*values, memory, np.asarray([*event.lrs, loss], np.float32)])
        self._append(kind, flags, passes, len(event.memory), len(event.lrs), frame)

    def _described(self, spec: PassSpec, told: PassNumbers, event: StepEvent) -> dict[str, Any]:
        """What a signature has of a pass; flags that are not set are left out."""
        flags = {
            "stochastic": spec.rounding == "stochastic",
            "rounded": told.rounding_seed is not None,
            "square_of_sum": spec.square_of_sum,
            "keep_second": spec.keep_second,
            "deferred": event.deferred,
        }
        return {
            "rule": spec.rule.name,
            "seeds": [self._name(seed, event.step) for seed in told.seeds.tolist()],
            "rows": told.shared.shape[0],
            **{name: value for name, value in flags.items() if value},
        }

    def _append(
        self, kind: int, flags: int, passes: list[dict[str, Any]], memory: int, groups: int, frame: journal.Frame
    ) -> None:
        signature = {"passes": passes, "memory": memory, "groups": groups, "numbers": len(frame)}
        key = json.dumps(signature)
        if key not in self.numbers:
            self.numbers[key] = len(self.frames)
            self.frames.append(np.zeros(len(frame), np.float32))
            self.writer.append_json(journal.SIGNATURE, signature)
        number = self.numbers[key]
        self.writer.append(journal.encode_step(number, flags, frame, self.frames[number], kind))
        self.frames[number] = frame

    def _name(self, seed: int, step: int) -> tuple[int, int]:
        """How many steps ago the direction was drawn, and its number in that step: no seed is written down."""
        if seed not in self.known:
            self.known[seed] = next(
                ((at, k) for age in range(SEARCHED_STEPS) for at in [step - age] if at >= 0 for k in range(64)
                 if derive_seed(self.run_seed, at, k) == seed),
                (0, 0),
            )  # fmt: skip
        at, k = self.known[seed]
        if derive_seed(self.run_seed, at, k) != seed:
            raise RuntimeError(f"the direction with seed {seed} is none of this run's, so no journal can tell of it")
        return step - at, k
