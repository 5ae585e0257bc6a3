"""Arguments of a mixin's own, by name, in constructors of trainers that do not know them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from zokern.integrations import refused

# Arguments that are True or False, and what they do.
BOOLS = {
    "journal": "True writes args.output_dir/journal.zkj, which is always its place, False writes none",
    "dropout": "True leaves it as the model has it, with the model's probability, False leaves it out",
}


def set_own(trainer: Any, named: dict[str, Any]) -> None:
    """Takes the mixin's (`OWN`) out of the arguments, and sets them as attributes.

    Raises:
        TypeError: for one of BOOLS that is something else, also where a class has it as an attribute.
    """
    for name in trainer.OWN:
        if name in named:
            setattr(trainer, name, named.pop(name))
        if name in BOOLS and not isinstance(value := getattr(trainer, name), bool):
            raise TypeError(f"{name} is {value!r}; it must be True or False: {BOOLS[name]}")


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
