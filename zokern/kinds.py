"""What a setting may be: one small class a kind. It checks a value, says what is allowed, and knows the command's type.

`check` returns the value as the class keeps it, or raises TypeError or ValueError with the setting's name; `allowed` is the
same in words; `stored` is the value as JSON, for a state_dict and a journal; `parse` takes what the command line gives.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from zokern import _checks

HUGE = 1 << 20  # limits from here on keep numbers sane, and help nobody to choose one


class Kind:
    """Base class: whatever there is. option: the type of the command's option."""

    option: ClassVar[type] = str

    def check(self, value: Any, name: str) -> Any:
        return value

    @property
    def allowed(self) -> str:
        return ""

    @property
    def in_words(self) -> str:
        """`allowed` in a description: without limits from HUGE on."""
        return self.allowed

    def stored(self, value: Any) -> Any:
        return value

    def parse(self, value: Any) -> Any:
        return value


@dataclass(frozen=True)
class Integer(Kind):
    """An int in [low, high]."""

    low: int
    high: int | None = None
    option = int

    def check(self, value: Any, name: str) -> int:
        return _checks.check_integer(value, name, self.low, self.high)

    @property
    def allowed(self) -> str:
        return _bounds(self.low, math.inf if self.high is None else self.high)

    @property
    def in_words(self) -> str:
        return _bounds(self.low, math.inf if self.high is None or self.high >= HUGE else self.high)


@dataclass(frozen=True)
class Number(Kind):
    """A finite number in [low, high], without an end that is open."""

    low: float = 0.0
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    option = float

    def check(self, value: Any, name: str) -> float:
        return _checks.check_number(value, name, self.low, self.high, open_low=self.open_low, open_high=self.open_high)

    @property
    def allowed(self) -> str:
        return _bounds(self.low, self.high, self.open_low, self.open_high)

    @property
    def in_words(self) -> str:
        return _bounds(self.low, math.inf if self.high >= HUGE else self.high, self.open_low, self.open_high)


SHARE = Number(0.0, 1.0, open_high=True)


@dataclass(frozen=True)
class Flag(Kind):
    """True or False."""

    option = bool

    def check(self, value: Any, name: str) -> bool:
        return _checks.check_flag(value, name)


@dataclass(frozen=True)
class FlagOr(Flag):
    """True, False, or a name."""

    name: str

    def check(self, value: Any, name: str) -> bool | str:  # type: ignore[override]
        if not isinstance(value, bool) and value != self.name:
            raise ValueError(f"{name} is {value!r}; it must be {self.name!r}, True or False")
        return value  # type: ignore[no-any-return]

    @property
    def allowed(self) -> str:
        return f"{self.name}, True or False"


@dataclass(frozen=True)
class Choice(Kind):
    """One of some names. reader: takes what else there is beside names, objects for example, and refuses the rest."""

    names: Sequence[str]
    reader: Callable[[object, str], Any] | None = None

    def check(self, value: Any, name: str) -> Any:
        if self.reader is not None:
            return self.reader(value, name)
        return _checks.check_choice(value, name, self.names)

    @property
    def allowed(self) -> str:
        return ", ".join(self.names)

    @property
    def in_words(self) -> str:
        return f"one of {self.allowed}"


@dataclass(frozen=True)
class DType(Kind):
    """One of some of torch's number formats; on the command line, its name."""

    dtypes: tuple[torch.dtype, ...]

    def check(self, value: Any, name: str) -> torch.dtype:
        if value not in self.dtypes:
            raise ValueError(f"{name} is {value}; it must be {' or '.join(map(str, self.dtypes))}")
        assert isinstance(value, torch.dtype)
        return value

    @property
    def by_name(self) -> dict[str, torch.dtype]:
        return {str(dtype).removeprefix("torch."): dtype for dtype in self.dtypes}

    @property
    def allowed(self) -> str:
        return ", ".join(self.by_name)

    @property
    def in_words(self) -> str:
        return f"one of {self.allowed}"

    def stored(self, value: Any) -> str:
        return str(value)

    def parse(self, value: Any) -> Any:
        return self.by_name.get(value, value)


@dataclass(frozen=True)
class Instance(Kind):
    """An object of a class."""

    cls: type

    def check(self, value: Any, name: str) -> Any:
        if not isinstance(value, self.cls):
            got = value.__name__ if isinstance(value, type) else type(value).__name__
            raise TypeError(f"{name} must be a {self.cls.__name__} object, got {got}")
        return value

    @property
    def in_words(self) -> str:
        return f"a {self.cls.__name__}"


@dataclass(frozen=True)
class Betas(Kind):
    """Two decay rates in [0, 1)."""

    def check(self, value: Any, name: str) -> tuple[float, float]:
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise TypeError(f"{name} must be two numbers in [0, 1), got {value!r}")
        return SHARE.check(value[0], f"{name}[0]"), SHARE.check(value[1], f"{name}[1]")

    @property
    def allowed(self) -> str:
        return f"two numbers, each {SHARE.allowed}"

    def stored(self, value: Any) -> list[float]:
        return list(value)


@dataclass(frozen=True)
class Text(Kind):
    """A string."""

    def check(self, value: Any, name: str) -> str:
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a str, got {type(value).__name__}")
        return value


_PLACE = re.compile(r"\{([^\W\d]\w*)\}")


def placeholders(template: str) -> list[str]:
    """The names that stand in braces, each once, in their order. Braces around anything but a name are no placeholder."""
    return list(dict.fromkeys(_PLACE.findall(template)))


def filled(template: str, texts: Mapping[str, str]) -> str:
    """The template with the text of each name; what stands in braces in a text stays."""
    return _PLACE.sub(lambda place: texts[place[1]], template)


@dataclass(frozen=True)
class Template(Text):
    """A string with a {name} at least."""

    def check(self, value: Any, name: str) -> str:
        super().check(value, name)
        if not placeholders(value):
            raise ValueError(
                f"{name} is {value!r}; it must contain {{text}}, where each text is put in, or the name of another column "
                "in braces"
            )
        return str(value)


@dataclass(frozen=True)
class File(Kind):
    """The path of a file that is there. what: the kind of file to give."""

    what: str = "a file"
    option = Path

    def check(self, value: Any, name: str) -> Path:
        path = Path(value)
        if not path.is_file():
            raise ValueError(f"{name} is {str(path)!r}, which is not a file; give {self.what}")
        return path


@dataclass(frozen=True)
class Directory(Kind):
    """The path of a directory, there or not."""

    option = Path

    def check(self, value: Any, name: str) -> Path:
        path = Path(value)
        if path.exists() and not path.is_dir():
            raise ValueError(f"{name} is {str(path)!r}, which is a file; give a directory")
        return path


def _bounds(low: float, high: float, open_low: bool = False, open_high: bool = False) -> str:
    parts = [f"{'above' if open_low else 'at least'} {_number(low)}"] if low > -math.inf else []
    if high < math.inf:
        parts.append(f"{'below' if open_high else 'at most'} {_number(high)}")
    return ", ".join(parts)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"
