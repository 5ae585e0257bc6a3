"""`--scale released` of the command: what it goes with, and the optimizer that it makes."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from zokern.finetune import FinetuneError, Options, methods
from zokern.optim import ENTRIES


@pytest.mark.parametrize("method", ["fzoo", "es"])
def test_the_option_is_the_constructors(method: str) -> None:
    options = Options(method=method, scale="released", lr=5e-5)
    options.check()
    opt = methods.build(nn.Linear(3, 2), options)
    assert opt.options["scale"] == "released"
    assert opt.param_groups[0]["lr"] == 5e-5


def test_keep_best_is_an_option() -> None:
    options = Options(method="mezo-gv", keep_best=True, candidates=2)
    options.check()
    assert methods.build(nn.Linear(3, 2), options).options["keep_best"] is True


@pytest.mark.parametrize("method", ENTRIES)
def test_without_it_nothing_is_other_than_before(method: str) -> None:
    """The settings that are given to a class are lr alone."""
    assert set(methods.settings(Options(method=method))) <= {"lr", *METHOD_DEFAULTS}
    assert methods.settings(Options(method=method))["lr"] == ENTRIES[method].lr


METHOD_DEFAULTS = {name for name in ENTRIES["mezo"].cls.settings if getattr(Options(), name, None) is not None}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "fzoo"}, "--scale released needs --lr: the default is the paper's"),
        ({"method": "es"}, "--scale released needs --lr"),
        ({"method": "mezo", "update": "adamezo"}, "--scale released needs --lr"),
        ({"method": "mezo", "lr": 1e-7}, "--scale released is for --update adamezo.*--method mezo.*leave --scale out"),
        ({"method": "lezo", "lr": 1e-7, "update": "adam"}, "--scale released is for --update adamezo"),
        ({"method": "hizoo", "lr": 1e-7}, "--scale is not a setting of --method hizoo"),
    ],
)
def test_what_it_does_not_go_with_is_refused_before_anything_is_loaded(given: dict[str, Any], message: str) -> None:
    with pytest.raises(FinetuneError, match=message):
        Options(**given, scale="released").check()
    remedied = {**given, "lr": 1e-7}
    if "needs --lr" in message:
        Options(**remedied, scale="released").check()
    elif given["method"] != "hizoo":
        Options(**given).check()
