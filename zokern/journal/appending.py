"""Writing a journal on for a run that was taken up from a checkpoint, weights and state_dict, and not from the journal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from zokern.hashing import hash_of
from zokern.journal import format as journal
from zokern.journal.behind import LAG, check_lag
from zokern.journal.files import cut
from zokern.journal.fit import check, is_base
from zokern.journal.format import BROKEN_OFF, SYNC_SECONDS, JournalError
from zokern.journal.ranks import agreed, at_hand
from zokern.journal.reader import Mark, Reader
from zokern.journal.record import Recorder
from zokern.journal.recording import recording, refuse_second
from zokern.journal.run import OF_A_RUN, refuse_another_run
from zokern.journal.signatures import Directions
from zokern.optim import frameworks
from zokern.optim.base import ZerothOrderOptimizer

_SHORT = (
    "the optimizer is at step {until}, and the journal ends after {done} steps{why}: its checkpoint is of another run, "
    "such as an earlier one in the same folder, or the journal's end is missing. Load a checkpoint of step {done} or "
    "before, or go on without this journal"
)


@contextlib.contextmanager
def append(
    optimizer: ZerothOrderOptimizer, path: str | Path, *, sync: float = SYNC_SECONDS, lag: float = LAG
) -> Iterator[None]:
    """Inside, the steps of an optimizer that has been loaded from a checkpoint are written on in its run's journal.

    optimizer: with the weights, the states and the step N of the checkpoint. What the journal has after that is cut off,
    and kept in a file beside it. Nothing is replayed. Where the journal has a hash of the weights after N steps (see
    `mark`), they are compared, and what stands before that hash stays, steps that were broken off too; elsewhere a replay
    finds out at its end. Folded copies (fold_every), loaded with a state_dict whose updates wait, are written down as a
    fold after step N. sync, lag: as for write. Of several ranks each one calls this; the file is the first one's.

    Raises:
        JournalError: before anything is changed: if the journal is damaged, is of another run, does not reach N, or had
            other weights after N steps; or if another process, or this optimizer, is writing a journal.
        ValueError: for weights that are not those of a state_dict that was loaded, whose updates wait.
    """
    path, optimizer, lag = Path(path), frameworks.bare(optimizer), check_lag(lag)
    with contextlib.ExitStack() as held:
        with at_hand(optimizer, path, "journal.append", held) as (here, file):
            with agreed(optimizer, "journal.append", path) as same:
                refuse_second(optimizer, path)
                reader, steps = Reader(here), optimizer.counters["steps"]
                first = reader.done
                refuse_another_run(reader, optimizer, OF_A_RUN)
                arrived = optimizer.arrived()
                if steps < first:
                    raise JournalError(
                        f"{here}: it begins at step {first}, and the optimizer is at step {steps}; give its run's"
                    )
                same["the number of steps done"] = steps
            with agreed(optimizer, "journal.append", path):  # who fails while others gather shards is not heard
                mark = _mark_of(
                    check(here, optimizer.weights(), steps, _SHORT), optimizer, steps, folded=arrived is not None
                )
                directions = Directions(optimizer.seed)
                end, crc, waiting = _go_to(reader, steps, mark, directions)
                if arrived is None:
                    _refuse_other_waiting(optimizer, here, waiting)
            layout, frames, recorder = reader.layout, list(reader.frames), None
            with agreed(optimizer, "journal.append", path):
                if file is not None:
                    cut(path, file, end, warn=False)
                    recorder = Recorder(journal.Writer(file, crc, reader.version, sync), directions, layout, lag)
                    recorder.know(reader.signatures, frames)
        with recording(optimizer, recorder, path):
            if recorder is not None and arrived is not None and not (mark is not None and mark.folded):
                recorder.folded(arrived)
            yield


def _mark_of(reader: Reader, optimizer: ZerothOrderOptimizer, steps: int, *, folded: bool) -> Mark | None:
    """The first mark after `steps` steps that has the hash of these weights; None where there is none to compare with.
    folded: they are folded copies, of what waited then.

    Raises:
        JournalError: if the run had other weights there, or others waited to be added to them.
    """
    here = [mark for mark in reader.marks if mark.step == mark.done == steps]
    params, whole = optimizer.weights(), ""
    if optimizer.pending:
        here = [mark for mark in here if not mark.folded]
        whole = hash_of(optimizer.weights_folded()) if here else ""
    own = hash_of(params.items()) if here else ""
    for mark in here:
        if own == (mark.whole or mark.hash) if folded else (own, whole) == (mark.hash, mark.whole):
            return mark
    # The weights of a step that broke off are gone at a checkpoint before it.
    clean = any(not mark.broken_off for mark in here)
    if clean or (steps == reader.header["first_step"] and not is_base(reader, params)):
        raise JournalError(
            f"{reader.path}: the optimizer's weights are not those that the run had after {steps} steps; load the "
            "checkpoint's"
        )
    return None


def _go_to(reader: Reader, steps: int, mark: Mark | None, directions: Directions) -> tuple[int, int, int]:
    """Reads to the end of the mark, or of the last of so many steps, directions too. Where that is, with the checksum
    there, and how many steps' updates wait there."""
    waiting = 0
    if mark is not None or steps > reader.done:
        for step in reader.steps(None if mark is None else mark.end):
            if not step.flags & BROKEN_OFF:
                directions.read(step)
                waiting = waiting + 1 if any(one.get("deferred") for one in step.signature["passes"]) else 0
            if mark is None and reader.done == steps:
                break
    return (reader.end, reader.crc, waiting) if mark is None else (mark.end, mark.crc, waiting)


def _refuse_other_waiting(optimizer: ZerothOrderOptimizer, path: Path, waiting: int) -> None:
    """
    Raises:
        JournalError: where other updates wait than the journal says, which its replay would do.
    """
    own = optimizer.count_waiting()
    if own != waiting:
        raise JournalError(
            f"{path}: updates of {waiting} steps wait there, and of {own} in the optimizer, so a replay would have other "
            "weights: load p.data as it was (module.state_dict() has folded copies), or make checkpoints at steps t with "
            "(t + 1) divisible by fold_every"
        )
