"""A task of the convergence study that is done in no time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.convergence.tasks import Task

CONFIG = {"budget": 12, "batch_size": 3, "points": 2, "dry": 4, "sizes": [1e-3, 1e-2]}


class Toy(Task):
    """seen: how often it was evaluated."""

    seen = 0

    def __init__(self, width: int = 1) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__(nn.Linear(4, width))

    def batches(self, size: int, seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randn(size, 4, generator=generator)

    def loss(self, batch: Tensor) -> Tensor:
        return (self.model(batch) - batch.sum(1, keepdim=True)).square().mean()

    @torch.no_grad()
    def evaluate(self, part: str) -> dict[str, float]:
        self.seen += 1
        return {"loss": self.loss(torch.eye(4)).item()}

    def describe(self) -> dict[str, Any]:
        return {"what": "a sum", "parameters": 5}
