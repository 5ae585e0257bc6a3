"""Journals whose block is never left: at the end of the process what their runs have done is written, and it is said."""

from __future__ import annotations

import atexit
import os
import sys
from pathlib import Path

from zokern.journal.record import Recorder

_open: dict[Recorder, tuple[Path, int]] = {}  # with the process that writes


def add(recorder: Recorder | None, path: Path) -> None:
    if recorder is not None:
        _open[recorder] = path, os.getpid()


def discard(recorder: Recorder | None) -> None:
    if recorder is not None:
        _open.pop(recorder, None)


@atexit.register
def _finish() -> None:
    for recorder, (path, process) in list(_open.items()):
        if process == os.getpid():  # a fork's copy is its parent's to finish
            recorder.closed = True
            recorder.flush()
            print(
                f"zokern: {path}: the block that writes this journal was not left. All steps that were done are in it, "
                "without a hash of the result: replay it with verify=False (zokern replay --no-verify)",
                file=sys.stderr,
            )
