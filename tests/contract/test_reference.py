"""The specification against known answers, and its own arithmetic against exact rational arithmetic."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zokern.contract import reference


def from_hex(patterns: list[str]) -> np.ndarray:
    return np.array([int(p, 16) for p in patterns], np.uint32)


def test_philox_known_answers(vectors: dict) -> None:
    for entry in vectors["philox"]:
        words = reference.philox(*from_hex(entry["counter"]), entry["seed"])
        np.testing.assert_array_equal(words, from_hex(entry["words"]))


def test_pair_known_answers(vectors: dict) -> None:
    entries = vectors["pair"]
    z0, z1 = reference.normal_pair(from_hex([e["word"] for e in entries]))
    np.testing.assert_array_equal(z0.view(np.uint32), from_hex([e["z0"] for e in entries]))
    np.testing.assert_array_equal(z1.view(np.uint32), from_hex([e["z1"] for e in entries]))


def test_noise_known_answers(vectors: dict) -> None:
    for e in vectors["normal"]:
        z = reference.noise(len(e["z"]), e["seed"], e["tensor_id"], e["offset"])
        np.testing.assert_array_equal(z.view(np.uint32), from_hex(e["z"]))
    for e in vectors["rademacher"]:
        z = reference.noise(len(e["sign"]), e["seed"], e["tensor_id"], e["offset"], "rademacher")
        np.testing.assert_array_equal(z, e["sign"])


def test_stochastic_bf16_known_answers(vectors: dict) -> None:
    for e in vectors["rounding_bf16"]:
        x = from_hex(e["x"]).view(np.float32)
        bits = reference.rounding_bits(len(x), e["seed"], e["tensor_id"], e["offset"])
        np.testing.assert_array_equal(reference.round_bf16(x, bits), from_hex(e["bf16"]))


def test_seeds_known_answers_and_independence() -> None:
    """SplitMix64's first output from state 0 is published; the derived seeds are this version's, for ever."""
    assert reference.splitmix64(0, 1) == 0xE220A8397B1DCDAF
    assert reference.splitmix64(0, 2) == 0x6E789E6AA1B965F4
    assert reference.derive_seed(0, 0, 0) == 1279368494785126216
    assert reference.derive_seed(0, 0, 1) == 8956835795440834090
    seeds = [
        reference.derive_seed(run, step, k) for run in range(8) for step in range(64) for k in [*range(8), 1 << 32]
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= s < 1 << 63 for s in seeds)
    flips = [(a ^ b).bit_count() for a, b in itertools.pairwise(seeds)]
    assert 30 < np.mean(flips) < 33  # 31.5 of 63 bits differ between unrelated seeds


def round_to_float32(x: Fraction) -> np.float32:
    """Nearest even, by search among the neighbours of the float64 approximation; x is not near overflow."""
    guess = np.float32(float(x))
    around = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(around, key=lambda f: (abs(Fraction(float(f)) - x), int(f.view(np.uint32)) & 1))


floats = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**50), max_value=2.0**50)


@settings(max_examples=400, deadline=None)
@given(floats, floats, floats)
def test_fma_is_correctly_rounded(a: float, b: float, c: float) -> None:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    got = reference.fma(a, b, c)
    if exact != 0:
        assert got == round_to_float32(exact)
    else:
        assert got == 0


def test_fma_rounds_once_where_float64_rounds_twice() -> None:
    """1 + 2^-24 + 2^-80 is just above a tie: float64 loses the last term and then rounds the tie to even, downwards."""
    a, b, c = np.float32(2.0**-40), np.float32(2.0**-40), np.float32(1 + 2.0**-23)
    tie = np.float32(2.0**-24)
    assert reference.fma(1.0, tie, c) == np.float32(1 + 2.0**-22)
    assert reference.fma(a, b, np.float32(1)) == 1
    hard = reference.fma(np.float32(1 + 2.0**-23), np.float32(2.0**-24 * (1 - 2.0**-23)), np.float32(1))
    exact = Fraction(1) + Fraction(1 + 2.0**-23) * Fraction(2.0**-24 * (1 - 2.0**-23))
    assert hard == round_to_float32(exact)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_fma_of_almost_a_tie(sign: float) -> None:
    """float64 has no place for what decides: the addend is too small beside the product, and the product's end beside the
    addend."""
    x, tiny = sign * np.float32(1 + 2.0**-12), np.float32(2.0**-80)
    down, up = 1 + 2.0**-11, 1 + 2.0**-11 + 2.0**-23  # x^2 is halfway, and down is even
    assert reference.fma(x, x, tiny) == up
    assert reference.fma(x, x, -tiny) == down
    assert reference.fma(-x, x, tiny) == -down
    assert reference.fma(-x, x, -tiny) == -up
    a, b = np.float32(2.0**-24 * (1 + 2.0**-23)), np.float32(1 - 2.0**-23)  # a b is 2^-70 less than 2^-24
    odd = sign * np.float32(1 + 2.0**-23)
    assert reference.fma(sign * a, b, odd) == odd
    assert reference.fma(-sign * a, b, odd) == odd


@pytest.mark.parametrize("special", [np.inf, -np.inf, np.nan])
def test_fma_special_values(special: float) -> None:
    with np.errstate(all="ignore"):
        for args in [(special, 1, 0), (1, special, 2), (1, 1, special), (special, 0, 1)]:
            expected = np.float32(np.float64(args[0]) * args[1] + args[2])
            np.testing.assert_array_equal(reference.fma(*args), expected)


# ------------------------------------------------------------------------------------------------------------ rounding


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_nearest_rounding_equals_numpy_and_torch(name: str) -> None:
    import torch

    rng = np.random.default_rng(0)
    x = rng.integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    x = np.concatenate([x, np.float32([0.0, -0.0, 65504, 65519.99, 65520, -65520, 1e-8, 2.0**-25, 2.0**-24, np.inf])])
    x = x[~np.isnan(x)]
    got = reference.round_to(x, name)
    expected = torch.from_numpy(x).to(getattr(torch, name)).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_every_16_bit_value_survives_rounding_unchanged(name: str) -> None:
    """A value that the type can hold is kept whatever the random bits: a skipped or zero update changes nothing."""
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    x = reference.widen(bits, name)
    keep = ~np.isnan(x)
    for random in (None, np.zeros(1 << 16, np.uint32), np.full(1 << 16, 0xFFFF, np.uint32)):
        rounded = reference.round_to(x, name, "nearest" if random is None else "stochastic", random)
        np.testing.assert_array_equal(rounded[keep], bits[keep])
        assert np.isnan(reference.widen(rounded, name)[~keep]).all()


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("exponent", [-2, -13, -14, -15, -16, -17, -20, -24, -26, -30])
def test_stochastic_rounding_is_unbiased_by_enumeration(name: str, exponent: int) -> None:
    """Over all 2^16 random words the mean of the rounded value is x: exactly where the dropped bits fit in 16."""
    random = np.arange(1 << 16, dtype=np.uint32)
    rng = np.random.default_rng(exponent + 100)
    for mantissa in rng.integers(1 << 23, 1 << 24, 8):
        x = np.float32(float(mantissa) * 2.0 ** (exponent - 23))
        for sign in (1, -1):
            rounded = reference.round_to(np.full(1 << 16, sign * x, np.float32), name, "stochastic", random)
            values = reference.widen(rounded, name).astype(np.float64)
            assert len(np.unique(values)) <= 2
            if name == "bfloat16" or exponent >= -17:
                assert values.mean() == sign * np.float64(x)
            else:  # a subnormal float16 far below its grid of 2^-24: the resolution is 2^-16 of the grid
                assert abs(values.mean() - sign * np.float64(x)) < 2.0**-40


def test_stochastic_fp16_at_the_edges() -> None:
    random = np.full(6, 0xFFFF, np.uint32)
    x = np.float32([65504, 65519.996, 65520, 1e6, -65519.996, 2.0**-60])
    out = reference.widen(reference.round_to(x, "float16", "stochastic", random), "float16")
    np.testing.assert_array_equal(out, np.float32([65504, 65504, np.inf, np.inf, -65504, 0]))


# ---------------------------------------------------------------------------------------------------------- statistics


def test_noise_statistics() -> None:
    """Moments, tails, KS distance and correlations of 2^20 draws, within five standard errors of N(0, 1)."""
    n = 1 << 20
    z = reference.noise(n, 123, 4).astype(np.float64)
    for power, expected, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((z**power).mean() - expected) < 5 * np.sqrt(variance / n)
    from math import erf

    s = np.sort(z)[:: n // 4096]
    cdf = np.array([0.5 * (1 + erf(v / 2**0.5)) for v in s])
    assert np.abs(cdf - np.arange(0, n, n // 4096) / n).max() < 1.63 / np.sqrt(n) + 1 / n
    for lag in range(1, 17):
        assert abs((z[:-lag] * z[lag:]).mean()) < 5 / np.sqrt(n)
    for other in (reference.noise(n, 124, 4), reference.noise(n, 123, 5)):  # another seed, another tensor
        assert abs((z * other).mean()) < 5 / np.sqrt(n)
    signs = reference.noise(n, 123, 4, distribution="rademacher")
    assert abs(signs.mean()) < 5 / np.sqrt(n)
    assert abs((signs[:-1] * signs[1:]).mean()) < 5 / np.sqrt(n)
