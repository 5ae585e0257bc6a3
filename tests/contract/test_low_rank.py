"""Directions of low rank as the contract has them: their factors' bits, which tensors have them, what they are like."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zokern
from zokern import directions
from zokern.contract import reference
from zokern.contract.streams import MAX_RANK, PURPOSE_LEFT, PURPOSE_RIGHT, matrices, rank_of

ANSWERS: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "data" / "lowrank.json").read_text())
UNIT = 2.0**-24


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda a: f"{a['stack']}-{a['rank']}")
def test_known_answers(answer: dict[str, Any]) -> None:
    stack, rank, seed, tensor_id = tuple(answer["stack"]), answer["rank"], answer["seed"], answer["tensor_id"]
    for got, wanted in zip(reference.factors(stack, rank, seed, tensor_id), answer["factors"], strict=True):
        assert [f"{bits:08x}" for bits in got.view(np.uint32).reshape(-1)] == wanted
    shape = stack if stack[0] > 1 else stack[1:]
    z = reference.noise(int(np.prod(stack)), seed, tensor_id, 0, f"lowrank:{rank}", shape)
    assert [f"{bits:08x}" for bits in z.view(np.uint32)[: len(answer["z"])]] == answer["z"]


def test_factors_from_words_by_exact_arithmetic() -> None:
    """Words and normals have known answers of their own; what makes factors of them is done here in fractions."""
    seed, tensor_id, rank = 99, 5, 3
    left, right = reference.factors((2, 7, 5), rank, seed, tensor_id)
    for factors, purpose, scale in (
        (left, PURPOSE_LEFT, np.float32(1 / np.sqrt(3.0))),
        (right, PURPOSE_RIGHT, np.float32(1)),
    ):
        n = factors.size
        words = reference.philox(np.arange((n + 7) // 8), 0, tensor_id, purpose, seed).reshape(-1)
        normals = np.stack(reference.normal_pair(words), axis=-1).reshape(-1)[:n]
        wanted = [nearest(Fraction(float(np.float32(z * scale)))) for z in normals]
        assert [Fraction(float(x)) for x in factors.reshape(-1)] == wanted
    z = reference.noise(2 * 7 * 5, seed, tensor_id, 0, "lowrank:3", (2, 7, 5)).reshape(2, 7, 5)
    exact = np.einsum(
        "kem,ken->emn", left.reshape(3, 2, 7).astype(np.float64), right.reshape(3, 2, 5).astype(np.float64)
    )
    np.testing.assert_allclose(z, exact, rtol=0, atol=2e-6)


def nearest(x: Fraction) -> Fraction:
    """The nearest multiple of 2^-24 that has 8 significant bits; ties to even."""
    size = abs(x)
    step = Fraction(1, 1 << 24)
    while size >= 256 * step:  # beyond 8 bits of this step
        step *= 2
    return round(x / step) * step


@settings(max_examples=300, deadline=None)
@given(st.floats(width=32, min_value=-8, max_value=8))
def test_rounding_of_a_factor(x: float) -> None:
    assert Fraction(float(reference.factor(np.float32([x]))[0])) == nearest(Fraction(x))


def test_every_format_holds_factors() -> None:
    drawn = np.concatenate([f.reshape(-1) for f in reference.factors((1, 10_000, 10_000), 2, 3, 4)])
    every = torch.from_numpy(np.concatenate([drawn, reference.factor(drawn * np.float32(1e-6))]))
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(every.to(dtype).float(), every)


def test_which_tensors_are_matrices() -> None:
    assert matrices((5, 4), 3) == (1, 5, 4)
    assert matrices((5, 4), 4) is None  # the smaller side is not above the rank
    assert matrices((9, 5, 4), 3) == (9, 5, 4)
    assert matrices((1, 5, 4), 4) is None
    for shape in [(), (100,), (8, 8, 3, 3)]:
        assert matrices(shape, 1) is None
    assert matrices((5, 4), 0) is None


@pytest.mark.parametrize("shape", [(5, 4), (100,), (8, 8, 3, 3)])
def test_others_take_dense_noise(shape: tuple[int, ...], backend: str, device: torch.device) -> None:
    given = {"seed": 3, "tensor_id": 6, "backend": backend, "device": device}
    assert torch.equal(zokern.noise(shape, distribution=zokern.LowRank(4), **given), zokern.noise(shape, **given))


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_mean_variance_and_correlations(rank: int) -> None:
    """Over 400 seeds of a small matrix: elements have mean 0 and variance 1 and are uncorrelated, of any pair of places."""
    seeds, rows, columns = 400, 12, 10
    z = np.stack([reference.noise(120, s, 1, 0, f"lowrank:{rank}", (rows, columns)) for s in range(seeds)]).astype(
        np.float64
    )
    assert abs(z.mean()) < 4 / np.sqrt(seeds * (rows + columns) / 2)
    assert abs((z**2).mean() - 1) < 0.1
    correlations = z.T @ z / seeds - np.eye(120)
    # The product of two elements of one row has variance 1 + 2/rank; the mean of it over seeds, its root over seeds.
    assert np.abs(correlations).max() < 6 * np.sqrt((8 + 1) / seeds)
    assert np.abs(correlations.mean()) < 0.02


def test_the_rank_is_the_rank() -> None:
    for rank in (1, 3):
        z = zokern.noise((20, 30), seed=7, distribution=zokern.LowRank(rank))
        assert torch.linalg.matrix_rank(z.double(), rtol=1e-6) == rank
    stack = zokern.noise((4, 20, 30), seed=7, distribution=zokern.LowRank(2))
    assert torch.equal(torch.linalg.matrix_rank(stack.double(), rtol=1e-6), torch.tensor([2] * 4))
    assert not torch.equal(stack[0], stack[1])


def test_names() -> None:
    assert zokern.LowRank(4).name == "lowrank:4"
    assert directions.parse("lowrank:4") == zokern.LowRank(4) == directions.parse(zokern.LowRank(np.int64(4)))
    assert rank_of(f"lowrank:{MAX_RANK}") == MAX_RANK
    assert rank_of("normal") == 0
    for wrong in (
        "lowrank",
        "lowrank:",
        "lowrank:0",
        "lowrank:-1",
        "lowrank:01",
        "lowrank:1.5",
        "lowrank:65537",
        "LowRank:1",
    ):
        with pytest.raises(ValueError, match=r"distribution is .*'lowrank:1'.*zokern.LowRank\(1\)"):
            directions.parse(wrong)


@pytest.mark.parametrize(
    ("rank", "error"), [(r, ValueError) for r in (0, -1, MAX_RANK + 1)] + [(r, TypeError) for r in (1.0, True, "1")]
)
def test_ranks_that_there_are_not(rank: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="rank"):
        zokern.LowRank(rank)  # type: ignore[arg-type]


def test_an_optimizer_without_a_matrix_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.LayerNorm(3))
    zokern.MeZO(model, 0.1, distribution=zokern.LowRank(2))
    with pytest.raises(ValueError, match=r"LowRank\(3\).*none of the 4 tensors.*smaller side is 3: take a rank below"):
        zokern.MeZO(model, 0.1, distribution="lowrank:3")
    with pytest.raises(ValueError, match="use distribution='normal'"):
        zokern.MeZO(model[1], 0.1, distribution="lowrank:1")
    with pytest.raises(ValueError, match="use distribution='normal', and another placement"):
        zokern.MeZO(model[1], 0.1, distribution="lowrank:1", placement="forward")
    zokern.MeZO(model[1], 0.1, distribution="normal", placement="inplace")  # what the messages say
    zokern.MeZO(model[1], 0.1, distribution="normal")
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="none of the 3 tensors"):
        zokern.MeZO(model, 0.1, distribution="lowrank:1")
