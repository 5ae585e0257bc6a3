"""What the command prints never ends it: characters that the terminal's encoding lacks are spelt out. And what it warns of
is for people, without the line of code that warns.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any


def spell_out() -> None:
    """For both streams, from now on. PYTHONIOENCODING=ascii and names of files that are no text need it."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # a notebook's stream has none
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """zokern's own warnings are one line of text in the block; others are as before."""
    before = warnings.formatwarning

    def shown(message: Warning | str, category: type[Warning], *where: Any, **line: Any) -> str:
        if category.__name__ == "ZokernWarning":  # by name: its module imports torch
            return f"WARNING: {message}\n"
        return before(message, category, *where, **line)

    warnings.formatwarning = shown
    try:
        yield
    finally:
        if warnings.formatwarning is shown:
            warnings.formatwarning = before
