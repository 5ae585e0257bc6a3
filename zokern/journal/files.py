"""The file of a journal while it is written: new or locked, and what is cut off is kept beside it."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from zokern._checks import ZokernWarning
from zokern.journal.format import JournalError

try:
    import fcntl
except ImportError:  # a system without it
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def made(path: Path, force: bool) -> Iterator[BinaryIO]:
    """A new, empty file, locked; with `force` an existing one may be there, which is empty or no regular file."""
    new = not os.path.exists(path)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | (0 if force else os.O_EXCL), 0o666)
    except FileExistsError as error:
        raise JournalError(f"{path} exists; give another name, or force=True to replace it") from error
    except OSError as error:
        raise JournalError(f"{path}: cannot be written ({error.strerror})") from error
    with cast(BinaryIO, os.fdopen(descriptor, "r+b", buffering=0)) as file:
        hold(file, path)
        if force and os.path.isfile(path) and os.fstat(file.fileno()).st_size:  # since it was looked at
            raise JournalError(f"{path}: another process has just written it; give another name")
        sync_folder(path)
        try:
            yield file
        finally:
            if new and os.fstat(file.fileno()).st_size == 0:  # not even a header: the disk is full
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[BinaryIO]:
    """An existing file, to be read and written on."""
    try:
        opened = cast(BinaryIO, path.open("r+b", buffering=0))
    except OSError as error:
        raise JournalError(f"{path}: cannot be written on ({error.strerror})") from error
    with opened as file:
        hold(file, path)
        if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise JournalError(f"{path}: another process has just replaced it; give another name")
        yield file


def cut(path: Path, file: BinaryIO, end: int, *, warn: bool) -> None:
    """Cuts the file off at `end` and goes there. What was behind it is in a new file beside it, before it is cut off."""
    size = file.seek(0, os.SEEK_END)
    if size > end:
        file.seek(end)
        kept = _keep(path, file.read())
        if warn:
            what = (
                f"its last {size - end} bytes, after the last good record, are no record (a writer was stopped there)"
            )
            warnings.warn(f"{path}: {what}; they are cut off, and kept as {kept.name}", ZokernWarning, stacklevel=6)
        file.truncate(end)
    file.seek(end)


def _keep(path: Path, data: bytes) -> Path:
    number = 0
    while True:
        kept = path.with_name(f"{path.name}.cut{number or ''}")
        try:
            with kept.open("xb") as copy:
                copy.write(data)
                copy.flush()
                os.fsync(copy.fileno())
        except FileExistsError:
            number += 1
            continue
        return kept


def hold(file: BinaryIO, path: Path) -> None:
    """Until the file is closed, or the process dies."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise JournalError(f"{path}: another process is writing it; wait for its end, or give another name") from error
    except OSError as error:
        warnings.warn(
            f"{path}: its file system has no locks ({error.strerror}); see to it that nothing else writes it",
            ZokernWarning,
            stacklevel=6,
        )


def sync_folder(path: Path) -> None:
    """A machine that dies must not lose the new name."""
    try:
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError:  # a folder that can be written and not be read
        return
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
