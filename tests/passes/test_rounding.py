"""Rounding to 16 bits, number by number, where it has edges: ties, subnormals, the largest number, the last random bit.

A weight of 0 moved by x times signs is x or -x before it is rounded, whatever x is.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import zokern
from zokern.contract import reference

NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
SEED, ROUNDING = 3, 5


def compare(x: float, dtype: torch.dtype, rounding: str, n: int) -> np.ndarray:
    """The bits of x and -x, rounded n times, which have to be the reference's."""
    w = torch.zeros(n, dtype=dtype)
    at = {"tensor_ids": [7], "seeds": [SEED], "coefs": [x], "distribution": "rademacher", "backend": "cpu"}
    zokern.add_noise_([w], rounding=rounding, rounding_seed=ROUNDING if rounding == "stochastic" else None, **at)
    signs = reference.noise(n, SEED, 7, 0, "rademacher")
    random = reference.rounding_bits(n, ROUNDING, 7, 0) if rounding == "stochastic" else None
    want = reference.round_to(np.float32(x) * signs, NAMES[dtype], rounding, random)
    got = w.view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(got, want), f"{x!r}: {got[got != want][:3]} for {want[got != want][:3]}"
    assert len(set(want >> 15)) == 2, "both signs"
    return want


def numbers(dtype: torch.dtype) -> list[float]:
    """Every kind of float32 between two numbers of `dtype`, even and odd ones, over its range."""
    if dtype is torch.bfloat16:
        above = [0x0000, 0x0001, 0x007F, 0x0080, 0x3F80, 0x3F81, 0x4049, 0x7F7E]
        bits = [high << 16 | low for high in above for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)][1:]
        bits += [0x7F7F0000, 0x7F7F7FFF]  # the largest, and the largest that does not become infinite to nearest
        return [float(x) for x in np.array(bits, np.uint32).view(np.float32)]
    exact = np.array([1, 2, 3, 0x3FF, 0x400, 0x401, 0x3C00, 0x3C01, 0x4248, 0x7BFE], np.uint16).view(np.float16)
    found = [65504.0, 65520.0, 65536.0, 1e30]
    for below in exact:
        a, b = float(below), float(np.nextafter(below, np.float16(np.inf)))
        found += [a, (a + b) / 2, a + (b - a) / 4, a + (b - a) * 3 / 4]
    near = [float(np.nextafter(np.float32(x), np.float32(to))) for x in found for to in (0.0, np.inf)]
    return [*found, *near, *(2.0**-e * m for e in range(24, 45) for m in (1.0, 1.5, 2 - 2.0**-23))]


@pytest.mark.parametrize("dtype", NAMES, ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_edges(instruction_set: str, dtype: torch.dtype, rounding: str) -> None:
    for x in numbers(dtype):
        compare(x, dtype, rounding, 300)


@pytest.mark.parametrize("exponent", range(-41, -34))
def test_the_last_random_bits(instruction_set: str, exponent: int) -> None:
    """Far below float16's smallest number few draws in 2^16 round up: as many as the equation says, down to none."""
    want = compare(2.0**exponent * (2 - 2.0**-23), torch.float16, "stochastic", 1 << 18)
    assert bool((want & 0x7FFF).any()) == (exponent >= -40)


@pytest.mark.parametrize("dtype", NAMES, ids=str)
def test_all_sixteen_random_bits_count(instruction_set: str, dtype: torch.dtype) -> None:
    """A number that is a 2^-16th above another goes up in about four of 2^18 draws, those whose bits are all ones."""
    x = 2.0**-40 if dtype is torch.float16 else float(np.nextafter(np.float32(1), np.float32(2)))
    assert len(set((compare(x, dtype, "stochastic", 1 << 18) & 0x7FFF).tolist())) == 2


@pytest.mark.parametrize("dtype", NAMES, ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_infinite_weights_are_read_as_that(instruction_set: str, dtype: torch.dtype, rounding: str) -> None:
    """Half of infinity is infinite, and half of the largest number is not."""
    w = torch.tensor([float("inf"), -float("inf"), torch.finfo(dtype).max, -torch.finfo(dtype).max] * 70).to(dtype)
    zokern.add_noise_(
        [w], tensor_ids=[7], seeds=[SEED], coefs=[0.0], decay=0.5, rounding=rounding,
        rounding_seed=ROUNDING if rounding == "stochastic" else None, backend="cpu",
    )  # fmt: skip
    assert torch.equal(w.isinf(), torch.tensor([True, True, False, False] * 70))
    assert torch.equal(w < 0, torch.tensor([False, True] * 140))
