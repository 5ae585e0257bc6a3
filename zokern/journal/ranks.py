"""A journal of several ranks: the first one writes it and reads it, the others have its bytes from there.

All ranks come to the same places together: where a journal begins and where it ends. What goes wrong on one of them before
that is told to all, and all raise. The format knows nothing of ranks.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch

from zokern.distributed.exchange import RankError
from zokern.distributed.pieces import from_first
from zokern.journal.files import locked
from zokern.journal.format import JournalError
from zokern.optim.agreed import fingerprint
from zokern.optim.agreement import FINE, PATIENCE, RAISED
from zokern.optim.base import ZerothOrderOptimizer
from zokern.optim.events import StepEvent
from zokern.optim.ranks import Ranks


def ranks_of(optimizer: ZerothOrderOptimizer) -> Ranks | None:
    """The ranks that train with this one; None for a process alone."""
    return optimizer._ranks if optimizer._decided else optimizer._take_part()


def is_first(optimizer: ZerothOrderOptimizer) -> bool:
    """Whether this rank is the one that has the journal's file."""
    return optimizer.rank == 0


@dataclass
class Elsewhere:
    """On the other ranks, in the place of a recorder: the first rank writes, and what it refuses is refused here."""

    def __call__(self, event: StepEvent) -> None: ...

    def before_step(self) -> None: ...

    def before_load(self, same: bool) -> None:
        if not same:
            raise JournalError(
                "load_state_dict was called while a journal is written on the first rank, which cannot tell of it: load "
                "before the journal is begun, or leave the block that writes it, on every rank"
            )


@contextlib.contextmanager
def agreed(optimizer: ZerothOrderOptimizer, doing: str, path: Path) -> Iterator[dict[str, Any]]:
    """Around what every rank does for itself at one place of the program: where it fails on one rank, all raise.

    The dict takes what has to be the same on all of them. doing: the place, in words.

    Raises:
        JournalError: on the other ranks, where one has raised that.
        RankError: where another has raised anything else, is not at this place, or is lost.
    """
    ranks, about = ranks_of(optimizer), dict[str, Any]()
    if ranks is None:
        yield about
        return
    ranks.where, ranks.round, begun = optimizer.counters["steps"], 254, time.monotonic()
    ranks.comparing, ranks.timeout = not ranks.compared, optimizer.exchange_timeout
    try:
        yield about
    except RankError:  # the others have it too, or cannot be told
        raise
    except BaseException as error:
        tell(ranks, error, begun, doing)
        raise
    header = _headers(ranks, FINE, fingerprint(about), begun, doing)
    if raised := [i for i, one in enumerate(header) if one[1] == RAISED]:
        _raise_too(ranks, raised, doing, path)
    if any(one != header[0] for one in header):
        ranks._differ(ranks.exchange.objects({"the place": doing, **about}))


def tell(ranks: Ranks, error: BaseException, begun: float, doing: str) -> None:
    """To the others, wherever they come next, that this rank has failed."""
    if ranks.exchange.broken:
        return
    try:
        _headers(ranks, RAISED, 0, begun, doing)
        ranks.exchange.objects(f"{type(error).__name__}: {str(error)[:2000]}")
    except RankError:
        pass  # this rank's own error says more


def _headers(ranks: Ranks, status: int, agreed: int, begun: float, doing: str) -> list[list[int]]:
    """Each rank's, as long as those of a step: a rank that is in a step is heard, and hears."""
    seconds = max(ranks.timeout, PATIENCE * (time.monotonic() - begun))
    every = ranks.exchange.gather(torch.from_numpy(ranks.header(status, agreed)), seconds, doing)
    if status == RAISED:
        ranks.compared = False
    header: list[list[int]] = every.view(torch.int64)[:, :3].tolist()
    return header


def _raise_too(ranks: Ranks, raised: list[int], doing: str, path: Path) -> NoReturn:
    each = ranks.said_by(raised)
    told = "; ".join(each)
    if all(one.split(" raised ", 1)[1].startswith(JournalError.__name__) for one in each):
        raise JournalError(f"{path}: {told} at {doing}")
    raise RankError(f"{told} at {doing} of {path}")


@contextlib.contextmanager
def at_hand(
    optimizer: ZerothOrderOptimizer, path: Path, doing: str, held: contextlib.ExitStack
) -> Iterator[tuple[Path, BinaryIO | None]]:
    """The journal where this rank can read it, and the file to go on with. `path`, locked until `held` ends, is for the
    first rank; the others have a copy of its bytes for the length of the block, and no file."""
    ranks, here, file = ranks_of(optimizer), path, None
    if ranks is None:
        yield path, held.enter_context(locked(path))
        return
    with contextlib.ExitStack() as stack:
        with agreed(optimizer, doing, path):
            if is_first(optimizer):
                file = held.enter_context(locked(path))
                source: BinaryIO | None = stack.enter_context(path.open("rb"))
                size = os.fstat(file.fileno()).st_size
            else:
                here, source, size = stack.enter_context(_temporary(path)), None, 0
        own = torch.tensor([size], dtype=torch.int64, device="cpu")
        size = int(ranks.exchange.gather(own, optimizer.exchange_timeout, f"the size of {path}")[0])
        with agreed(optimizer, doing, path), contextlib.nullcontext() if file else here.open("xb") as copy:
            sink = len if copy is None else copy.write
            from_first(ranks.exchange, source, sink, size, optimizer.exchange_timeout, str(path))
        try:
            yield here, file
        except JournalError as error:
            if here == path:
                raise
            raise JournalError(str(error).replace(str(here), str(path))) from error


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    try:
        folder = tempfile.TemporaryDirectory(prefix="zokern-")
    except OSError as error:
        raise JournalError(
            f"{path}: no copy of it can be made in {tempfile.gettempdir()} ({error.strerror}); set TMPDIR"
        ) from error
    with folder as name:
        yield Path(name) / path.name


def left(optimizer: ZerothOrderOptimizer, error: BaseException) -> None:
    """The first rank leaves its journal alone, which could not be written: the others hear of it where they come next."""
    ranks = ranks_of(optimizer)
    if ranks is not None and ranks.compared:  # they have not been told yet
        tell(ranks, error, time.monotonic(), "a step")


def hashed_together(optimizer: ZerothOrderOptimizer) -> bool:
    """Whether a hash of the weights takes all ranks, each of which has a part of them."""
    ranks = ranks_of(optimizer)
    return ranks is not None and ranks.places.sharded
