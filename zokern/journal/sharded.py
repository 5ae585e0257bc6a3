"""A journal that is replayed onto a model that is cut up over ranks: the first rank reads the file, and all replay it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from zokern.journal.format import JournalError
from zokern.parts import is_dtensor


@contextlib.contextmanager
def at_hand(path: Path, weights: Iterable[Tensor]) -> Iterator[Path]:
    """The path, where no weight is a shard, and on the first rank; a copy of it on the others.

    Raises:
        JournalError: on all ranks, where the first cannot read it.
    """
    if not any(map(is_dtensor, weights)):
        yield path
        return
    from torch import distributed as dist

    first = dist.get_rank() == 0
    told: list[Any] = [None, ""]
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
        copy.write_bytes(told[0])
        yield copy
