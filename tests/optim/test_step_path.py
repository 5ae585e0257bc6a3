"""How far it is from `opt.step` to the kernel: functions of zokern that a step calls, the files that they are in, and what
it asks of torch."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import zokern
from tests.methods import METHODS, build, given

ROOT = str(Path(zokern.__file__).parent)


def path_of_a_step(params: nn.Module, closure: Callable[[], torch.Tensor]) -> list[str]:
    """The file of each call that one MeZO step makes, after three steps."""
    opt = zokern.MeZO(params, 1e-3, placement="inplace")
    called: list[str] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(ROOT):
            called.append(frame.f_code.co_filename)

    for _ in range(3):
        opt.step(closure)
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        opt.step(closure)
    finally:
        sys.setprofile(before)
    return called


def of_two_tensors() -> list[str]:
    model, x = nn.Linear(8, 8), torch.ones(4, 8)
    return path_of_a_step(model, lambda: model(x).square().mean())


def test_a_step_is_short() -> None:
    called = of_two_tensors()
    moves = sum(a != b for a, b in itertools.pairwise(called))
    assert 0 < len(called) <= 102
    assert len(set(called)) <= 19
    assert moves <= 60


def test_what_it_costs_does_not_grow_with_the_tensors() -> None:
    """With sixty tensors the calls are those with two."""
    losses = itertools.count()
    many = nn.ParameterList(nn.Parameter(torch.ones(8)) for _ in range(60))
    assert len(path_of_a_step(many, lambda: torch.tensor(1e-6 * next(losses)))) == len(of_two_tensors())


class Counted(TorchDispatchMode):
    """Operators of torch, a microsecond or more each."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


# In place and in shadow; of a step in which all that is remembered is there.
OPERATORS = {
    "mezo": (76, 71),
    "mezo-momentum": (75, 69),
    "mezo-adam": (69, 65),
    "mezo-adamezo": (66, 60),
    "mezo-sign": (74, 68),
    "hizoo": (68, 63),
    "helene": (68, 64),
    "fzoo": (86, 77),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("place", ["inplace", "shadow"])
def test_a_step_asks_torch_for_little(name: str, place: str) -> None:
    """What the host knows it looks at itself."""
    case = METHODS[name]
    opt = build(case, nn.Linear(4, 4), placement=place)
    for step in range(4):
        closure = iter([torch.tensor(loss, dtype=torch.float64) for loss in given(case, step)]).__next__
        with Counted() as counted:
            opt.step(closure)
    assert 0 < counted.count <= OPERATORS[name][place == "shadow"]
