"""The output of a run on the ranks that write nothing: the first one has the directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from zokern.finetune.output import Output
from zokern.finetune.records import Record, plain


class Elsewhere(Output):
    """Keeps the lines of metrics.jsonl in memory, by which a run sees what it has done, and nothing else."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.records: list[Record] = []
        self.saved = self.incomplete = self.journaled = False
        self.lost: list[str] = []

    @property
    def resumable(self) -> bool:
        """Whether --resume can go on is for the first rank to say."""
        return False

    def begin(self, options: dict[str, Any]) -> None: ...

    def save_options(self, options: dict[str, Any]) -> None: ...

    def watch_journal(self) -> None: ...

    def log(self, record: Record) -> None:
        """Append a line."""
        self.records.append(plain(record))

    def save_model(self, model: nn.Module, tokenizer: Any) -> None: ...

    def save_json(self, name: str, value: dict[str, Any]) -> None: ...

    def save_curves(self, draw: Callable[[Path], None]) -> None: ...

    def look(self) -> None: ...

    def mend(self) -> None: ...

    def complete(self) -> None: ...

    def abandon(self) -> bool:
        """Nothing has been done here."""
        return True

    def close(self) -> None: ...
