"""What a launch did: how much, and what of it was wrong."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Report:
    faults: Counter[str] = field(default_factory=Counter)  # by kind and instruction
    examples: dict[str, str] = field(default_factory=dict)
    runs: Counter[int] = field(default_factory=Counter)  # of each block that ran, counted for each thread
    instructions: int = 0  # counted for each thread
    steps: int = 0  # counted for each group of threads

    def fault(self, kind: str, text: str, count: int, example: str) -> None:
        key = f"{kind}: {text}"
        self.faults[key] += int(count)
        self.examples.setdefault(key, example)

    @property
    def blocks(self) -> set[int]:
        """That ran."""
        return set(self.runs)

    @property
    def kinds(self) -> set[str]:
        return {key.partition(":")[0] for key in self.faults}

    def told(self) -> list[str]:
        return [f"{key} ({count} times; {self.examples[key]})" for key, count in self.faults.items()]
