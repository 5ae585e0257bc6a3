"""Arguments of a mixin's own, by name, in constructors of trainers that do not know them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from zokern.integrations import refused


def set_own(trainer: Any, named: dict[str, Any]) -> None:
    """Takes the mixin's (`OWN`) out of the arguments, and sets them as attributes."""
    for name in trainer.OWN:
        if name in named:
            setattr(trainer, name, named.pop(name))


def taking_own(cls: Any, mixin: Any) -> Callable[..., None]:
    """A constructor that takes the mixin's arguments before the trainer's own sees them."""
    inherited = cls.__init__

    @functools.wraps(inherited)
    def construct(self: Any, *args: Any, **named: Any) -> None:
        refused.trainer(cls)
        set_own(self, named)
        super(cls, self).__init__(*args, **named)

    theirs = inspect.signature(inherited)
    known = [one for one in theirs.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    ours = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=getattr(mixin, name))
        for name in mixin.OWN if name not in theirs.parameters
    ]  # fmt: skip
    rest = [one for one in theirs.parameters.values() if one.kind is inspect.Parameter.VAR_KEYWORD]
    construct.__signature__ = theirs.replace(parameters=[*known, *ours, *rest])  # type: ignore[attr-defined]
    return construct
