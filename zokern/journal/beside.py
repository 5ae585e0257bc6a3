"""A journal that replaces an earlier one is written beside it, and takes its place with its first step.

A run that dies before, at its first step perhaps, leaves the earlier journal as it was.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from zokern.journal.files import hold, locked, made, sync_folder
from zokern.journal.format import JournalError

Arrive = Callable[[], None]


@contextlib.contextmanager
def begun(path: Path, force: bool) -> Iterator[tuple[BinaryIO, Arrive | None]]:
    """A new, empty file, locked; and, where it is not at its place yet, what puts it there."""
    if force and os.path.isfile(path) and os.path.getsize(path):  # False for a name that cannot be
        with _beside(Path(os.path.realpath(path))) as both:
            yield both
    else:
        with made(path, force) as file:
            yield file, None


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[tuple[BinaryIO, Arrive]]:
    with locked(target) as old:
        path, descriptor = _new(target)
        arrived = kept = False  # kept: from the first try on, as it may be all there is of the new run

        def arrive() -> None:
            """Again is nothing. After an error both files are there."""
            nonlocal arrived, kept
            if not arrived:
                kept = True
                os.fsync(descriptor)
                os.replace(path, target)
                arrived = True
                sync_folder(target)

        with cast(BinaryIO, os.fdopen(descriptor, "r+b", buffering=0)) as file:
            try:
                os.fchmod(descriptor, stat.S_IMODE(os.fstat(old.fileno()).st_mode))
                hold(file, path)
                yield file, arrive
            finally:
                if not kept:
                    path.unlink(missing_ok=True)


def _new(target: Path) -> tuple[Path, int]:
    """A file of a new name, so that none of the user's is written over."""
    number = 0
    while True:
        path = target.with_name(f"{target.name}.new{number or ''}")
        try:
            return path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise JournalError(
                f"{target}: a journal that replaces it is written beside it until its first step, and {target.parent} "
                f"cannot be written ({error.strerror}); give the name of a new file elsewhere"
            ) from error
