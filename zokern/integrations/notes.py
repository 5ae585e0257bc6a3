"""Warnings that come up inside a closure are raised when the step is over: as errors they leave a whole step behind."""

from __future__ import annotations

import warnings

from zokern._checks import ZokernWarning


class Notes:
    """One warning of each subject."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._pending: list[str] = []

    def add(self, subject: str, message: str) -> None:
        if subject not in self._known:
            self._known.add(subject)
            self._pending.append(message)

    def tell(self) -> None:
        """Raises what has come up."""
        pending, self._pending = self._pending, []
        for message in pending:
            warnings.warn(message, ZokernWarning, stacklevel=3)
