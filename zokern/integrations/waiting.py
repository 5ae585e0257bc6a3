"""Micro-batches that wait for the step that is made over all of them."""

from __future__ import annotations

import warnings
from typing import Any

from zokern import _checks
from zokern._checks import ZokernWarning


class Waiting:
    """Of one optimizer. weights: of each batch, or none at all. options: the step's, the same for all its micro-batches."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.weights: list[float] = []
        self.options: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.batches)

    def and_one(self, batch: Any, weight: object, options: dict[str, Any]) -> Waiting:
        """These and one more. `self` stays as it is.

        Raises:
            TypeError, ValueError: for a weight that is no number of at least 0; for a weight or options that the
                micro-batches before do not have.
        """
        weights = [] if weight is None else [_checks.check_number(weight, "weight", 0.0)]
        if self.batches and bool(weights) != bool(self.weights):
            raise ValueError(
                f"weight is {weight!r}, and the {len(self)} micro-batches before it in this step have "
                f"{'weights' if self.weights else 'none'}; give one to each of a step's micro-batches, or to none"
            )
        for name, value in options.items():
            if self.batches and value != self.options[name]:
                raise ValueError(
                    f"{name} is {value!r}, and was {self.options[name]!r} for the micro-batches before it in this step; "
                    "give the same to all of them"
                )
        more = Waiting()
        more.batches, more.weights = [*self.batches, batch], [*self.weights, *weights]
        more.options = dict(options)
        return more

    def become(self, other: Waiting) -> None:
        self.batches, self.weights, self.options = other.batches, other.weights, other.options

    def tell(self, when: str, remedy: str) -> None:
        """Warns of micro-batches that no step will use."""
        if self.batches:
            count = len(self)
            warnings.warn(
                f"{when}, {count} micro-batch{'es' if count > 1 else ''} had been collected that no step has used; "
                f"{remedy}",
                ZokernWarning,
                stacklevel=3,
            )
