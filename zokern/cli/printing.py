"""What the command prints never ends it: characters that the terminal's encoding lacks are spelt out."""

from __future__ import annotations

import sys


def spell_out() -> None:
    """For both streams, from now on. PYTHONIOENCODING=ascii and names of files that are no text need it."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # a notebook's stream has none
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
