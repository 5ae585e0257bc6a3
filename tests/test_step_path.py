"""How far it is from `opt.step` to the kernel: functions of zokern that a step calls, and the files that they are in."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import zokern

ROOT = str(Path(zokern.__file__).parent)
pytestmark = pytest.mark.usefixtures("one_thread")


def path_of_a_step(placement: str) -> list[str]:
    """The file of each call that one MeZO step on a model of two tensors makes, after three steps."""
    model, x = nn.Linear(8, 8), torch.ones(4, 8)
    opt = zokern.MeZO(model, 1e-3, placement=placement)
    called: list[str] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(ROOT):
            called.append(frame.f_code.co_filename)

    def closure() -> torch.Tensor:
        return model(x).square().mean()

    for _ in range(3):
        opt.step(closure)
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        opt.step(closure)
    finally:
        sys.setprofile(before)
    return called


def test_a_step_is_short() -> None:
    called = path_of_a_step("inplace")
    moves = sum(a != b for a, b in itertools.pairwise(called))
    assert 0 < len(called) <= 90
    assert len(set(called)) <= 15
    assert moves <= 54


def test_what_it_costs_does_not_grow_with_the_tensors() -> None:
    """The model has two tensors above; with sixty the calls are the same but for those who look at each."""
    few = len(path_of_a_step("inplace"))
    model = nn.ParameterList(nn.Parameter(torch.ones(8)) for _ in range(60))
    opt = zokern.MeZO(model, 1e-3, placement="inplace")
    count = 0

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(ROOT)

    for _ in range(3):
        opt.step(lambda: torch.zeros(()))
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        opt.step(lambda: torch.zeros(()))
    finally:
        sys.setprofile(before)
    assert count == few
