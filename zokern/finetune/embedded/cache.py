"""What is fetched once: directories with their files' hashes beside them, made whole or not at all, checked at each use.

They lie in $ZOKERN_CACHE, else in $XDG_CACHE_HOME/zokern, else in ~/.cache/zokern.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from zokern.finetune import failures, replacing
from zokern.finetune.options import FinetuneError

MANIFEST = "zokern-cache.json"
_PIECE = 1 << 22
_SEEN: dict[Path, tuple[int, int, str]] = {}  # files that this process has compared: a run looks at its model twice


def root() -> Path:
    """The cache, absolute; it may not be there yet."""
    if given := os.environ.get("ZOKERN_CACHE"):
        return Path(given).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()).absolute() / "zokern"


def kept(name: str, make: Callable[[Path], None], needs: int) -> Path:
    """The directory `name` of the cache. make: fills an empty directory, where there is none yet; needs: bytes for that.

    Raises FinetuneError where nothing can be written there, or where a file is not what was written.
    """
    place = root() / name
    if not place.exists():
        with failures.telling(f"the cache {root()} cannot be written", "set ZOKERN_CACHE to another directory"):
            root().mkdir(parents=True, exist_ok=True)
            with _alone(root()):
                if not place.exists():  # another process was first
                    replacing.sweep(root(), alone=False)  # what killed processes left
                    _room(needs)
                    _make(place, make)
    _check(place)
    return place


def sha256(path: Path) -> str:
    """Of a file, in hex."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            total.update(piece)
    return total.hexdigest()


def _room(needs: int) -> None:
    free = shutil.disk_usage(root()).free
    if free < needs:
        raise FinetuneError(
            f"the cache {root()} has {free / 1e6:,.0f} MB left, and {needs / 1e6:,.0f} are needed; make room, or set "
            "ZOKERN_CACHE to a directory on another disk"
        )


def _make(place: Path, make: Callable[[Path], None]) -> None:
    """A name appears only once all its files are on the disk: what was killed leaves a directory that nobody reads."""
    with replacing.fresh(root()) as work:
        new = work / "new"
        new.mkdir()
        make(new)
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(new.iterdir())}
        (new / MANIFEST).write_text(json.dumps(files, indent=1) + "\n")
        for path in new.iterdir():
            path.chmod(0o644)  # whoever shares the cache may read
        replacing.sync(new)
        try:
            new.rename(place)
        except OSError:
            if not place.exists():  # without locks another process may have been quicker
                raise


def _check(place: Path) -> None:
    """Every file of the manifest is what was written. Raises FinetuneError that names the file and the remedy."""
    again = f"remove {place}, and the next run makes it again"
    try:
        files = json.loads((place / MANIFEST).read_text())
        wanted = {str(name): (int(about["bytes"]), str(about["sha256"])) for name, about in files.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise FinetuneError(
            f"{place / MANIFEST} cannot be read ({failures.reason(error) or error}); {again}"
        ) from error
    for name, (size, digest) in wanted.items():
        path = place / name
        with failures.telling(f"{path} cannot be read", again):
            about = path.stat()
            if about.st_size != size:
                raise FinetuneError(f"{path} has {about.st_size:,} bytes, and {size:,} were written; {again}")
            seen = (about.st_ino, about.st_mtime_ns, digest)
            if _SEEN.get(path) != seen and sha256(path) != digest:
                raise FinetuneError(f"{path} is no longer what was written (its SHA-256 is another); {again}")
            _SEEN[path] = seen


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """One process at a time; on a file system without locks two may do the same work, and one result stays."""
    descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
