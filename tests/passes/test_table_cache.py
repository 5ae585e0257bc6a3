"""A table is found again only for what it was built for."""

from __future__ import annotations

import copy

import torch

import zokern
from tests.methods import METHODS, build, equal, given, scripted, weights
from tests.models import small
from zokern.passes import table


def groups_of(tensors: list[torch.Tensor], groups: list[int]) -> list[int]:
    (found,), _ = table.tables(tensors, tensors, [0, 1, 2], [0, 0, 0], groups)
    return found.tensors[:, 3].tolist()


def test_the_same_tensors_in_other_groups_have_another_table() -> None:
    tensors = [torch.zeros(8) for _ in range(3)]
    for groups in ([0, 0, 0], [0, 1, 0], [0, 1, 1], [0, 0, 0]):
        assert groups_of(tensors, groups) == groups


def test_floors_that_change_make_other_rows() -> None:
    """The tensors are the same, in the same order; which row of numbers is whose is not."""
    case = METHODS["helene"]
    count = len(list(small().parameters()))
    first, then = [1.0] * count, [1.0 + i % 2 for i in range(count)]
    model, twin = small(), small()
    opt = build(case, model, floor=first, hessian_interval=1)
    opt.step(scripted(given(case, 0)))
    state = copy.deepcopy(opt.state_dict())  # its tensors are the optimizer's
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.data.copy_(p)
    opt.floor = then
    opt.step(scripted(given(case, 1)))
    other = build(case, twin, floor=then, hessian_interval=1)
    state["zokern"]["options"]["floor"] = then
    other.load_state_dict(state)
    other.step(scripted(given(case, 1)))
    assert equal(weights(model), weights(twin))
    assert isinstance(opt, zokern.HELENE)
