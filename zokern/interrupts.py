"""Ctrl-C between a pass and its bookkeeping would leave the weights perturbed and nobody knowing: it has to wait.

A step holds SIGINT back from its first line to its last and lets it through only while the user's closure runs, which is
where a step spends its time. What arrives elsewhere is delivered before the next closure, or after the step.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class HeldInterrupts:
    """Context manager. Only the main thread gets KeyboardInterrupt, so in any other it does nothing."""

    def __init__(self) -> None:
        self._handler: Any = None  # the user's, None while there is nothing to hold back
        self._received: tuple[int, FrameType | None] | None = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = (number, frame)

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
        self.release()

    def release(self) -> None:
        """From now on SIGINT does what it did before; what was held back is delivered."""
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            received, self._received = self._received, None
            if received is not None:
                self._handler(*received)

    def hold(self) -> None:
        """From now on SIGINT waits. Those who release have to hold again, also after an exception."""
        if self._handler is not None:
            handler = signal.getsignal(signal.SIGINT)  # the closure may have set another
            self._handler = handler if callable(handler) else None
            if self._handler is not None:
                signal.signal(signal.SIGINT, self._note)
