"""Warnings that come up inside a closure are raised when the step is over: as errors they leave a whole step behind."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from zokern._checks import ZokernWarning


class Notes:
    """One warning of each subject."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._pending: list[str] = []
        self._silent = False

    def add(self, subject: str, message: str) -> None:
        if subject not in self._known and not self._silent:
            self._known.add(subject)
            self._pending.append(message)

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Inside, what comes up is nothing that the user should know."""
        before, self._silent = self._silent, True
        try:
            yield
        finally:
            self._silent = before

    def tell(self) -> None:
        """Raises what has come up."""
        pending, self._pending = self._pending, []
        for message in pending:
            warnings.warn(message, ZokernWarning, stacklevel=3)
