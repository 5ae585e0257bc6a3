"""The journal of a framework's run: begun with its training, gone on with from its checkpoints, ended before anything else
changes the weights."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path

import torch.distributed as dist

from zokern import journal
from zokern._checks import ZokernWarning
from zokern.optim import ZerothOrderOptimizer, state

NAME = "journal.zkj"


class Journaled:
    """Of one trainer; nothing is written outside `begin` and `close`."""

    def __init__(self) -> None:
        self._stack: contextlib.ExitStack | None = None
        self._optimizer: ZerothOrderOptimizer | None = None

    def begin(self, optimizer: ZerothOrderOptimizer, folder: str | Path, step: int) -> None:
        """Where one is being written, by an attempt of the same training that was given up, it goes on.

        step: of the checkpoint that the run goes on from, 0 for a new run, which renames an earlier run's journal; but an
        optimizer that has states goes on in the journal that has its steps.

        Raises:
            JournalError: if the journal in the folder is of another run than the optimizer, or cannot be written.
        """
        if self._stack is not None:
            return
        path = Path(folder) / NAME
        states = not state.untouched(optimizer.state, optimizer.state_spec)
        (exists,) = _of_the_first(optimizer, path.exists())
        if states and not exists:
            warnings.warn(
                f"{path} is not there, and a journal cannot begin at step {optimizer.counters['steps']} of a run with "
                "states: none is written",
                ZokernWarning,
                stacklevel=2,
            )
            return
        with contextlib.ExitStack() as stack:
            if exists and (step or states):
                try:
                    stack.enter_context(journal.append(optimizer, path))
                except journal.JournalError as error:
                    raise journal.JournalError(f"{error}. {_UNDER_A_TRAINER}") from error
            else:
                if optimizer.rank == 0:
                    _rename(path)
                stack.enter_context(journal.write(optimizer, path))
            self._optimizer, self._stack = optimizer, stack.pop_all()

    def mark(self) -> None:
        """The weights are those of a checkpoint: a run can go on from it."""
        if self._optimizer is not None:
            journal.mark(self._optimizer)

    def close(self) -> None:
        """Again is nothing."""
        stack, self._stack, self._optimizer = self._stack, None, None
        if stack is not None:
            stack.close()


_UNDER_A_TRAINER = (
    "Under the Trainer resume_from_checkpoint= takes the folder of another checkpoint, and journal=False goes on without a "
    "journal"
)


def _of_the_first(optimizer: ZerothOrderOptimizer, *found: bool) -> list[bool]:
    """What the first of several processes has found: it has the journal, and all do the same with it."""
    told = list(found)
    if optimizer.num_ranks > 1:
        dist.broadcast_object_list(told, src=0)
    return told


def _rename(path: Path) -> None:
    """An earlier run's, to the first name that is free."""
    if path.exists():
        number = 1
        while (other := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
            number += 1
        path.rename(other)
