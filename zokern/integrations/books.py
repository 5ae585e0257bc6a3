"""What a trainer counts in its compute_loss is counted once for each micro-batch, however many forwards a step takes."""

from __future__ import annotations

from typing import Any

NUMBERS = (int, float)
LISTS = "_metrics"  # TRL's: {"train": {name: values since the last log}}


class Books:
    """Of one step: as the first forward over all micro-batches has left them, so are they in the end. Lists of metrics then
    hold that forward's, at weights perturbed by eps z.

    batches: how many micro-batches there are.
    """

    def __init__(self, trainer: Any, batches: int) -> None:
        self._trainer, self._left = trainer, batches
        self._numbers: dict[str, Any] | None = None
        self._lists: dict[str, dict[str, list[Any]]] = {}

    def counted(self) -> None:
        """A forward of one micro-batch has been made."""
        self._left -= 1
        if self._left == 0:
            own = vars(self._trainer)
            self._numbers = {name: value for name, value in own.items() if type(value) in NUMBERS}
            self._lists = {
                mode: {name: list(values) for name, values in metrics.items()}
                for mode, metrics in own.get(LISTS, {}).items()
            }

    def put_back(self) -> None:
        """The step is over."""
        if self._numbers is None:
            return
        own = vars(self._trainer)
        own.update(self._numbers)
        for mode, metrics in own.get(LISTS, {}).items():
            kept = self._lists.get(mode, {})
            for name in [name for name in metrics if name not in kept]:
                del metrics[name]
            metrics.update(kept)
