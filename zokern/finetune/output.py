"""The files of a run: options.json, metrics.jsonl and journal.zkj while it runs; checkpoint/, curves.png and run.json at
its end.

Whole files only: each is written under a temporary name and then renamed, so that a crash leaves no half of one.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn

_NAMES = ("checkpoint", "metrics.jsonl", "curves.png", "run.json", "options.json", "journal.zkj")


class Output:
    """The output directory. `records` are the lines written to metrics.jsonl so far."""

    def __init__(self, directory: Path, resumed_at: int | None = None) -> None:
        """Makes the directory and removes what an earlier run of ours left there; other files stay.

        resumed_at: keeps a run that broke off, with the lines of its metrics up to that step.
        """
        self.directory = directory
        self.records: list[dict[str, Any]] = []
        directory.mkdir(parents=True, exist_ok=True)
        if resumed_at is not None:
            self._keep(resumed_at)
            return
        for name in _NAMES:
            path = directory / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        self._metrics = (directory / "metrics.jsonl").open("w", encoding="utf-8")

    def _keep(self, step: int) -> None:
        kept = []
        for line in (self.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                break  # cut off while it was written
            if record["step"] <= step:
                kept.append(record)
        temporary = self.directory / "metrics.jsonl.tmp"
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(temporary, self.directory / "metrics.jsonl")
        self.records = kept
        self._metrics = (self.directory / "metrics.jsonl").open("a", encoding="utf-8")

    @property
    def journal(self) -> Path:
        """Where the journal goes."""
        return self.directory / "journal.zkj"

    @property
    def checkpoint(self) -> Path:
        """Where the model and its tokenizer go."""
        return self.directory / "checkpoint"

    @property
    def curves(self) -> Path:
        """Where the plot goes."""
        return self.directory / "curves.png"

    def log(self, record: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl and flush it. A value that is not finite becomes null: JSON has no NaN."""
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.records.append(record)
        self._metrics.write(json.dumps(record, allow_nan=False) + "\n")
        self._metrics.flush()

    def save_model(self, model: nn.Module, tokenizer: Any) -> None:
        """checkpoint/, as from_pretrained loads it."""
        temporary = self.directory / "checkpoint.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        saveable: Any = model
        saveable.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        shutil.rmtree(self.checkpoint, ignore_errors=True)
        os.replace(temporary, self.checkpoint)

    def save_json(self, name: str, value: dict[str, Any]) -> None:
        """A JSON file in the directory."""
        temporary = self.directory / f"{name}.tmp"
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self.directory / name)

    def close(self) -> None:
        """Close metrics.jsonl."""
        self._metrics.close()
