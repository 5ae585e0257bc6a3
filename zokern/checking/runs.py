"""Evaluates the closure as a step does, from the same surroundings each time."""

from __future__ import annotations

import numbers
import time
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from zokern._checks import ZokernWarning
from zokern.checking.around import Around
from zokern.interrupts import HeldInterrupts
from zokern.optim.losses import Closure, Losses
from zokern.sweep import Counters

REPEATS = 8  # evaluations that show how large the noise is


SIXTEEN = (torch.bfloat16, torch.float16)


class Runs:
    """dtypes: of the losses that the closure returned. seconds: of the fastest evaluation after the first. held: the 16-bit
    formats that have had all of them; of numbers with 24 bits, one in 65,536 is in bfloat16 too. values: different losses.
    """

    def __init__(
        self,
        around: Around,
        interrupts: HeldInterrupts,
        closure: Closure,
        batches: Iterable[Any] | None,
        *,
        vectors: bool,
        **of_batches: Any,
    ) -> None:
        self.around, self.interrupts = around, interrupts
        self.dtypes: dict[torch.dtype, None] = {}
        self.held, self.values = list(SIXTEEN), set[float]()
        self.counters, self.seconds = Counters(), float("inf")
        self.first: float | None = None
        self.losses = Losses(closure, batches, vectors=vectors, **of_batches)
        self.closure = closure
        self.losses.closure = self._watched

    @property
    def coarse(self) -> torch.dtype | None:
        """The 16-bit format that the losses are in: their dtype, or what they were in before they were cast."""
        declared = next((dtype for dtype in self.dtypes if dtype in SIXTEEN), None)
        if declared is None and len(self.values) > 1 and not all(value.is_integer() for value in self.values):
            return self.held[0] if self.held else None
        return declared

    @property
    def batches(self) -> int:
        return 1 if self.losses.batches is None else len(self.losses.batches)

    def _watched(self, *arguments: Any) -> Any:
        returned = self.closure(*arguments)
        for loss in returned.values() if isinstance(returned, Mapping) else (returned,):
            if isinstance(loss, Tensor):
                self.dtypes[loss.dtype] = None
                self.held = [dtype for dtype in self.held if bool((loss.to(dtype) == loss).all())]
            elif isinstance(loss, numbers.Real):  # NumPy's too
                number = float(loss)
                self.held = [
                    dtype for dtype in self.held if float(torch.tensor(number, dtype=dtype, device="cpu")) == number
                ]
        return returned

    def __call__(self, *, rewind: bool = True) -> Tensor:
        """The loss, float64, 0-d, or of each example."""
        if rewind:
            self.around.rewind()
        begun = time.perf_counter()
        try:
            self.interrupts.release()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ZokernWarning)  # the result says itself what they would
                loss = self.losses.evaluate(self.counters)
        finally:
            self.interrupts.hold()
            self.losses.named.clear()
        if loss.device.type != "cpu":
            loss = loss.cpu()
        took = time.perf_counter() - begun
        self.values.add(float(loss.mean()))
        if self.first is None:
            self.first = took
        else:
            self.seconds = min(self.seconds, took)
        return loss


class Reacting:
    """Whether a loss is another than that of the clean weights: another bit, or further off than the noise.

    base: the loss of the clean weights. noise: the spread of REPEATS of them, 0.0 where all agree to the bit.
    """

    def __init__(self, runs: Runs) -> None:
        self.base = runs()
        again = runs()
        runs.around.look()
        self.same_twice = _equal(self.base, runs(rewind=False))
        self.low = self.high = float(self.base.mean())
        self.exact = _equal(self.base, again)
        if not self.exact and self.finite:
            every = [self.low, float(again.mean()), *(float(runs().mean()) for _ in range(REPEATS - 2))]
            self.low, self.high = min(every), max(every)

    @property
    def finite(self) -> bool:
        return bool(torch.isfinite(self.base).all())

    @property
    def noise(self) -> float:
        return self.high - self.low

    def __call__(self, loss: Tensor) -> bool:
        """Noise alone passes the spread of eight by as much again in one of some ten thousand cases, if it is normal."""
        if self.exact:
            return not _equal(self.base, loss)
        value = float(loss.mean())
        return not self.low - self.noise <= value <= self.high + self.noise

    def change(self, loss: Tensor) -> float:
        return float((loss - self.base).abs().max()) if loss.shape == self.base.shape else float("nan")


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)
