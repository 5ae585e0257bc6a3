"""Where compiled things are kept between runs: $ZOKERN_PTX_CACHE, or a folder of the user's in the temporary folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ENVIRONMENT = "ZOKERN_PTX_CACHE"


def folder() -> Path:
    """It is made where it is not there. Code is loaded from it, so another user's is refused."""
    named = os.environ.get(ENVIRONMENT)
    path = Path(named) if named else Path(tempfile.gettempdir()) / f"zokern-ptx-{os.getuid()}"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise PermissionError(f"{path} belongs to another user; name a folder of yours in ${ENVIRONMENT}")
    return path


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A file to be written, which then gets its name at once: processes that share the cache see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f"{path.name}-", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
