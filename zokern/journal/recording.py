"""Steps are written while a block lasts, and a hash of the weights at its end, or whenever it is asked for."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from zokern._checks import ZokernWarning
from zokern.hashing import hash_of
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
    try:
        yield
    except BaseException as error:
        optimizer.listeners.remove(listener)
        try:
            if recorder is not None and recorder.broken is not None:
                left(optimizer, error)
            elif not hashed_together(optimizer):  # the other ranks may be elsewhere
                _end(optimizer, recorder, path)
        finally:
            _warn_of_removal(recorder, path)
        raise
    optimizer.listeners.remove(listener)
    with agreed(optimizer, "the end of the journal", path):
        _end(optimizer, recorder, path)
        _warn_of_removal(recorder, path)


def _end(optimizer: ZerothOrderOptimizer, recorder: Recorder | None, path: Path) -> None:
    if recorder is None or recorder.broken is None:
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
    found = next((one for one in optimizer.listeners if isinstance(one, Recorder | Elsewhere)), None)
    if found is None:
        raise JournalError("mark: this optimizer is writing no journal; begin one with zokern.journal.write")
    found.before_step()
    _mark(optimizer, found if isinstance(found, Recorder) else None)


def _mark(optimizer: ZerothOrderOptimizer, recorder: Recorder | None) -> None:
    """What a replay has to end with. recorder: None on a rank that does not write."""
    if recorder is None and not hashed_together(optimizer):
        return
    mark = {"step": optimizer.counters["steps"], "hash": hash_of(optimizer.weights().items())}
    if optimizer.pending:  # what module.state_dict() has
        mark["folded"] = hash_of(optimizer.weights_folded())
    if recorder is not None:
        recorder.writer.append_json(MARK, mark)
        recorder.writer.sync()
