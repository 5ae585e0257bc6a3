"""Every method has the same bits on every backend."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import devices
from tests.methods import (
    CURVED,
    METHODS,
    Case,
    assert_same_states,
    build,
    equal,
    play,
    states,
    weights,
)
from tests.models import Toy, seeded
from tests.pairs import each, label


def of_dtype(dtype: torch.dtype | str, device: torch.device = devices.CPU, blocks: int = 2) -> Toy:
    model = seeded(lambda: Toy(depth=blocks), spread=0.3, device=device)
    if isinstance(dtype, torch.dtype):
        return model.to(dtype)
    model.embedding.bfloat16()
    model.layers[0].half()
    return model


def run_on(
    case: Case, backend: str, placement: str, dtype: torch.dtype | str, steps: int, blocks: int = 2, **options: Any
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    model = of_dtype(dtype, devices.device_of(backend), blocks)
    opt = build(case, model, placement=placement, backend=backend, weight_decay=0.2, **options)
    play(case, opt, range(steps))
    return weights(model), states(opt, model)


PLACES = [("inplace", torch.float32), ("shadow", torch.bfloat16), ("shadow", torch.float16), ("shadow", "mixed")]


@pytest.mark.parametrize(
    ("backend", "name", "place"),
    [("cuda", *row) for row in itertools.product(METHODS, PLACES)]
    + [("reference", *row) for row in each(list(METHODS), PLACES)],  # its rules are all in test_rules.py
    ids=label,
)
def test_backends_agree_bit_for_bit(backend, name, place):
    case, (placement, dtype) = METHODS[name], place
    mine, my_states = run_on(case, backend, placement, dtype, 3)
    theirs, their_states = run_on(case, "cpu", placement, dtype, 3)
    assert equal(mine, theirs)
    assert_same_states(my_states, their_states)
    assert not equal(mine, weights(of_dtype(dtype)))


def kernels_of(case: Case) -> tuple[Any, ...]:
    """What tells one method's kernels from another's: its rules, and the square of a sum, which MeZO-GV has."""
    return case.states, case.options.get("update"), case.method == "mezo-gv"


# In Triton's interpreter one of those that are alike, and a block less: a launch takes as long as there are tensors.
BLOCKS = 1 if "triton" in devices.SLOW else 2
FEW = list({kernels_of(c): name for name, c in METHODS.items()}.values()) if "triton" in devices.SLOW else list(METHODS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "placement", "dtype"),
    [(name, "shadow", "mixed") for name in FEW]
    + [(name, "inplace", torch.float32) for name in FEW if METHODS[name].states],
    ids=label,
)
def test_triton_agrees_bit_for_bit(name, placement, dtype):
    """Two steps, because its interpreter is slow: the second one starts from states that are not uniform."""
    case = METHODS[name]
    mine, my_states = run_on(case, "triton", placement, dtype, 2, BLOCKS)
    theirs, their_states = run_on(case, "cpu", placement, dtype, 2, BLOCKS)
    assert equal(mine, theirs)
    assert_same_states(my_states, their_states)


@CURVED
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
def test_backends_agree_on_a_bf16_curvature(name, backend):
    options = {"smoothing": 0.1, "curvature_dtype": torch.bfloat16}
    case = METHODS[name]
    mine, my_states = run_on(case, backend, "shadow", torch.bfloat16, 2, BLOCKS, **options)
    theirs, their_states = run_on(case, "cpu", "shadow", torch.bfloat16, 2, BLOCKS, **options)
    assert equal(mine, theirs)
    assert_same_states(my_states, their_states)
    assert all(state["h"].dtype == torch.bfloat16 for state in my_states)
