"""Which method takes which option of the command. An option that several methods take may differ in meaning and default."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from zokern.kinds import SHARE, Kind
from zokern.optim import METHODS
from zokern.optim.common import Common
from zokern.settings import REQUIRED, Setting, shown


class Taker(NamedTuple):
    """Methods for which an option is the same setting. part: its place, in a setting that several options make up."""

    methods: tuple[str, ...]
    setting: Setting
    part: int | None

    @property
    def kind(self) -> Kind:
        return self.setting.kind if self.part is None else SHARE

    @property
    def default(self) -> Any:
        return self.setting.default if self.part is None else self.setting.default[self.part]

    def meaning(self, name: str) -> str:
        """What it does, and what it may be."""
        if self.part is None:
            return self.setting.describe(default=False)
        return f"{self.setting.parts[name]}, {self.kind.in_words}."


def _find() -> dict[str, list[Taker]]:
    found: dict[str, list[Taker]] = {}
    for method, cls in METHODS.items():
        for one in cls.settings.values():
            for name, part in options(one):
                same = found.setdefault(name, [])
                for i, taker in enumerate(same):
                    if _alike(taker.setting, one):
                        same[i] = taker._replace(methods=(*taker.methods, method))
                        break
                else:
                    same.append(Taker((method,), one, part))
    return found


def options(one: Setting) -> Iterator[tuple[str, int | None]]:
    """The options that stand for a setting, and their places in it."""
    if one.parts:
        yield from ((name, i) for i, name in enumerate(one.parts))
    elif one.flags is not None:
        yield one.name, None


def _alike(a: Setting, b: Setting) -> bool:
    return (a.help, a.kind, a.default, a.parts) == (b.help, b.kind, b.default, b.parts)


TAKERS = _find()  # by the option's name
# What a run chooses by what it trains: None stands for that. Its default is the class's, but for adapters (adapters.py).
CHOSEN = ("eps",)
COMMON = tuple(name for name in TAKERS if name in Common.settings)


def methods(name: str) -> list[str]:
    """All that take an option."""
    return [method for method in METHODS if any(method in taker.methods for taker in TAKERS[name])]


def kind(name: str, method: str) -> Kind | None:
    """What an option may be for a method; None if it is none of its settings."""
    return next((taker.kind for taker in TAKERS[name] if method in taker.methods), None)


def default(name: str) -> Any:
    """Of the option: that of all methods, where they have the same; else None, which stands for each method's own."""
    first = TAKERS[name][0].default
    return first if name in COMMON and name not in CHOSEN and len(TAKERS[name]) == 1 and first is not REQUIRED else None


def help(name: str) -> str:
    """What the option does for each method, and the defaults where they are not the option's."""
    told: dict[str, list[Taker]] = {}
    for taker in TAKERS[name]:
        told.setdefault(taker.meaning(name), []).append(taker)
    texts = []
    for meaning, same in told.items():
        whose = "" if name in COMMON else f"{_names(same)}: "
        texts.append(f"{whose}{meaning}")
        if default(name) is None and same[0].default not in (None, REQUIRED):
            rest = "".join(f"; {_names([taker])} {shown(taker.default)}" for taker in same[1:])
            texts.append(f"Default: {shown(same[0].default)}{rest}.")
    return " ".join(texts)


def _names(same: list[Taker]) -> str:
    return ", ".join(method for taker in same for method in taker.methods)
