"""One thing at a time: a step inside a step, or in two threads, would move weights that the other has perturbed."""

from __future__ import annotations

import threading
from types import TracebackType


class Turn:
    """Of one optimizer. `with turn("step"):` is entered by one at a time; any other is refused, and never waits.

    Raises:
        RuntimeError: before anything is changed, where the optimizer is at something else.
    """

    def __init__(self, optimizer: str) -> None:
        self._optimizer = optimizer
        self._lock = threading.Lock()
        self._what, self._who = "", 0

    def __call__(self, what: str) -> Turn:
        if not self._lock.acquire(blocking=False):
            if self._who == threading.get_ident():
                raise RuntimeError(
                    f"{what} was called inside a {self._what} of the same optimizer; a closure returns a loss instead, and "
                    "whatever changes the optimizer comes before the step or after it"
                )
            raise RuntimeError(
                f"{what} was called while another thread is in a {self._what} of the same optimizer ({self._optimizer}); "
                "give each thread an optimizer and weights of its own, or let one wait for the other"
            )
        self._what, self._who = what, threading.get_ident()
        return self

    def __enter__(self) -> None:
        """Entered by the call already."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()
