"""The arithmetic of the PTX interpreter (tests/ptx), which the GPU kernels' bits are judged by, against exact numbers."""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.ptx import arithmetic

u4, u8, f4 = np.uint32, np.uint64, np.float32
Draw = Callable[[random.Random], tuple[int, int, int]]


def nearest(x: Fraction) -> float:
    """The float32 nearest to a rational number, ties to even, from the definition."""
    if x == 0:
        return 0.0
    sign, x = (-1, -x) if x < 0 else (1, x)
    e = x.numerator.bit_length() - x.denominator.bit_length()
    e = e if Fraction(2) ** e <= x else e - 1
    unit = Fraction(2) ** (max(e, -126) - 23)
    n, rest = divmod(x, unit)
    n += rest > unit / 2 or (rest == unit / 2 and n % 2)
    value = n * unit
    return sign * (float("inf") if value >= Fraction(2) ** 128 else float(value))


def beside_ties(draw: random.Random) -> tuple[int, int, int]:
    """A product with few bits, and a sum that lies next to a tie: c is far below."""
    a, b = 0x3F800001 + 2 * draw.getrandbits(10), 0x3F800000 + (1 << draw.randrange(8, 22))
    return a, b, (draw.randrange(60, 104) << 23) | draw.getrandbits(3) | draw.getrandbits(1) << 31


def subnormal(draw: random.Random) -> tuple[int, int, int]:
    a, b = (draw.randrange(1, high) << 23 | draw.getrandbits(23) for high in (90, 60))
    return a, b, draw.getrandbits(24) | draw.getrandbits(1) << 31


def cancelling(draw: random.Random) -> tuple[int, int, int]:
    a, b = (draw.getrandbits(23) | 0x3F800000 for _ in range(2))
    product = np.array([a], u4).view(f4) * np.array([b], u4).view(f4)
    return a, b, int((-product).view(u4)[0]) + draw.randrange(-2, 3)


def any_bits(draw: random.Random) -> tuple[int, int, int]:
    return draw.getrandbits(32), draw.getrandbits(32), draw.getrandbits(32)


KINDS = pytest.mark.parametrize("kind", [beside_ties, subnormal, cancelling, any_bits], ids=lambda k: k.__name__)


def drawn(kind: Draw, count: int) -> list[np.ndarray]:
    draw = random.Random(1)
    return [np.array(column, u4) for column in zip(*(kind(draw) for _ in range(count)), strict=True)]


def same_as_exact(operation: str, words: list[np.ndarray], got: np.ndarray) -> None:
    """Every result against rational numbers; of what is not finite, against IEEE 754's rules, as float64 has them."""
    values = [w.view(f4) for w in words]
    exact = {"add": lambda a, b: a + b, "mul": lambda a, b: a * b, "fma": lambda a, b, c: a * b + c}[operation]
    with np.errstate(all="ignore"):
        zeros = exact(*(v.astype(np.float64) for v in values))  # right for signs of zeros, infinities and NaNs
    for n, (r, z) in enumerate(zip(got.tolist(), zeros.tolist(), strict=True)):
        numbers = [float(v[n]) for v in values]
        if not np.isfinite(numbers).all():
            wanted = 0x7FFFFFFF if z != z else int(f4(z).view(u4))
        else:
            sum_ = exact(*map(Fraction, numbers))
            near = f4(nearest(sum_)) if sum_ else f4(z)
            wanted = int((np.copysign(near, f4(-1 if sum_ < 0 else 1)) if sum_ else near).view(u4))
        assert r == wanted, (operation, [hex(int(w[n])) for w in words], hex(r), hex(wanted))


@KINDS
def test_fma_rounds_once(kind: Draw) -> None:
    words = drawn(kind, 3000)
    with np.errstate(all="ignore"):
        got = arithmetic.bits(arithmetic.fma(*(w.view(f4) for w in words)))
    same_as_exact("fma", words, got)


@pytest.mark.parametrize("operation", ["add", "mul", "fma"])
@KINDS
def test_packed_operations_are_two_operations(kind: Draw, operation: str) -> None:
    """Each half of 64 bits is one correctly rounded operation: subnormals are kept, NaNs become the one NaN."""
    words = drawn(kind, 2000)[: 3 if operation == "fma" else 2]
    words = [np.concatenate([w, np.roll(w, n)]) for n, w in enumerate(words)]
    special = np.array([0, 0x80000000, 1, 0x807FFFFF, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00001, 0xFFABCDEF], u4)
    words = [np.concatenate([w, np.repeat(np.roll(special, n), 2)]) for n, w in enumerate(words)]
    low_first = [w.view(u8) for w in words]
    with np.errstate(all="ignore"):
        got = getattr(arithmetic, f"packed_{operation}")(*low_first)
    assert got.dtype == u8
    same_as_exact(operation, words, got.view(u4))
    halves = [(w & u8(0xFFFFFFFF)).astype(u4) for w in low_first]
    assert np.array_equal(halves[0], words[0][::2])  # the first element is in the low half
    for n in (0, -1):  # one value that all threads share
        with np.errstate(all="ignore"):
            one = getattr(arithmetic, f"packed_{operation}")(*(w[n] for w in low_first))
        assert np.ndim(one) == 0
        assert one == got[n]


def test_packed_operations_take_one_value_beside_many() -> None:
    many, one = np.arange(10, dtype=f4).view(u8), np.array([2.0, -1.0], f4).view(u8)[0]
    wanted = np.arange(10, dtype=f4) * np.tile(f4([2.0, -1.0]), 5)
    assert np.array_equal(arithmetic.packed_mul(many, one).view(f4), wanted)
    assert np.array_equal(
        arithmetic.packed_fma(one, many, np.broadcast_to(one, 5)).view(f4), wanted + np.tile([2, -1], 5)
    )


def test_this_process_keeps_subnormals() -> None:
    assert f4(2.0**-100) * f4(2.0**-40) == f4(2.0**-140)
    assert (np.full(9, 2.0**-100, f4) * f4(2.0**-40) != 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_roundings_to_16_bits(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.randint(-(2**31), 2**31, (200_000,), generator=g).to(torch.int32)
    x[:4000] = torch.arange(4000, dtype=torch.int32) * 0x1000 + 0x38000800  # ties
    f = x.view(torch.float32)
    to = arithmetic.to_bf16 if dtype == torch.bfloat16 else arithmetic.to_f16
    with np.errstate(all="ignore"):
        got = torch.from_numpy(to(f.numpy()).view(np.int16)).view(dtype)
    number = ~f.isnan()
    assert torch.equal(got[number].view(torch.int16), f.to(dtype)[number].view(torch.int16))
    assert got[~number].isnan().all()


@pytest.mark.parametrize("integer", [np.int32, np.uint32], ids=lambda t: t.__name__)
def test_integers_to_float32(integer: type) -> None:
    n = np.random.default_rng(4).integers(0, 2**32, 3000, dtype=u4).view(integer)
    assert n.astype(f4).tolist() == [nearest(Fraction(int(v))) for v in n]


@pytest.mark.parametrize("way", ["maximum", "minimum"])
def test_the_larger_and_smaller_number(way: str) -> None:
    """A number wins over a NaN, and +0 is above -0."""
    a, b = f4([np.nan, 1, -0.0, 0.0, -0.0, np.inf]), f4([1, np.nan, 0.0, -0.0, -0.0, -np.inf])
    wanted = {"maximum": f4([1, 1, 0.0, 0.0, -0.0, np.inf]), "minimum": f4([1, 1, -0.0, -0.0, -0.0, -np.inf])}[way]
    assert np.array_equal(getattr(arithmetic, way)(a, b).view(u4), wanted.view(u4))
