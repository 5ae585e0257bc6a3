"""How losses of a step's micro-batches go together: shares of one mean are added, of means of their own the mean is taken.

transformers takes them for shares wherever a model's forward has room for num_items_in_batch. Many have room and leave it
alone, its classifiers for instance, whose loss is a mean. Adam hides that their sum is k times the mean; a zeroth-order
step would be k times as long.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zokern._checks import ZokernWarning
from zokern.integrations.books import Books

THEIRS = ("transformers.", "trl.", "sentence_transformers.", "zokern.")


class Shares:
    """Of one training. Whether a loss is divided by num_items_in_batch is tried once, by two forwards of a micro-batch."""

    def __init__(self) -> None:
        self._added: bool | None = None

    def added(self, trainer: Any, batches: list[Any], count: Any) -> bool:
        """Of losses that the Trainer takes for shares: whether to add them. count: num_items_in_batch. Every rank calls."""
        if self._added is None and count is not None:
            found = [] if not batches else _heeds(trainer, batches[0], count)
            every = trainer.of_all_ranks({"heeds": found}).get("heeds")
            if every:
                self._added = all(every) or self._is_own(trainer, len(batches))
        return self._added is not False

    @staticmethod
    def _is_own(trainer: Any, batches: int) -> bool:
        """Of a loss that does not heed the count: whether it is the user's, who may have divided it."""
        own = trainer.compute_loss_func is not None or not type(trainer).compute_loss.__module__.startswith(THEIRS)
        if own:
            warnings.warn(
                "your loss of a micro-batch does not depend on num_items_in_batch, and the Trainer adds the losses of the "
                f"{batches} micro-batches of a step. If yours is a mean, so that their sum makes steps {batches} times as "
                "long, set trainer.loss_is_scaled_for_ga = False before train(); if you divide it yourself, set it to True",
                ZokernWarning,
                stacklevel=2,
            )
        return own


def _heeds(trainer: Any, batch: Any, count: Any) -> list[float]:
    """Whether the loss is another one for twice the count: 1 or 0, or nothing where it is no number. Nothing draws, and
    nothing is counted or kept."""
    model = trainer.model
    modes = [(module, module.training) for module in model.modules()]
    books = Books(trainer, 1)
    books.counted()
    try:
        model.eval()
        with torch.no_grad(), trainer.compute_loss_context_manager(), trainer.forward_alone():
            once, twice = (_number(trainer.probe(model, copy.copy(batch), n)) for n in (count, 2 * count))
    finally:
        books.put_back()
        for module, training in modes:
            module.training = training
    return [float(once != twice)] if math.isfinite(once) else []


def _number(loss: Any) -> float:
    if isinstance(loss, Mapping):
        return sum(map(_number, loss.values()))
    return float(loss.detach().double().sum() if isinstance(loss, Tensor) else loss)
