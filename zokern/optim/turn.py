"""One thing at a time: a step inside a step, or in two threads, would move weights that the other has perturbed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import NoReturn


class Turn:
    """Of one optimizer: who has the lock has it alone, and any other is refused, and never waits. taken: what for, and by
    which thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.taken = "step", 0

    def refuse(self, what: str) -> NoReturn:
        """
        Raises:
            RuntimeError: always; nothing has been changed.
        """
        at, who = self.taken
        if who == threading.get_ident():
            raise RuntimeError(
                f"{what} was called inside a {at} of the same optimizer; a closure returns a loss instead, and whatever "
                "changes the optimizer comes before the step or after it"
            )
        raise RuntimeError(
            f"{what} was called while another thread is in a {at} of the same optimizer; give each thread an optimizer and "
            "weights of its own, or let one wait for the other"
        )

    @contextlib.contextmanager
    def of(self, what: str) -> Iterator[None]:
        if not self.lock.acquire(blocking=False):
            self.refuse(what)
        try:
            self.taken = what, threading.get_ident()
            yield
        finally:
            self.lock.release()
