"""Every rule on every backend against the reference, bit for bit: weights and states, whole tensors and shards.

The methods' tests look at small models; here are the ends of chunks, cut blocks, addresses off 16-byte boundaries, several
groups, both distributions and roundings, and every instruction set of the CPU backend.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import devices
from tests.launching import launch
from zokern import backends
from zokern.contract import reference, reference_rules
from zokern.contract.rules import RULES

CHUNK = 1 << 14
RULE = pytest.mark.parametrize("rule", RULES)
SCALARS = {
    "decay": 0.875, "smoothing": 0.125, "beta": 0.9, "beta1": 0.9, "beta2": 0.99, "step": -0.01, "gamma": 1.5,
    "floor": 0.25, "delta": 1e-3, "ratio": 0.7,
}  # fmt: skip


@dataclass
class Piece:
    """A tensor of a pass: how many elements, from which global index, how many elements off an aligned address."""

    numel: int
    tensor_id: int
    offset: int = 0
    group: int = 0
    off: int = 0


# A whole chunk and more, shards that start in the middle of a block and of a chunk, one far beyond 2^32, a single element.
PIECES = [
    Piece(CHUNK + 21, 3),
    Piece(300, 4, offset=5, group=1),
    Piece(2000, 5, offset=CHUNK - 900, off=1),
    Piece(1, 6, offset=2**36 + 3),
    Piece(515, 2**32 - 1, group=1, off=3),
]
SMALL_PIECES = [Piece(1100, 3), Piece(41, 4, offset=5, group=1), Piece(40, 5, offset=CHUNK - 19, off=1)]


def storage(x: Tensor) -> np.ndarray:
    """As reference.py has it: float32, or the bits of a 16-bit type."""
    return x.cpu().numpy() if x.dtype == torch.float32 else x.cpu().view(torch.int16).numpy().view(np.uint16)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensor(values: np.ndarray, dtype: torch.dtype, off: int, device: torch.device) -> Tensor:
    """On a 16-byte boundary plus `off` elements, with memory around it that must stay."""
    room = torch.full((len(values) + 16,), 7.0, dtype=dtype, device=device)
    start = (-room.data_ptr() % 16) // room.element_size() + off
    view = room[start : start + len(values)]
    view.copy_(torch.from_numpy(values))
    return view


def check(
    rule: str,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    backend: str,
    device: torch.device,
    *,
    pieces: list[Piece] = PIECES,
    k: int = 1,
    distribution: str = "normal",
    rounding: str = "nearest",
    square_of_sum: bool = False,
    keep_second: bool = False,
    out: bool = False,
    enabled: int | None = None,
) -> None:
    which, rng = RULES[rule], np.random.default_rng(7)
    seeds = [reference.derive_seed(1, 2, i) for i in range(k)]
    coefs = rng.standard_normal((2, len(which.coefs), k)).astype(np.float32) * np.float32(0.05)
    if "V" in which.coefs:
        coefs[:, -1] = np.abs(coefs[:, -1])
    shared = np.array([[SCALARS[name] * scale for name in which.scalars] for scale in (1.0, 0.75)], np.float32)
    src, dst, states = [], [], [[] for _ in which.states]
    for p in pieces:
        src.append(tensor(rng.standard_normal(p.numel).astype(np.float32), dtype, p.off, device))
        dst.append(tensor(np.zeros(p.numel, np.float32), dtype, p.off, device) if out else src[-1])
        for kept in states:  # positive, over several orders of magnitude
            kept.append(tensor(np.exp(rng.standard_normal(p.numel)).astype(np.float32), state_dtype, p.off, device))
    random = rounding == "stochastic" or state_dtype != torch.float32
    expected = []
    for i, p in enumerate(pieces):
        old = {
            name: reference.widen(storage(kept[i]), name_of(state_dtype))
            for name, kept in zip(which.states, states, strict=True)
        }
        weight, new = reference_rules.apply(
            rule,
            storage(src[i]).copy(),
            old,
            dtype=name_of(dtype),
            tensor_id=p.tensor_id,
            seeds=seeds,
            coefs=dict(zip(which.coefs, coefs[p.group].tolist(), strict=True)),
            scalars=dict(zip(which.scalars, shared[p.group].tolist(), strict=True)),
            distribution=distribution,
            rounding=rounding if dtype != torch.float32 else "nearest",
            rounding_seed=11,
            offset=p.offset,
            square_of_sum=square_of_sum,
        )
        bits = reference.rounding_bits(p.numel, 12, p.tensor_id, p.offset)
        written = which.states[: 1 if keep_second else which.written]
        rounded = [
            reference.round_to(new[name], name_of(state_dtype), "stochastic", bits)
            if name in written
            else storage(kept[i])
            for name, kept in zip(which.states, states, strict=True)
        ]
        if enabled == 0:
            weight, rounded = storage(dst[i]).copy(), [storage(kept[i]).copy() for kept in states]
        expected.append((weight, rounded))
    launch(
        src,
        dst if out else None,
        states=states,
        tensor_ids=[p.tensor_id for p in pieces],
        offsets=[p.offset for p in pieces],
        groups=[p.group for p in pieces],
        seeds=torch.tensor(seeds),
        coefs=torch.from_numpy(coefs),
        shared=torch.from_numpy(shared),
        rounding_seed=torch.tensor([11, 12]) if random else None,
        enabled=None if enabled is None else torch.tensor([enabled], dtype=torch.int32, device=device),
        rule=rule,
        distribution=distribution,
        rounding=rounding,
        square_of_sum=square_of_sum,
        keep_second=keep_second,
        backend=backend,
    )
    for i, (p, (weight, kept)) in enumerate(zip(pieces, expected, strict=True)):
        assert np.array_equal(storage(dst[i]), weight), (p, "weights")
        for name, mine, want in zip(which.states, states, kept, strict=True):
            assert np.array_equal(storage(mine[i]), want), (p, name)
        for t in (dst[i], *(state[i] for state in states)):
            room = t.as_strided((t.numel() + 16,), (1,), 0)
            around = torch.cat([room[: t.storage_offset()], room[t.storage_offset() + t.numel() :]])
            assert bool((around == 7.0).all()), (p, "wrote around the tensor")


def pieces_for(backend: str) -> list[Piece]:
    return SMALL_PIECES if backend in devices.SLOW else PIECES


@RULE
def test_bits(rule: str, backend: str, device: torch.device, dtype: torch.dtype) -> None:
    rounding = "nearest" if dtype == torch.float16 else "stochastic"
    check(rule, dtype, torch.float32, backend, device, pieces=pieces_for(backend), rounding=rounding)


@RULE
def test_bits_with_cosines_and_sines_apart(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Triton computes them for AMD's GPUs; the square of a sum where a rule has one."""
    device = devices.device_of("triton")
    from zokern.backends.triton import launch as triton

    if not triton.INTERPRETED:
        pytest.skip("a compiler's target decides")
    monkeypatch.setattr(triton, "apart", lambda target, dtype, distribution: True)
    for more in ({"rounding": "stochastic"}, {"square_of_sum": "V" in RULES[rule].coefs, "k": 2}):
        check(rule, torch.bfloat16, torch.float32, "triton", device, pieces=SMALL_PIECES[:2], **more)


@RULE
def test_bits_of_several_signs(rule: str, backend: str, device: torch.device) -> None:
    check(
        rule, torch.bfloat16, torch.float32, backend, device, pieces=pieces_for(backend), k=3, distribution="rademacher"
    )


@RULE
@pytest.mark.parametrize("k", [128, 129, 131, 200])
@pytest.mark.parametrize("backend", [name for name in backends.BACKENDS if name != "reference"], indirect=True)
def test_bits_of_more_directions_than_a_block_keeps(rule: str, k: int, backend: str, device: torch.device) -> None:
    """A CUDA block keeps the numbers of 128 in shared memory and reads those of the others; whole and cut blocks."""
    if backend in devices.SLOW:
        pytest.skip("its interpreter takes ten seconds for each; test_ptx.py runs the compiled kernels")
    pieces = [Piece(77, 3), Piece(13, 4, offset=5, group=1, off=1)]
    check(rule, torch.bfloat16, torch.float32, backend, device, pieces=pieces, k=k, distribution="rademacher")
    check(rule, torch.float32, torch.float32, backend, device, pieces=pieces, k=k)


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.states == ("h",)])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_bits_of_curvature_in_bfloat16(rule: str, rounding: str, backend: str, device: torch.device) -> None:
    """h has a rounding seed of its own: the weights' rounding must not depend on it."""
    check(rule, torch.bfloat16, torch.bfloat16, backend, device, pieces=pieces_for(backend), rounding=rounding)


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if "V" in rule.coefs])
def test_bits_of_the_square_of_a_sum(rule: str, backend: str, device: torch.device) -> None:
    pieces = pieces_for(backend)
    check(rule, torch.float32, torch.float32, backend, device, pieces=pieces, k=3, square_of_sum=True)


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.written == 2])
def test_the_second_state_can_be_kept(rule: str, backend: str, device: torch.device) -> None:
    check(rule, torch.float32, torch.float32, backend, device, pieces=pieces_for(backend), keep_second=True)


@RULE
@pytest.mark.parametrize("enabled", [0, 1])
def test_out_of_place_and_disabled(rule: str, enabled: int, backend: str, device: torch.device) -> None:
    check(rule, torch.float16, torch.float32, backend, device, pieces=SMALL_PIECES, out=True, enabled=enabled)


@RULE
@pytest.mark.usefixtures("instruction_set")
def test_bits_on_every_instruction_set(rule: str) -> None:
    check(rule, torch.bfloat16, torch.float32, "cpu", torch.device("cpu"), rounding="stochastic", k=2)


def test_inverses_are_as_exact_as_documented() -> None:
    """Every fifth mantissa; the exponent goes through both by whole powers of two."""
    x = np.arange(1 << 23, dtype=np.uint32).view(np.uint32) | np.uint32(0x3F800000)
    for scale in (0.25, 0.5, 1.0, 2.0, 2.0**-100, 2.0**99):
        values = x.view(np.float32)[:: 5 if scale in (1.0, 2.0) else 64] * np.float32(scale)
        exact = values.astype(np.float64)
        assert np.abs(reference_rules.inverse_root(values) * np.sqrt(exact) - 1).max() < 1e-7
        assert np.abs(reference_rules.inverse(values) * exact - 1).max() < 6.1e-8
    assert reference_rules.inverse_root(np.float32([1.0])) == 1.0
    assert math.isfinite(reference_rules.inverse_root(np.zeros(1, np.float32))[0])


def test_the_curvature_stays_within_its_bounds(backend: str, device: torch.device) -> None:
    """However large the curvature that a step measures, 1/sqrt(h) stays a number."""
    w, h = torch.zeros(64, device=device), torch.ones(64, device=device)
    for v, bound in ((1e30, 2.0**64), (0.0, 2.0**-64)):
        for _ in range(8):  # V = 0 takes h down by 2^24 in a step
            launch(
                [w], None, states=[[h]], tensor_ids=[0], offsets=[0], groups=[0], seeds=torch.tensor([5]),
                coefs=torch.tensor([[[0.0], [v]]]), shared=torch.tensor([[1.0, 1.0 - 2.0**-24]]), rule="hizoo",
                distribution="rademacher", backend=backend,
            )  # fmt: skip
        assert torch.equal(h.cpu(), torch.full((64,), bound))
    assert torch.equal(w.cpu(), torch.zeros(64))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (torch.ones(4), "a state is"),
        (torch.ones(10)[::2], "a state is"),
        (torch.ones(5, 2)[:, 0], "contiguous"),
    ],
)
def test_states_that_do_not_fit_are_refused(state: Tensor, message: str) -> None:
    w = torch.ones(5)
    with pytest.raises(ValueError, match=message):
        launch(
            [w], None, states=[[state]], tensor_ids=[0], offsets=[0], groups=[0], seeds=torch.tensor([5]),
            coefs=torch.ones(1, 1, 1), shared=torch.ones(1, 1), rule="scaled_axpy", backend="cpu",
        )  # fmt: skip
    assert torch.equal(w, torch.ones(5))
