"""A bar on standard error while a check runs, where that is a terminal."""

from __future__ import annotations

import sys


class Progress:
    """total: tensors."""

    def __init__(self, total: int, wanted: bool) -> None:
        self.total = total
        self.wanted = wanted and sys.stderr.isatty()

    def __enter__(self) -> Progress:
        if self.wanted:
            from rich.console import Console
            from rich.progress import Progress as Bar

            self.bar = Bar(console=Console(stderr=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task("zokern.check", total=self.total)
        return self

    def __exit__(self, *_: object) -> None:
        if self.wanted:
            self.bar.stop()

    def advance(self, name: str) -> None:
        """One tensor more has been looked at."""
        if self.wanted:
            self.bar.update(self.task, advance=1)
