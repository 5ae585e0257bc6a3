"""Modules that have moved: their old names go on for one release, with a warning."""

from __future__ import annotations

import importlib
import sys
import warnings


def moved(old: str, new: str) -> None:
    """Makes the module called `old`, which is being imported, the one called `new`."""
    warnings.warn(
        f"{old} has moved to {new}; import that. The old name is gone in the next release",
        DeprecationWarning,
        stacklevel=3,
    )
    sys.modules[old] = importlib.import_module(new)
