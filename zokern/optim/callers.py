"""The line of the user's that a warning points at."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

_OURS = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))  # whose lines no warning points at


def level() -> int:
    """The stacklevel for warnings.warn in the function that calls this: of the first line that is not ours or torch's."""
    frame: Any = sys._getframe(1)
    depth = 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame, depth = frame.f_back, depth + 1
    return depth
