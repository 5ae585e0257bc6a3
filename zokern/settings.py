"""A setting is declared once, in the class whose it is: its default, what it may be, what it does.

    class MeZO(ZerothOrderOptimizer):
        horizon: int = setting(default=10, kind=Integer(1, 1 << 20), help="Steps whose directions ...")

From that come the constructor's argument, its check and its line in the docstring, the attribute, the option of the
command, and the row of the tables in docs/. A class takes the settings of its bases and its own.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from typing_extensions import dataclass_transform

from zokern._checks import meant
from zokern.kinds import Kind

F = TypeVar("F", bound=Callable[..., None])
REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Setting:
    """One setting.

    alias: the argument's name, where the attribute has another. kept: it becomes an attribute and, where it is not common
    to all methods, is saved in state_dicts. changed: the method called when the attribute is set later, which is checked
    too. flags: the option's spelling; () is from the name, None is none. parts: the options that make it up together, and
    what each is.
    """

    default: Any
    kind: Kind
    help: str
    kw_only: bool = True
    alias: str = ""
    kept: bool = True
    changed: str = ""
    flags: tuple[str, ...] | None = ()
    parts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    attribute: str = ""
    annotation: str = ""
    depth: int = 0

    @property
    def name(self) -> str:
        return self.alias or self.attribute

    def check(self, value: Any, name: str = "") -> Any:
        """The value as it is kept. None is what it says where it is the default."""
        return None if value is None and self.default is None else self.kind.check(value, name or self.name)

    def stored(self, value: Any) -> Any:
        """A value as JSON."""
        return None if value is None else self.kind.stored(value)

    def describe(self, *, default: bool = True) -> str:
        """Its meaning, what it may be and its default, in one line."""
        allowed = self.kind.in_words
        parts = [self.help, f"{allowed[:1].upper()}{allowed[1:]}." if allowed else ""]
        if default and self.default is not REQUIRED and self.default is not None:
            parts.append(f"Default: {shown(self.default)}.")
        return " ".join(filter(None, parts))


def setting(
    *,
    default: Any = REQUIRED,
    kind: Kind,
    help: str,
    kw_only: bool = True,
    alias: str = "",
    kept: bool = True,
    changed: str = "",
    flags: tuple[str, ...] | None = (),
    parts: Mapping[str, str] | None = None,
) -> Any:
    """Declares a setting in the body of a class; `Setting` has what the arguments mean."""
    return Setting(default, kind, help, kw_only, alias, kept, changed, flags, parts or {})


def again(cls: type[Settings], name: str, *, default: Any = REQUIRED) -> Any:
    """Declares a setting of a base class once more, with another default."""
    return dataclasses.replace(cls.settings[name], default=default)


@dataclass_transform(kw_only_default=True, field_specifiers=(setting, again))
class Settings:
    """Base of classes with settings; `settings` has those of a class, by the argument's name."""

    settings: ClassVar[dict[str, Setting]] = {}
    declared: ClassVar[dict[str, Setting]] = {}  # by this class itself
    reserved: ClassVar[frozenset[str]] = frozenset()  # attributes that its objects have besides

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = [(name, value) for name, value in vars(cls).items() if isinstance(value, Setting)]
        bases = [base for base in cls.__mro__[1:] if issubclass(base, Settings)]
        cls.declared = {}
        cls.settings = {name: one for base in reversed(bases) for name, one in base.declared.items()}
        inherited = {one.attribute for one in cls.settings.values()}
        for name, value in own:
            names = {name for base in cls.__mro__[1:] for name in (*vars(base), *vars(base).get("__annotations__", ()))}
            if value.kept and name in (names | cls.reserved) - inherited:
                raise TypeError(
                    f"{cls.__name__}.{name}: a base has an attribute of this name; choose another, and alias="
                )
            given = cls.__annotations__.get(name, "Any")
            annotation = given if isinstance(given, str) else inspect.formatannotation(given)
            annotation = re.sub(r"^InitVar\[(.*)\]$", r"\1", annotation)
            declared = dataclasses.replace(value, attribute=name, annotation=annotation, depth=len(cls.__mro__))
            cls.settings[declared.name] = cls.declared[declared.name] = declared
            if declared.changed:
                setattr(cls, name, _checked(declared))
            else:
                delattr(cls, name)
        constructor: Any = cls.__init__
        if not getattr(constructor, "takes_settings", False):  # the class's own, or a base's
            signature = inspect.signature(constructor)
            cls.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])  # type: ignore[attr-defined]
        else:
            cls.__signature__ = inspect.Signature(list(map(_parameter, _in_order(cls))))  # type: ignore[attr-defined]
            if cls.__doc__ and cls.settings:
                cls.__doc__ = f"{cls.__doc__.rstrip()}\n\n{_arguments(cls)}"

    def take(self, args: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
        """All settings from a constructor's arguments, checked, with their defaults where none is given; those that are
        kept become attributes.

        Raises:
            TypeError, ValueError: naming the argument; nothing has been set then.
        """
        given = self._bound(args, named)
        values = {name: one.check(given.get(name, one.default)) for name, one in self.settings.items()}
        for name, one in self.settings.items():
            if one.kept:
                vars(self)[one.attribute] = values[name]
        return values

    def _bound(self, args: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by name."""
        cls = type(self).__name__
        by_place = [one.name for one in _in_order(type(self)) if not one.kw_only]
        if len(args) > len(by_place):
            raise TypeError(
                f"{cls} takes {', '.join(by_place)} by place and the rest by name; got {len(args)} by place"
            )
        for name in named:
            if name not in self.settings:
                hint = meant(name, self.settings) or f"it has {', '.join(self.settings)}"
                raise TypeError(f"{cls} has no setting {name!r}; {hint}")
        given = dict(zip(by_place, args, strict=False))
        if both := given.keys() & named.keys():
            raise TypeError(f"{cls} got {', '.join(sorted(both))} by place and by name")
        given.update(named)
        missing = [name for name, one in self.settings.items() if one.default is REQUIRED and name not in given]
        if missing:
            raise TypeError(f"{cls} is missing {', '.join(missing)}: {self.settings[missing[0]].help}")
        return given

    def stored(self, names: Mapping[str, Setting]) -> dict[str, Any]:
        """The attributes of some settings as JSON."""
        return {name: one.stored(vars(self)[one.attribute]) for name, one in names.items()}


def takes_settings(constructor: F) -> F:
    """Marks a constructor that takes the settings of whichever class it makes."""
    constructor.takes_settings = True  # type: ignore[attr-defined]
    return constructor


def shown(value: Any) -> str:
    """A default as people write it."""
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(shown, value))})"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return f"{value:g}" if isinstance(value, float) else str(value)


def _in_order(cls: type[Settings]) -> list[Setting]:
    """What is given by position, then a class's own, then those of its bases: the rarest last."""
    return sorted(cls.settings.values(), key=lambda one: (one.kw_only, -one.depth))


def _arguments(cls: type[Settings]) -> str:
    """The end of a docstring, as if it were written in the source."""
    lines = ["    Args:"]
    for one in _in_order(cls):
        lines += textwrap.wrap(f"{one.name}: {one.describe()}", 118, initial_indent=" " * 8, subsequent_indent=" " * 12)
    end = "TypeError, ValueError: naming the argument, or the parameter, and the remedy."
    return "\n".join([*lines, "", "    Raises:", f"        {end}", "    "])


def _parameter(one: Setting) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY if one.kw_only else inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(one.name, kind, default=one.default, annotation=one.annotation)


def _checked(one: Setting) -> property:
    def get(self: Settings) -> Any:
        return vars(self)[one.attribute]

    def put(self: Settings, value: Any) -> None:
        before, vars(self)[one.attribute] = vars(self)[one.attribute], one.check(value)
        try:
            getattr(self, one.changed)()
        except BaseException:
            vars(self)[one.attribute] = before
            raise

    return property(get, put, doc=f"{one.describe()} May be changed between steps.")
