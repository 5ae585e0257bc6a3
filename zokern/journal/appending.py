"""Writing a journal on for a run that was taken up from a checkpoint, weights and state_dict, and not from the journal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from zokern.journal import format as journal
from zokern.journal.files import cut, locked
from zokern.journal.fit import check
from zokern.journal.format import SYNC_SECONDS, JournalError
from zokern.journal.hashing import hash_of
from zokern.journal.reader import Reader
from zokern.journal.record import Recorder
from zokern.journal.run import OF_A_RUN, recording, refuse_another_run
from zokern.optim.base import ZerothOrderOptimizer


@contextlib.contextmanager
def append(optimizer: ZerothOrderOptimizer, path: str | Path, *, sync: float = SYNC_SECONDS) -> Iterator[None]:
    """Inside, the steps of an optimizer that has been loaded from a checkpoint are written on in its run's journal.

    optimizer: with the weights, the states and the step N of the checkpoint. What the journal has after N steps is cut off,
    and kept in a file beside it. Nothing is replayed. Where the journal has a hash of the weights after N steps (see
    `mark`), it is compared; elsewhere a replay finds out at its end. sync: as for write.

    Raises:
        JournalError: before anything is changed: if the journal is damaged, is of another run, does not reach N, or had
            other weights after N steps; or if another process, or this optimizer, is writing a journal.
    """
    path = Path(path)
    if any(isinstance(listener, Recorder) for listener in optimizer.listeners):
        raise JournalError(f"{path}: this optimizer is writing a journal already; end that one first")
    with locked(path) as file:
        reader, steps = Reader(path), optimizer.counters["steps"]
        first = reader.done
        refuse_another_run(reader, optimizer, OF_A_RUN)
        if steps < first:
            raise JournalError(
                f"{path}: it begins at step {first}, and the optimizer is at step {steps}; give its run's"
            )
        params = optimizer.weights()
        whole = check(path, params, steps)
        hashes = [mark.hash for mark in whole.marks if mark.step == mark.done == steps and not mark.broken_off]
        if hashes and hash_of(params.items()) not in hashes:
            raise JournalError(
                f"{path}: the optimizer's weights are not those that the run had after {steps} steps; load the checkpoint's"
            )
        if steps > first:
            next(step for step in reader.steps() if reader.done == steps)
        end, crc, layout, frames = reader.end, reader.crc, reader.layout, list(reader.frames)
        cut(path, file, end, warn=False)
        recorder = Recorder(journal.Writer(file, crc, reader.version, sync), optimizer.seed, layout)
        recorder.know(reader.signatures, frames)
        with recording(optimizer, recorder, path):
            yield
