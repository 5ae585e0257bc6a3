"""Where a LightningModule looks at its weights between the steps of a fit: updates that wait (fold_every) are shown."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from zokern.integrations.shown import Shown
from zokern.optim import ZerothOrderOptimizer

_STAGES = ("validation", "test", "predict")
_WHEN = ("start", "epoch_start", "batch_start", "batch_end", "epoch_end", "end")
LOOKS = [f"{stage}_step" for stage in _STAGES] + [f"on_{stage}_{when}" for stage in _STAGES for when in _WHEN]


class _Look:
    """Of one module. optimizer: of its last fit, for as long as its Trainer has it."""

    def __init__(self) -> None:
        self.shown = Shown()
        self.optimizer: Callable[[], ZerothOrderOptimizer | None] = lambda: None


_LOOKS: weakref.WeakKeyDictionary[Any, _Look] = weakref.WeakKeyDictionary()  # apart: modules are copied and pickled


def _of(module: Any) -> _Look:
    return _LOOKS.setdefault(module, _Look())


def trains(module: Any, optimizer: ZerothOrderOptimizer) -> None:
    """A fit begins."""
    _of(module).optimizer = weakref.ref(optimizer)


def already(module: Any) -> AbstractContextManager[None]:
    """Of a step, whose forwards have what waits."""
    return _of(module).shown.already()


def fold(module: Any) -> None:
    """Adds what waits to the weights, unless that is never to be (fold_every=0)."""
    optimizer = _of(module).optimizer()
    if optimizer is not None and optimizer.fold_every:
        optimizer.fold()


def showing(written: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a module, with what waits."""

    @functools.wraps(written)
    def look(self: Any, *args: Any, **named: Any) -> Any:
        mine = _of(self)
        with mine.shown.by(mine.optimizer()):
            return written(self, *args, **named)

    return look
