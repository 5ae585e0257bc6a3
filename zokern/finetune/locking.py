"""One process at a time in an output directory: a lock that ends with its process, however that ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from zokern.finetune.options import FinetuneError

NAME = ".zokern-lock"


class Lock:
    """Held from its making to `release`. `unsupported` says why the file system has no locks, where it has none."""

    def __init__(self, directory: Path) -> None:
        """Raises FinetuneError with the process that holds the lock, OSError where no file can be made."""
        self.unsupported: str | None = None
        self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._file = self._take(directory)
        except BaseException:
            os.close(self._directory)
            raise

    def _take(self, directory: Path) -> int:
        while True:
            file = os.open(NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666, dir_fd=self._directory)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(file, 20, 0).decode("ascii", "replace").strip() or "unknown"
                os.close(file)
                raise FinetuneError(
                    f"--output {str(directory)!r} is in use by another run, process {holder}; wait until it has ended, or "
                    "give another directory"
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO):
                    os.close(file)
                    raise
                self.unsupported = error.strerror
                return file
            if self._still_there(file):
                os.ftruncate(file, 0)
                os.pwrite(file, str(os.getpid()).encode(), 0)
                return file
            os.close(file)  # its holder removed it before it let go

    def _still_there(self, file: int) -> bool:
        try:
            return os.path.samestat(os.stat(NAME, dir_fd=self._directory, follow_symlinks=False), os.fstat(file))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Lets go. The file is removed where it is, also in a directory that has been renamed."""
        with contextlib.suppress(OSError):
            if self._still_there(self._file):
                os.unlink(NAME, dir_fd=self._directory)
        os.close(self._file)
        os.close(self._directory)
