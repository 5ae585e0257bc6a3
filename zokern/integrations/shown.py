"""Updates that wait (fold_every) where a framework looks at the model between steps: shown for as long as it looks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from zokern.optim import ZerothOrderOptimizer

# Callbacks of TRL that write completions or copy weights, and when they do so.
READERS = {
    "LogCompletionsCallback": "on_step_end",
    "WeaveCallback": "on_evaluate",
    "SyncRefModelCallback": "on_step_end",
}


class Shown:
    """Of one trainer. An evaluation calls others, and a step's forwards have what waits: inside, again is nothing."""

    def __init__(self) -> None:
        self.inside = False

    @contextlib.contextmanager
    def by(self, optimizer: ZerothOrderOptimizer | None) -> Iterator[None]:
        """Inside, the module computes with what waits in the optimizer, if there is one. A step inside is refused."""
        if optimizer is None or self.inside:
            yield
            return
        with self.already(), optimizer.folded():
            yield

    @contextlib.contextmanager
    def already(self) -> Iterator[None]:
        """Of a step."""
        before, self.inside = self.inside, True
        try:
            yield
        finally:
            self.inside = before


def around(cls: type, name: str, context: Callable[[Any], AbstractContextManager[None]]) -> None:
    """Runs a method of a class inside context(self): the class's own, or whichever comes next in the order of bases, also
    where that calls no super()."""
    own = vars(cls).get(name)
    if hasattr(own, "_of_zokern"):
        return

    @functools.wraps(getattr(cls, name))
    def method(self: Any, *args: Any, **named: Any) -> Any:
        with context(self):
            if own is not None:
                return own(self, *args, **named)
            return getattr(super(cls, self), name)(*args, **named)

    method._of_zokern = True  # type: ignore[attr-defined]
    type.__setattr__(cls, name, method)


def readers(callbacks: Iterable[Any], context: Callable[[], AbstractContextManager[None]]) -> None:
    """Runs TRL's callbacks that look at the model between steps inside context()."""
    for one in callbacks:
        event = next((READERS[c.__name__] for c in type(one).__mro__ if _is_trls(c) and c.__name__ in READERS), None)
        if event is not None:
            vars(one).pop(event, None)  # of another trainer
            setattr(one, event, _inside(getattr(one, event), context))


def _is_trls(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "trl"


def _inside(written: Callable[..., Any], context: Callable[[], AbstractContextManager[None]]) -> Callable[..., Any]:
    @functools.wraps(written)
    def method(*args: Any, **named: Any) -> Any:
        with context():
            return written(*args, **named)

    return method
