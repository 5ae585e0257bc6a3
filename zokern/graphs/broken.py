"""What to say of a step that could not be captured: the reason, the line that broke the capture, and the remedy."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

import torch

import zokern

INSIDE = tuple(str(Path(module.__file__ or "").parent) + "/" for module in (torch, zokern))
PYTHON = sysconfig.get_path("stdlib")


def explain(error: BaseException) -> str:
    what, *_ = [*str(error).strip().splitlines(), type(error).__name__]  # CUDA gives advice on further lines
    line = line_of(error)
    told = f"{what}. It came from {line}" if line else what
    return (
        f"the step could not be captured in a CUDA graph: {told}. The closure must not wait for the device (.item(), "
        "printing), move tensors between host and device, or call what cannot be captured; "
        "optimizer.step(lambda: closure(batch)) works without a graph"
    )


def line_of(error: BaseException) -> str:
    """The last line outside Python, PyTorch and zokern that was under way, with its file and function; "" for none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        of_python = frame.filename.startswith(PYTHON) and "-packages" not in frame.filename
        if not frame.filename.startswith(INSIDE) and not frame.filename.startswith("<") and not of_python:
            return f"{frame.filename}:{frame.lineno} in {frame.name}" + (f": {frame.line}" if frame.line else "")
    return ""
