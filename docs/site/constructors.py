"""An extension of griffe: the methods' constructors as users see them.

Their arguments come from declared settings (zokern/settings.py), when a class is made: a reader of the source sees
`*args, **named`. The classes themselves know better. Settings that all methods have are listed once, with their base class.
"""

from __future__ import annotations

import inspect
from typing import Any

import griffe

from zokern.optim import METHODS, ZerothOrderOptimizer
from zokern.optim.common import Common
from zokern.settings import REQUIRED, Setting, Settings

LIKE_ALL = "The other arguments are those of [every method][zokern.optim.ZerothOrderOptimizer]."


def parameter(one: inspect.Parameter) -> griffe.Parameter:
    return griffe.Parameter(
        one.name,
        annotation=None if one.annotation is REQUIRED else str(one.annotation),
        kind=griffe.ParameterKind[one.kind.name.lower()],
        default=None if one.default is REQUIRED else repr(one.default),
    )


def listed(cls: type[Settings]) -> dict[str, Setting]:
    """Of a method what it declares itself, also where it changes a common setting."""
    if cls is ZerothOrderOptimizer:
        return cls.settings
    return {name: one for name, one in cls.settings.items() if Common.settings.get(name) is not one}


def docstring(cls: type[Settings]) -> str:
    about = (inspect.getdoc(cls) or "").partition("\n\nArgs:\n")[0]
    own = [f"    {one.name}: {one.describe(default=False)}" for one in listed(cls).values()]
    more = [] if cls is ZerothOrderOptimizer else ["", LIKE_ALL]
    return "\n".join([about, *more, *(["", "Args:", *own] if own else [])])


class Constructors(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **rest: Any) -> None:
        if pkg.path != "zokern":
            return
        for cls in (ZerothOrderOptimizer, *METHODS.values()):
            if "__init__" in vars(cls):  # LeZO's is written out
                continue
            seen = pkg[f"{cls.__module__}.{cls.__qualname__}".removeprefix("zokern.")]
            seen.docstring = griffe.Docstring(docstring(cls), parent=seen)
            given = griffe.Parameters(*map(parameter, inspect.signature(cls).parameters.values()))
            seen.set_member("__init__", griffe.Function("__init__", parameters=given))
