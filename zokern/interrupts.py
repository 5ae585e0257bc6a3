"""Ctrl-C between a pass and its bookkeeping would leave the weights perturbed and nobody knowing: it has to wait."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds SIGINT back until the block has ended. Only the main thread gets KeyboardInterrupt, so others pass through."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    old = signal.getsignal(signal.SIGINT)
    if not callable(old):  # ignored, the default action, or set from C: no Python code runs, nothing can be torn
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)
        if received:
            old(*received[-1])
