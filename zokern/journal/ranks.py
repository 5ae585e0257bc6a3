"""The journal of a model that is cut up over ranks: the first rank has the file, and all take part.

Hashes are of whole tensors, so every rank has to ask for them at the same points. The other ranks do all that the first
does, with a file that is thrown away: a copy of the first one's, where one is read.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from zokern.journal.format import JournalError
from zokern.parts import is_dtensor

Entered = TypeVar("Entered")


@contextlib.contextmanager
def own(path: Path, weights: Iterable[Tensor], *, reads: bool = False) -> Iterator[Path]:
    """The path on the first rank, and where no weight is a shard; another on the others.

    Raises:
        JournalError: on all ranks, where the first cannot read the file that is to be read.
    """
    if not any(map(is_dtensor, weights)):
        yield path
        return
    from torch import distributed as dist

    first = dist.get_rank() == 0
    told: list[Any] = [None, ""]
    if reads:
        if first:
            try:
                told = [path.read_bytes(), ""]
            except OSError as error:
                told = [None, f"{path}: cannot be read ({error.strerror})"]
        dist.broadcast_object_list(told, 0)
        if told[1]:
            raise JournalError(told[1])
    if first:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        if reads:
            copy.write_bytes(told[0])
        yield copy


@contextlib.contextmanager
def together(entered: AbstractContextManager[Entered], weights: Iterable[Tensor]) -> Iterator[Entered]:
    """
    Raises:
        JournalError: on all ranks, where it cannot be entered on one.
    """
    if not any(map(is_dtensor, weights)):
        with entered as value:
            yield value
        return
    from torch import distributed as dist

    with contextlib.ExitStack() as stack:
        error: BaseException | None = None
        try:
            value = stack.enter_context(entered)
        except Exception as raised:
            error = raised
        told: list[Any] = [""] * dist.get_world_size()
        dist.all_gather_object(told, "" if error is None else str(error))
        if error is not None:
            raise error
        failed = next((rank for rank, text in enumerate(told) if text), None)
        if failed is not None:
            raise JournalError(f"rank {failed}: {told[failed]}")
        yield value
