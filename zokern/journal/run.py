"""Writing the journal of an optimizer's run, and taking a run up again from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from zokern._checks import difference
from zokern._version import __version__
from zokern.contract.streams import rank_of
from zokern.hashing import hash_of
from zokern.journal import format as journal
from zokern.journal.behind import LAG, check_lag
from zokern.journal.beside import begun
from zokern.journal.files import cut
from zokern.journal.fit import check, check_marks, has_hash, is_base
from zokern.journal.format import BROKEN_OFF, FOLDS, LOW_RANK, SKIPPED, SYNC_SECONDS, JournalError
from zokern.journal.player import Player, memory_of
from zokern.journal.ranks import agreed, at_hand, is_first
from zokern.journal.reader import Reader
from zokern.journal.record import Recorder
from zokern.journal.recording import recording, refuse_second
from zokern.journal.signatures import Directions
from zokern.optim import frameworks, state
from zokern.optim.base import ZerothOrderOptimizer

OF_A_RUN = ("contract", "method", "options", "placement", "seed", "states")  # what a header has that all of it shares


def run_of(optimizer: ZerothOrderOptimizer) -> dict[str, Any]:
    """What a header says of a run, but for the weights that it started from."""
    return {
        "zokern": __version__,
        "features": [
            *([LOW_RANK] if rank_of(optimizer.options["distribution"]) else []),
            *([FOLDS] if optimizer.options["fold_every"] != 1 else []),
        ],
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
    }


@contextlib.contextmanager
def write(
    optimizer: ZerothOrderOptimizer,
    path: str | Path,
    *,
    force: bool = False,
    about: dict[str, Any] | None = None,
    sync: float = SYNC_SECONDS,
    lag: float = LAG,
) -> Iterator[None]:
    """Inside, every step of the optimizer is written to a new journal at `path`; at the end, a hash of the weights.

    Steps do not wait for the device: what they tell is copied out in their wake, and the file may be `lag` behind: a whole
    number of steps, or a float of seconds, as they stand when a step is done. 0 makes each step wait. On a CPU the file has
    each step at once. All is written where the block is left, also by an exception, at `mark` and `flush`, before a
    state_dict() and after a step that broke off. A step that has to wait because of `lag` is counted (`progress`).
    The journal has to begin with the run, or with weights from which a run without states goes on. `about`: anything that
    the header should hold besides, as JSON. `sync`: seconds between waits for the disk; a machine that dies loses at most
    the steps of these. A process that dies loses what `lag` says. `force`: an earlier journal at `path` is replaced with
    the first step; until then the new one is written beside it, and an earlier one stays where the run dies before. Of
    several ranks each one calls this and leaves it: the first writes, and `path` is not looked at on the others.

    Raises:
        TypeError, ValueError: for a lag that is none.
        RankError: where another rank cannot begin, or is elsewhere.
        JournalError: if `path` exists (and force is False), another journal is being written, or the optimizer has states.
    """
    path, optimizer, lag = Path(path), frameworks.bare(optimizer), check_lag(lag)
    with contextlib.ExitStack() as stack:
        with agreed(optimizer, "journal.write", path) as same:
            refuse_second(optimizer, path)
            _refuse_waiting(optimizer, path)
            if not state.untouched(optimizer.state, optimizer.state_spec):
                raise JournalError(
                    f"{path}: {type(optimizer).__name__} has done steps and has states, which a journal does not hold; "
                    "start the journal before the first step, or take the run up from its own journal with resume"
                )
            same.update(run_of(optimizer))
        with agreed(optimizer, "journal.write", path) as base:
            base.update(base=hash_of(optimizer.weights().items()))
            header = {**same, **base, "about": about or {}}
        recorder = None
        with agreed(optimizer, "journal.write", path):
            if is_first(optimizer):
                file, arrive = stack.enter_context(begun(path, force))
                directions = Directions(optimizer.seed)
                recorder = Recorder(journal.start(file, header, sync=sync), directions, optimizer.layout(), lag)
                recorder.writer.append_json(journal.LAYOUT, recorder.layout)
                recorder.arrive = arrive
        with recording(optimizer, recorder, path):
            yield
        if recorder is not None and recorder.arrive is not None:  # a run of no steps
            recorder.arrive()


def _refuse_waiting(optimizer: ZerothOrderOptimizer, path: Path) -> None:
    """A journal tells of the updates that wait since it was begun, and of no others."""
    waiting = optimizer.count_waiting()
    if waiting:
        raise JournalError(
            f"{path}: updates of {waiting} steps wait to be added to the weights, and a journal that begins here "
            "would not have them: call opt.fold() first"
        )


@contextlib.contextmanager
def resume(
    optimizer: ZerothOrderOptimizer, path: str | Path, *, sync: float = SYNC_SECONDS, lag: float = LAG
) -> Iterator[int]:
    """Takes a run up where its journal ends, and writes on: the weights, states and the step of the optimizer become what
    they were after the last step in the journal, without any other checkpoint.

    optimizer: as the run's was at its start: same method, options and parameters, and the weights that it started from.
    Yields the number of steps done. What the file has after the last step that was done is cut off, and kept in a file
    beside it: a record that was torn, with a warning, or a step that an exception broke off. lr, eps and weight_decay stay
    the optimizer's own: set a scheduler to the step. sync, lag: as for write. A file of format 1 is written on as that. Of
    several ranks each one calls this, with the weights that the run started from; the file is the first one's, and the
    others get its bytes from there.

    Raises:
        JournalError: if the journal is damaged, does not fit the optimizer, or another process is writing it, before
            anything is changed; if the weights on the way are not those that training had, after they were changed.
    """
    path, optimizer, lag = Path(path), frameworks.bare(optimizer), check_lag(lag)
    with contextlib.ExitStack() as held:
        with at_hand(optimizer, path, "journal.resume", held) as (here, file):
            with agreed(optimizer, "journal.resume", path) as same:  # who fails while others gather shards is not heard
                refuse_second(optimizer, path)
                _refuse_waiting(optimizer, path)
                reader = Reader(here)
                refuse_another_run(reader, optimizer, (*OF_A_RUN, "first_step"))
                same.update(run_of(optimizer))
            with agreed(optimizer, "journal.resume", path):
                reader, params = _fitting(optimizer, reader), optimizer.weights()
            with agreed(optimizer, "journal.resume", path):
                directions = Directions(optimizer.seed)
                end, crc, layout, frames = _play(optimizer, reader, params, directions)
            recorder = None
            with agreed(optimizer, "journal.resume", path):
                if file is not None:
                    cut(path, file, end, warn=reader.torn)
                    recorder = Recorder(journal.Writer(file, crc, reader.version, sync), directions, layout, lag)
                    recorder.know(reader.signatures, frames)
        with recording(optimizer, recorder, path):
            yield optimizer.counters["steps"]


def refuse_another_run(reader: Reader, optimizer: ZerothOrderOptimizer, names: Iterable[str]) -> None:
    """Raises JournalError where the journal says something else of its run than the optimizer is, under these names."""
    wanted = run_of(optimizer)
    header = {**reader.header, "options": optimizer.completed(reader.header["options"])}
    if {header.get("placement"), wanted["placement"]} == {"stream", "shadow"}:  # the same bits; "auto" may change over
        header["placement"] = wanted["placement"]
    for name in names:
        if header.get(name) != wanted[name]:
            what, there, here = difference(name, header.get(name), wanted[name])
            raise JournalError(f"{reader.path}: {what} is {there} there, {here} in this optimizer; make them agree")


def _fitting(optimizer: ZerothOrderOptimizer, reader: Reader) -> Reader:
    """The journal's reader, at the end. Raises JournalError if it is not of a run of this optimizer's weights."""
    path, params = reader.path, optimizer.weights()
    if not is_base(reader, params):
        raise JournalError(f"{path}: the optimizer's weights are not those that the run started from; load those first")
    reader = check(path, params)
    check_marks(reader)
    history = optimizer.history()
    try:
        for step in Reader(path).steps():
            if not step.flags & BROKEN_OFF and not step.fold:
                optimizer.remember(step.number, memory_of(step), set(), not step.flags & SKIPPED)
    except (ValueError, IndexError, TypeError) as error:
        raise JournalError(
            f"{path}: what {type(optimizer).__name__} remembers of its steps does not fit: {error}"
        ) from error
    finally:
        optimizer.load_history(history)
    return reader


def _play(
    optimizer: ZerothOrderOptimizer, reader: Reader, params: Mapping[str, torch.Tensor], directions: Directions
) -> tuple[int, int, dict[str, Any], list[journal.Frame]]:
    """Does the steps of a journal again, and has their directions read. Where its last step that was done ends, with the
    checksum, the layout and the frames there."""

    def state_of(p: torch.Tensor, name: str) -> torch.Tensor:
        return state.of(optimizer.state, p, optimizer.state_spec)[name]

    looked_at = [mark for mark in reader.marks if not mark.broken_off][-1:]  # a broken off step's weights are gone
    whole, reader = reader, Reader(reader.path)
    player = Player(reader, params, state_of, optimizer.backend)
    done, skipped, pending = reader.done, 0, []
    kept = reader.end, reader.crc, reader.layout, list(reader.frames)

    def compare() -> None:
        if looked_at and looked_at[0].records == reader.records:
            player.flush()
            if not has_hash(params, looked_at[0].hash, reader, whole):
                raise JournalError(
                    f"{reader.path}: the weights after {done} steps are not those that training had: something else "
                    "changed them while it was written, so the run cannot be taken up from it; load the base weights again"
                )

    with torch.no_grad():
        compare()
        for step in reader.steps():
            if step.flags & BROKEN_OFF:  # left out at the end: the weights that it touched are gone
                pending.append(step)
                continue
            for broken in pending:
                player.play(broken)
            pending.clear()
            dropped = player.play(step)
            directions.read(step)
            optimizer.remember_updates(step.number, player.deferred(step), folded=step.fold)
            kept = reader.end, reader.crc, reader.layout, list(reader.frames)
            skipped += bool(step.flags & SKIPPED)
            if not step.fold:
                optimizer.remember(step.number, memory_of(step), dropped, not step.flags & SKIPPED)
            done = step.number + 1
            compare()
        if not pending:  # layouts, signatures and marks after the last step stay
            kept = reader.end, reader.crc, reader.layout, list(reader.frames)
        player.flush()
    optimizer.resumed(done, skipped)
    return kept
