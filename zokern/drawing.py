"""matplotlib for pictures in files, whatever the surroundings want of it: no window system, no caller's setting changed."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any


def load() -> Any:
    """matplotlib. A notebook hands MPLBACKEND down to its shell commands, and where the backend it names is not installed,
    importing matplotlib fails; so it is imported without, and set afterwards as the variable says where that is possible.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    if "matplotlib" in sys.modules:
        import matplotlib

        return matplotlib
    wanted = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if wanted is not None:
            os.environ["MPLBACKEND"] = wanted
    if wanted:
        with contextlib.suppress(
            ValueError, ImportError
        ):  # a backend that is not here: matplotlib tells who asks for it
            matplotlib.rcParams["backend"] = wanted
    return matplotlib


def figure(**settings: Any) -> Any:
    """A figure that is drawn by Agg. Not pyplot's: its global state belongs to the caller."""
    load()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(**settings)
    FigureCanvasAgg(made)
    return made


def plain(text: Any, value: str) -> None:
    """Sets a matplotlib text to a value as it stands: a $ is a $, and what has no encoding is spelt out."""
    text.set_parse_math(False)
    text.set_text(value.encode("utf-8", "backslashreplace").decode("utf-8"))
