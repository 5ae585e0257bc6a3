"""Ctrl-C and the signals by which systems end programs: a run finishes its step, saves, and says what it has."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A run was stopped and has not saved its result; the message says what there is. code: the command's exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Stop:
    """Signals as a flag, for as long as a run is to finish what it is at; `asked` is the first that came.

    Before `finishing` is set, and at a Ctrl-C that follows another signal, KeyboardInterrupt is raised where the program
    stands. SIGTERM and SIGHUP may come several times, as systems send them, and do no more than the first. Where they are
    ignored, as nohup has it, they stay ignored. Off outside the main thread, where Python allows no handlers.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self.finishing = False

    @property
    def name(self) -> str:
        """What stopped the run, for people."""
        return "Ctrl-C" if self.asked in (None, signal.SIGINT) else signal.Signals(self.asked).name

    @property
    def code(self) -> int:
        """The exit code: 128 and the signal's number, as shells have it."""
        return 128 + (self.asked or signal.SIGINT)

    @contextmanager
    def installed(self) -> Iterator[Stop]:
        """The handlers, for the length of a block."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in before.items():
            if number == signal.SIGINT or handler not in (signal.SIG_IGN, None):
                signal.signal(number, self._ask)
        try:
            yield self
        finally:
            for number, handler in before.items():
                if handler is not None and signal.getsignal(number) == self._ask:
                    signal.signal(number, handler)

    def raise_if_asked(self) -> None:
        """Raise KeyboardInterrupt after a signal: where a step is left with its weights known."""
        if self.asked is not None:
            raise KeyboardInterrupt

    def _ask(self, number: int, _: FrameType | None) -> None:
        first = self.asked is None
        if first:
            self.asked = number
        if not self.finishing or (number == signal.SIGINT and not first):
            raise KeyboardInterrupt
