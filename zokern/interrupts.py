"""Ctrl-C between a pass and its bookkeeping would leave the weights perturbed and nobody knowing: it has to wait.

A step holds SIGINT back from its first line to its last and lets it through only while the user's closure runs, which is
where a step spends its time. What arrives elsewhere is delivered before the next closure, or after the step.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any


class HeldInterrupts:
    """Context manager. Only the main thread gets KeyboardInterrupt, so in any other it does nothing."""

    def __init__(self) -> None:
        self._handler: Any = None  # the user's, None while there is nothing to hold back
        self._received: tuple[int, FrameType | None] | None = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = (number, frame)

    def _deliver(self) -> None:
        received, self._received = self._received, None
        if received is not None and callable(self._handler):
            self._handler(*received)

    def __enter__(self) -> HeldInterrupts:
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):  # else ignored, the default action, or set from C: no Python code runs
                self._handler = handler
                signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._deliver()

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Inside, SIGINT does what it did before, and what was held back is delivered at the start."""
        if self._handler is None:
            yield
            return
        try:
            signal.signal(signal.SIGINT, self._handler)
            self._deliver()
            yield
        finally:
            self._handler = signal.getsignal(signal.SIGINT)  # the closure may have set another
            signal.signal(signal.SIGINT, self._note)
