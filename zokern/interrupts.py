"""A signal between a pass and its bookkeeping would leave the weights perturbed and nobody knowing: it has to wait.

Python runs a signal's handler between two lines of whatever the main thread does, and a handler may raise: Ctrl-C does, and
so do many handlers of SIGTERM and SIGALRM. A step holds back every signal that has a handler in Python, from its first line
to its last, and lets them through only while the user's closure runs, which is where a step spends its time. What arrives
elsewhere is delivered before the next closure, or after the step, in the order of arrival. Signals that are ignored, or do
what the system does by default, run no Python code and are left alone.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` without its enums, which take ten times as long
import itertools
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]
NUMBERS = sorted(int(number) for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})
_PLACES = range(len(NUMBERS))


class Waiting:
    """Stands in for a handler: what arrives while signals are held is noted, anything else goes straight on to it. So it
    does no harm where it stays: a closure may have kept it to put it back later."""

    __slots__ = ("handler", "interrupts")
    handler: Handler
    interrupts: HeldInterrupts

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.interrupts.holding:
            self.interrupts.received.setdefault(number, (self.handler, frame))
        else:
            self.handler(number, frame)


class HeldInterrupts:
    """Context manager. Only the main thread runs handlers, so in any other it does nothing.

    holding: whether signals wait. It is set by one assignment, before which a signal is let through and after which it
    waits; so who releases holds again by `holding = True` at the beginning of a `finally`, and then calls `hold`.

    Several handlers are set in one call, between whose parts no line of Python runs.
    """

    def __init__(self) -> None:
        self.holding = self.over = False
        self.received: dict[int, tuple[Handler, FrameType | None]] = {}
        self._main = threading.current_thread() is threading.main_thread()
        self._seen: list[Any] = []
        self._taken: dict[int, Waiting] = {}  # by their places in NUMBERS

    def __enter__(self) -> HeldInterrupts:
        try:
            if self._main:
                self._take(list(map(_signal.getsignal, NUMBERS)))
            self.holding = True
        except BaseException:  # of a handler: nothing is held yet, so nothing can be lost
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.over, put = True, {}
            for i, waiting in self._taken.items():
                if _signal.getsignal(NUMBERS[i]) is waiting:
                    put[NUMBERS[i]] = waiting.handler
            list(map(_signal.signal, put, put.values()))
        finally:
            self.holding = False
            if self.received:
                self._deliver()

    def release(self) -> None:
        """From now on signals do what they did before; what was held back is delivered."""
        self.holding = False
        if self.received:
            self._deliver()

    def hold(self) -> None:
        """From now on signals wait, also those whose handlers the closure has set."""
        self.holding = True
        if self._main:
            handlers = list(map(_signal.getsignal, NUMBERS))
            if handlers != self._seen:
                self._take(handlers)

    def _take(self, handlers: list[Any]) -> None:
        """A `Waiting` in the place of every handler that is none of ours."""
        put = {}
        for i in itertools.compress(_PLACES, map(callable, handlers)):
            if handlers[i] is not self._taken.get(i):
                handler = handlers[i]
                while isinstance(handler, Waiting) and handler.interrupts.over:  # one that stayed
                    handler = handler.handler
                waiting = Waiting()
                waiting.handler, waiting.interrupts = handler, self
                handlers[i] = self._taken[i] = put[NUMBERS[i]] = waiting
        list(map(_signal.signal, put, put.values()))
        self._seen = handlers

    def _deliver(self) -> None:
        """All that was held back, also where the handler of one raises."""
        while self.received:
            number = next(iter(self.received))
            handler, frame = self.received.pop(number)
            try:
                handler(number, frame)
            finally:
                if self.received:
                    self._deliver()
