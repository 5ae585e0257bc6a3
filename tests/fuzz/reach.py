"""What an input reaches: each step from line to line of the journal's code, and each way in which it ends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import zokern.cli.journals
from tests.fuzz.targets import End, masked
from zokern import journal

Result = TypeVar("Result")
ROOT = Path(zokern.__file__).parent
FILES = {
    str(path): str(path.relative_to(ROOT))
    for path in [*Path(journal.__file__).parent.glob("*.py"), Path(zokern.cli.journals.__file__)]
}
Arc = tuple[str, int, int]  # a file, and two lines, one after the other; the first 0 where a function is entered


def traced(do: Callable[[], Result]) -> tuple[Result, set[Arc]]:
    """What it returns, and its arcs in FILES. Raises what it raises."""
    arcs: set[Arc] = set()

    def enter(frame: FrameType, event: str, arg: Any) -> Any:
        file = FILES.get(frame.f_code.co_filename)
        if file is None:
            return None
        last = 0

        def line(frame: FrameType, event: str, arg: Any) -> Any:
            nonlocal last
            if event == "line":
                arcs.add((file, last, frame.f_lineno))
                last = frame.f_lineno
            return line

        return line

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        return do(), arcs
    finally:
        sys.settrace(before)


def features(do: Callable[[], dict[str, End]]) -> set[Hashable]:
    """do: targets.all_of on an input."""
    ends, arcs = traced(do)
    return {*arcs, *((name, masked(end.refused)) for name, end in ends.items())}
