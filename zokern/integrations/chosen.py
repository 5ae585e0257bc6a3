"""A method and its settings as one argument, `zo=`: "mezo", or {"method": "mezo", "eps": 1e-2, "num_samples": 4}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from zokern._checks import meant
from zokern.layers import RandomBlocks, find_blocks
from zokern.optim import ENTRIES, LeZO, MeZO, ZerothOrderOptimizer

SAID = {"lr": "learning_rate", "weight_decay": "weight_decay"}
ELSEWHERE = {"params", "module", "lr", "weight_decay", "maximize"}  # the trainer says these
Groups = list[dict[str, Any]]


class Chosen(NamedTuple):
    """A class of the registry and its settings, looked at; `build` makes the optimizer."""

    cls: type[ZerothOrderOptimizer]
    settings: dict[str, Any]

    @classmethod
    def read(cls, zo: str | Mapping[str, Any] | None, default: str = "mezo") -> Chosen:
        """
        Args:
            zo: a method's name, or a mapping with "method" and any setting of its class but lr, weight_decay, maximize,
                params and module; for lezo also num_dropped (default: three quarters of the blocks).
            default: the method where zo has none.

        Raises:
            TypeError, ValueError: naming what is not known.
        """
        if zo is None or isinstance(zo, str):
            zo = {"method": zo or default}
        if not isinstance(zo, Mapping):
            _refuse_class(zo, 'zo="{}"')
            raise TypeError(
                "zo must be a method's name, or a mapping of its settings, which may have the name as 'method'; got "
                f"{type(zo).__name__}"
            )
        method, settings = zo.get("method", default), {name: value for name, value in zo.items() if name != "method"}
        _refuse_class(method, "zo={{'method': '{}', ...}}")
        if not isinstance(method, str) or method not in ENTRIES:
            hint = meant(str(method), ENTRIES) or f"the methods are {', '.join(ENTRIES)}"
            raise ValueError(f"zo: there is no method {method!r}; {hint}")
        return cls.of_class(ENTRIES[method].cls, settings, "zo")

    @classmethod
    def of_class(cls, made: Any, settings: Mapping[str, Any], name: str = "optimizer_cls_and_kwargs") -> Chosen:
        """
        Raises:
            TypeError, ValueError: naming what is not known. name: the argument that it stands in.
        """
        if not (isinstance(made, type) and issubclass(made, ZerothOrderOptimizer)):
            called = getattr(made, "__name__", made)
            raise TypeError(f"{name} has {called}, which is none of zokern's; give for example zokern.MeZO")
        allowed = {*MeZO.settings, "num_dropped"} if issubclass(made, LeZO) else set(made.settings)
        for one in settings:
            if one in ELSEWHERE:
                said = f"TrainingArguments({SAID[one]}=) says" if one in SAID else "the trainer says itself"
                raise ValueError(f"{name} has {one!r}, which {said}; leave it out")
            if one not in allowed:
                others = sorted(allowed - ELSEWHERE)
                hint = meant(one, others) or f"it has {', '.join(others)}"
                raise TypeError(f"{name}: {made.__name__} has no setting {one!r}; {hint}")
        return cls(made, dict(settings))

    def build(self, model: nn.Module, groups: Groups, lr: float, *, maximize: bool = False) -> ZerothOrderOptimizer:
        """Over groups of (name, parameter) pairs of `model`. maximize: what the closure returns is a reward.

        Raises:
            TypeError, ValueError: from the method's class, naming the setting.
        """
        settings, made = dict(self.settings), self.cls
        if issubclass(made, LeZO):  # short for MeZO on random blocks
            made, blocks = MeZO, len(find_blocks(model))
            settings["layers"] = RandomBlocks(settings.pop("num_dropped", blocks * 3 // 4))
        return made(groups, lr=lr, module=model, maximize=maximize, **settings)


def _refuse_class(given: Any, instead: str) -> None:
    """
    Raises:
        TypeError: for a class of zokern's where its name is asked for. instead: what to give, with a place for the name.
    """
    name = next((name for name, entry in ENTRIES.items() if entry.cls is given), None)
    if name is not None:
        raise TypeError(f"zo has the class {given.__name__}; give its name: {instead.format(name)}")
