"""Writing the journal of an optimizer's run, and taking a run up again from it."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zokern._checks import ZokernWarning
from zokern._version import __version__
from zokern.journal import format as journal
from zokern.journal.format import BROKEN_OFF, MARK, SKIPPED, JournalError, Reader
from zokern.journal.hashing import hash_of
from zokern.journal.record import Recorder
from zokern.journal.replay import Player, check, memory_of
from zokern.optim import state
from zokern.optim.base import ZerothOrderOptimizer


def _header(optimizer: ZerothOrderOptimizer) -> dict[str, Any]:
    return {
        "zokern": __version__,
        "contract": "zk1",
        "method": type(optimizer).__name__,
        "options": optimizer.options,
        "distribution": optimizer.options["distribution"],
        "placement": optimizer.placement,
        "seed": optimizer.seed,
        "first_step": optimizer.counters["steps"],
        "states": {
            name: [str(dtype).removeprefix("torch."), value] for name, (dtype, value) in optimizer.state_spec.items()
        },
        "groups": [{k: float(group[k]) for k in ("lr", "eps", "weight_decay")} for group in optimizer.param_groups],
        "base": hash_of(optimizer.weights().items()),
    }


@contextlib.contextmanager
def write(
    optimizer: ZerothOrderOptimizer, path: str | Path, *, force: bool = False, about: dict[str, Any] | None = None
) -> Iterator[None]:
    """Inside, every step of the optimizer is written to a new journal at `path`; at the end, a hash of the weights.

    A step waits for the device, because its numbers have to be on the host. The journal has to begin with the run, or
    with weights from which a run without states goes on. `about`: anything that the header should hold besides, as JSON.

    Raises:
        JournalError: if `path` exists (and force is False), another journal is being written, or the optimizer has states.
    """
    path = Path(path)
    if any(isinstance(listener, Recorder) for listener in optimizer.listeners):
        raise JournalError(f"{path}: this optimizer is writing a journal already; end that one first")
    if any(optimizer.state.values()):
        raise JournalError(
            f"{path}: {type(optimizer).__name__} has done steps and has states, which a journal does not hold; start the "
            "journal before the first step, or take the run up from its own journal with resume"
        )
    try:
        file = path.open("wb" if force else "xb")
    except FileExistsError as error:
        raise JournalError(f"{path} exists; give another name, or force=True to replace it") from error
    with file:
        writer = journal.start(file, {**_header(optimizer), "about": about or {}})
        recorder = Recorder(writer, optimizer.seed, optimizer.layout())
        writer.append_json(journal.LAYOUT, recorder.layout)
        with _recording(optimizer, recorder):
            yield


@contextlib.contextmanager
def _recording(optimizer: ZerothOrderOptimizer, recorder: Recorder) -> Iterator[None]:
    optimizer.listeners.append(recorder)
    try:
        yield
    finally:
        optimizer.listeners.remove(recorder)
        if recorder.broken is None:
            _mark(optimizer, recorder)


def _mark(optimizer: ZerothOrderOptimizer, recorder: Recorder) -> None:
    """What a replay has to end with."""
    mark = {"step": optimizer.counters["steps"], "hash": hash_of(optimizer.weights().items())}
    recorder.writer.append_json(MARK, mark)
    recorder.writer.file.flush()
    os.fsync(recorder.writer.file.fileno())


@contextlib.contextmanager
def resume(optimizer: ZerothOrderOptimizer, path: str | Path) -> Iterator[int]:
    """Takes a run up where its journal ends, and writes on: the weights, states and the step of the optimizer become what
    they were after the last step in the journal, without any other checkpoint.

    optimizer: as the run's was at its start: same method, options and parameters, and the weights that it started from.
    Yields the number of steps done. What the file has after the last step that was done is dropped: a record that was cut
    off, a step that an exception broke off. lr, eps and weight_decay stay the optimizer's own: set a scheduler to the step.

    Raises:
        JournalError: if the journal is damaged or does not fit the optimizer, before anything is changed.
    """
    path = Path(path)
    reader, wanted = Reader(path), _header(optimizer)
    header = {**reader.header, "options": optimizer.completed(reader.header.get("options") or {})}
    for name in ("contract", "method", "options", "placement", "seed", "first_step", "states"):
        if header.get(name) != wanted[name]:
            raise JournalError(
                f"{path}: {name} is {header.get(name)!r} there, {wanted[name]!r} in this optimizer; make them agree"
            )
    if reader.header.get("base") != wanted["base"]:
        raise JournalError(f"{path}: the optimizer's weights are not those that the run started from; load those first")
    params = optimizer.weights()
    check(path, params)

    def state_of(p: torch.Tensor, name: str) -> torch.Tensor:
        return state.of(optimizer.state, p, optimizer.state_spec)[name]

    player = Player(reader, params, state_of, optimizer.backend)
    done, skipped, pending = optimizer.counters["steps"], 0, []
    kept = reader.end, reader.crc, reader.layout, 0, list(reader.frames)  # up to the last step that was done
    with torch.no_grad():
        for step in reader.steps():
            if step.flags & BROKEN_OFF:  # left out at the end: the weights that it touched are gone
                pending.append(step)
                continue
            for broken in pending:
                player.play(broken)
            pending.clear()
            dropped = player.play(step)
            kept = reader.end, reader.crc, reader.layout, len(reader.signatures), list(reader.frames)
            skipped += bool(step.flags & SKIPPED)
            optimizer.remember(step.number, memory_of(step), dropped, not step.flags & SKIPPED)
            done = step.number + 1
    player.flush()
    optimizer.resumed(done, skipped)
    if reader.torn:
        warnings.warn(
            f"{path}: its last record was cut off ({path.stat().st_size - reader.end} bytes), and is dropped",
            ZokernWarning,
            stacklevel=3,
        )
    end, crc, layout, count, frames = kept
    with path.open("r+b") as file:
        file.truncate(end)
        file.seek(end)
        recorder = Recorder(journal.Writer(file, crc), optimizer.seed, layout)
        recorder.numbers = {json.dumps(signature): i for i, signature in enumerate(reader.signatures[:count])}
        recorder.frames = [np.array(frame) for frame in frames]
        with _recording(optimizer, recorder):
            yield done
