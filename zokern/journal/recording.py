"""Steps are written while a block lasts, and a hash of the weights at its end, or whenever it is asked for."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from zokern._checks import ZokernWarning
from zokern.hashing import hash_of
from zokern.journal import unclosed
from zokern.journal.format import MARK, JournalError
from zokern.journal.ranks import Elsewhere, agreed, hashed_together, left
from zokern.journal.record import Recorder
from zokern.optim import frameworks
from zokern.optim.base import ZerothOrderOptimizer


def refuse_second(optimizer: ZerothOrderOptimizer, path: Path) -> None:
    """
    Raises:
        JournalError: where this optimizer is writing a journal.
    """
    if any(isinstance(listener, Recorder | Elsewhere) for listener in optimizer.listeners):
        raise JournalError(f"{path}: this optimizer is writing a journal already; end that one first")


@contextlib.contextmanager
def recording(optimizer: ZerothOrderOptimizer, recorder: Recorder | None, path: Path) -> Iterator[None]:
    """recorder: None on all ranks but the first."""
    listener = Elsewhere() if recorder is None else recorder
    optimizer.listeners.append(listener)
    unclosed.add(recorder, path)
    try:
        yield
    except BaseException as error:
        unclosed.discard(recorder)
        optimizer.listeners.remove(listener)
        try:
            _flush_after(recorder, path)
            if recorder is not None and recorder.broken is not None:
                left(optimizer, error)
            elif not hashed_together(optimizer):  # the other ranks may be elsewhere
                _end(optimizer, recorder, path)
        finally:
            _warn_of_removal(recorder, path)
        raise
    unclosed.discard(recorder)
    optimizer.listeners.remove(listener)
    with agreed(optimizer, "the end of the journal", path):
        _end(optimizer, recorder, path)
        _warn_of_removal(recorder, path)


def _flush_after(recorder: Recorder | None, path: Path) -> None:
    """After an error, which says more than what happens here: of a device that has failed nothing more can be had."""
    if recorder is None:
        return
    try:
        recorder.flush()
    except Exception as error:
        broken, following = recorder.broken or 0, recorder.following or 0
        recorder.give_up()
        warnings.warn(
            f"{path}: the journal ends before step {broken}, and {following - broken} steps that were done are not in it: "
            f"{type(error).__name__}: {error}",
            ZokernWarning,
            stacklevel=6,
        )


def _end(optimizer: ZerothOrderOptimizer, recorder: Recorder | None, path: Path) -> None:
    if recorder is None or (recorder.broken is None and not recorder.closed):
        _mark(optimizer, recorder)


def _warn_of_removal(recorder: Recorder | None, path: Path) -> None:
    if recorder is not None and os.fstat(recorder.writer.file.fileno()).st_nlink == 0:
        what = f"{path} was removed while it was written: there is no journal of this run"
        warnings.warn(what, ZokernWarning, stacklevel=6)


def mark(optimizer: ZerothOrderOptimizer) -> None:
    """Writes a hash of the weights as they are to the journal that the optimizer is writing: a replay `until` this step is
    verified then, and a run can be taken up from a checkpoint of this step with `append`. Reads all weights. Of several
    ranks the first one writes, and all have to call it where each has a part of the weights.

    Raises:
        JournalError: if no journal is being written, or the last step's record could not be.
    """
    optimizer = frameworks.bare(optimizer)
    found = _found(optimizer, "mark")
    found.before_step()
    _mark(optimizer, found if isinstance(found, Recorder) else None)


def _found(optimizer: ZerothOrderOptimizer, asked: str) -> Recorder | Elsewhere:
    found = next((one for one in optimizer.listeners if isinstance(one, Recorder | Elsewhere)), None)
    if found is None:
        raise JournalError(f"{asked}: this optimizer is writing no journal; begin one with zokern.journal.write")
    return found


def flush(optimizer: ZerothOrderOptimizer) -> None:
    """Every step that is done is in the journal that the optimizer is writing; waits for the device. For a moment after
    which the process may be killed, say: steps of a device are written up to `lag` later. On ranks that do not write it is
    nothing.

    Raises:
        JournalError: if no journal is being written.
        OSError: where a record cannot be written.
    """
    found = _found(frameworks.bare(optimizer), "flush")
    if isinstance(found, Recorder):
        found.before_step()
        found.flush()


@dataclass(frozen=True)
class Progress:
    """How far a journal is: steps that are done and not yet in the file, and steps that had to wait for their being
    written, since it was begun."""

    behind: int
    waits: int


def progress(optimizer: ZerothOrderOptimizer) -> Progress:
    """Of the journal that the optimizer is writing; nobody waits for it. On ranks that do not write all is 0.

    Raises:
        JournalError: if no journal is being written.
    """
    found = _found(frameworks.bare(optimizer), "progress")
    return Progress(len(found.behind), found.behind.waits) if isinstance(found, Recorder) else Progress(0, 0)


def _mark(optimizer: ZerothOrderOptimizer, recorder: Recorder | None) -> None:
    """What a replay has to end with. recorder: None on a rank that does not write."""
    if recorder is None and not hashed_together(optimizer):
        return
    if recorder is not None:
        recorder.flush()
    mark = {"step": optimizer.counters["steps"], "hash": hash_of(optimizer.weights().items())}
    if optimizer.pending:  # what module.state_dict() has
        mark["folded"] = hash_of(optimizer.weights_folded())
    if recorder is not None:
        recorder.writer.append_json(MARK, mark)
        recorder.writer.sync()
