"""The Triton backend against the known answers and the NumPy reference, bit for bit.

Without a GPU the kernels run in Triton's interpreter (conftest.py sets TRITON_INTERPRET), on the same code, or compiled,
in one of PTX (devices.py).
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests import devices
from zokern.backends import cpu
from zokern.backends import triton as backend
from zokern.contract import reference
from zokern.contract.rules import RULES
from zokern.directions import DIRECTIONS, LowRank
from zokern.passes import factors, table
from zokern.passes import spec as scalars

if backend.unavailable_reason() is not None:
    pytest.skip(f"Triton backend: {backend.unavailable_reason()}", allow_module_level=True)

import triton
import triton.language as tl

from zokern.backends.triton import checksum, interpreter, kernels, launch, lowrank, noise, rounding

DEVICE = str(devices.DEVICE["triton"])
ANSWERS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "zk1.json").read_text())
CHUNK = table.CHUNK
# Of a program: the interpreter takes few large ones; a compiler unrolls each into threads, 13 s for as many.
PAIRS = 1 << 16 if launch.INTERPRETED else 4096
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DTYPE_ROUNDINGS = [(dtype, "nearest") for dtype in DTYPES] + [(dtype, "stochastic") for dtype in DTYPES[1:]]
DTYPE_IDS = [f"{dtype}-{how}".removeprefix("torch.") for dtype, how in DTYPE_ROUNDINGS]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def words(values: list[str]) -> torch.Tensor:
    return torch.tensor([int(v, 16) for v in values], dtype=torch.int64).to(torch.int32)


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16).cpu()


def from_storage(x: Any, dtype: torch.dtype) -> torch.Tensor:
    """The reference's storage (float32, or uint16 bits) as a tensor."""
    return torch.from_numpy(np.ascontiguousarray(x)).view(dtype)


def to_storage(x: torch.Tensor) -> Any:
    return x.cpu().numpy() if x.dtype == torch.float32 else x.cpu().view(torch.int16).numpy().view(np.uint16)


# ------------------------------------------------------------------------------------------------------- the functions


@triton.jit
def words_kernel(counters, keys, out, n):
    row = counters + tl.program_id(0) * 4
    zero = tl.zeros([1], tl.uint32)
    key = keys + tl.program_id(0) * 2
    c0, c1, c2, c3 = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    w0, w1, w2, w3 = noise.philox(
        c0.to(tl.uint32) + zero, c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32),
        tl.load(key).to(tl.uint32), tl.load(key + 1).to(tl.uint32),
    )  # fmt: skip
    at = out + tl.program_id(0) * 4 + tl.arange(0, 1)
    tl.store(at, w0.to(tl.int32, bitcast=True))
    tl.store(at + 1, w1.to(tl.int32, bitcast=True))
    tl.store(at + 2, w2.to(tl.int32, bitcast=True))
    tl.store(at + 3, w3.to(tl.int32, bitcast=True))


@triton.jit
def pair_kernel(word, z0, z1, n, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    a, b = noise.normal_pair(tl.load(word + i, mask=i < n, other=0).to(tl.uint32, bitcast=True))
    tl.store(z0 + i, a, mask=i < n)
    tl.store(z1 + i, b, mask=i < n)


@triton.jit
def round_kernel(x, random, out, n, DTYPE: tl.constexpr, ROUNDING: tl.constexpr, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = tl.load(x + i, mask=i < n, other=0.0)
    if ROUNDING == "stochastic":
        r = tl.load(random + i, mask=i < n, other=0).to(tl.uint32, bitcast=True)
        y = rounding.round_stochastic(value, r, DTYPE)
    else:
        y = rounding.round_nearest(value, DTYPE)
    tl.store(out + i, y, mask=i < n)


def run(kernel: Any, grid: int, *args: Any, **kwargs: Any) -> None:
    with launch._launch_context(torch.device(DEVICE)):
        kernel[(grid,)](*args, **kwargs, enable_fp_fusion=False)


def pairs(word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    n = word.numel()
    z0, z1 = torch.empty(2, n, device=DEVICE)
    run(pair_kernel, triton.cdiv(n, PAIRS), word.to(DEVICE), z0, z1, n, SIZE=PAIRS)
    return z0, z1


def rounded(x: torch.Tensor, dtype: torch.dtype, random: torch.Tensor | None = None) -> torch.Tensor:
    n, out = x.numel(), torch.empty(x.numel(), dtype=dtype, device=DEVICE)
    how = "nearest" if random is None else "stochastic"
    x, random = x.to(DEVICE), None if random is None else random.to(DEVICE)
    run(round_kernel, triton.cdiv(n, 1 << 14), x, random, out, n,
        DTYPE=launch.DTYPES[dtype], ROUNDING=how, SIZE=1 << 14)  # fmt: skip
    return out


def test_words() -> None:
    cases = ANSWERS["philox"]
    counters = torch.stack([words(case["counter"]) for case in cases]).to(DEVICE)
    keys = torch.tensor([[case["seed"] & 0xFFFFFFFF, case["seed"] >> 32] for case in cases]).to(torch.int32).to(DEVICE)
    out = torch.empty(len(cases), 4, dtype=torch.int32, device=DEVICE)
    run(words_kernel, len(cases), counters, keys, out, len(cases))
    assert torch.equal(out.cpu(), torch.stack([words(case["words"]) for case in cases]))


def test_pairs_known_answers() -> None:
    z0, z1 = pairs(words([case["word"] for case in ANSWERS["pair"]]))
    assert torch.equal(bits_of(z0), words([case["z0"] for case in ANSWERS["pair"]]))
    assert torch.equal(bits_of(z1), words([case["z1"] for case in ANSWERS["pair"]]))


def test_pairs_reference() -> None:
    word = torch.randint(-(2**31), 2**31, (1 << 18,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    z0, z1 = pairs(word)
    want0, want1 = reference.normal_pair(word.numpy().view(np.uint32))
    assert torch.equal(z0.cpu(), torch.from_numpy(want0))
    assert torch.equal(z1.cpu(), torch.from_numpy(want1))


def edge_floats(dtype: torch.dtype) -> torch.Tensor:
    """float32 on, next to and halfway between values of `dtype`, over its range, its subnormals and its overflow."""
    g = torch.Generator().manual_seed(1)
    if dtype == torch.float16:
        grid = torch.arange(0, 0x7C01, 3, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    else:
        grid = torch.arange(0, 0x7F81, 3, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    low = {torch.float16: 13, torch.bfloat16: 16}[dtype]
    base = grid.view(torch.int32)
    half = 1 << (low - 1)
    halves = [base + step for step in (0, 1, -1, half, half - 1, half + 1)]
    special = torch.tensor([65504.0, 65519.996, 65520.0, 65535.0, 1e30, float("inf"), float("nan"), 2.0**-24, 2.0**-25,
                            2.0**-26, 1e-20, 1e-44, 0.0, 3.3961775e38, 3.4028235e38])  # fmt: skip
    random = torch.randint(0, 0x7F800000, (4000,), dtype=torch.int32, generator=g)
    x = torch.cat([*[h[h >= 0] for h in halves], special.view(torch.int32), random]).view(torch.float32)
    return torch.cat([x, -x])


def same_floats(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, where every NaN counts as the same: its payload is no part of the contract."""
    nan = a.isnan() & b.isnan()
    return torch.equal(bits_of(a).masked_fill(nan, 0), bits_of(b).masked_fill(nan, 0))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=name_of)
@pytest.mark.parametrize("how", ["nearest", "stochastic", "none", "most"])
def test_rounding(dtype: torch.dtype, how: str) -> None:
    x = edge_floats(dtype)
    random = {
        "nearest": None,
        "stochastic": torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, generator=torch.Generator().manual_seed(2)),
        "none": torch.zeros(x.shape, dtype=torch.int32),
        "most": torch.full(x.shape, 0xFFFF, dtype=torch.int32),
    }[how]
    got = rounded(x, dtype, random).cpu()
    bits = None if random is None else random.numpy().astype(np.uint32)
    kind = "nearest" if random is None else "stochastic"
    want = from_storage(reference.round_to(x.numpy(), name_of(dtype), kind, bits), dtype)
    assert same_floats(got, want)
    assert torch.equal(got.isnan(), x.isnan())
    if random is None:
        assert same_floats(got, x.to(dtype))


def test_rounding_known_answers() -> None:
    for case in ANSWERS["rounding_bf16"]:
        x = words(case["x"]).view(torch.float32)
        random = reference.rounding_bits(x.numel(), case["seed"], case["tensor_id"], case["offset"])
        got = rounded(x, torch.bfloat16, torch.from_numpy(random.astype(np.int32)))
        assert torch.equal(bits_of(got), words(case["bf16"]).to(torch.int16))


def test_stochastic_fp16_is_unbiased() -> None:
    """Over all 2^16 random words the mean of the results is the value itself."""
    random = torch.arange(1 << 16, dtype=torch.int32)
    for value in (1.0003, -3.7e-4, 65503.0, 2.0**-14 * 0.987, -(2.0**-17) * 1.37):
        x = torch.full((1 << 16,), value)
        got = rounded(x, torch.float16, random).double()
        assert got.mean().item() == x[0].double().item()


# ------------------------------------------------------------------------------------------------------------ the pass


@dataclass
class Piece:
    """One tensor of a call: where it lies in the whole tensor, and how its memory is aligned."""

    numel: int
    tensor_id: int = 0
    offset: int = 0
    group: int = 0
    src_shift: int = 0  # elements by which the address is off the alignment that its offset asks for
    dst_shift: int = 0
    in_place: bool = False
    src: torch.Tensor = field(init=False)
    dst: torch.Tensor = field(init=False)
    guarded: torch.Tensor = field(init=False)  # dst with a guard on either side

    def allocate(self, dtype: torch.dtype, scale: float = 1.0) -> None:
        guard, lead = 64, self.offset % 8
        generator = torch.Generator().manual_seed(self.numel + self.tensor_id)

        def memory(shift: int) -> tuple[torch.Tensor, torch.Tensor]:
            store = torch.full((self.numel + 2 * guard + 16,), -7.0, dtype=dtype, device=DEVICE)
            skip = (-store.data_ptr() // store.element_size()) % 8 + guard + lead + shift
            return store, store[skip : skip + self.numel]

        _, self.src = memory(self.src_shift)
        self.src.copy_(torch.randn(self.numel, generator=generator) * scale)
        self.guarded, self.dst = memory(self.dst_shift)
        if self.in_place:
            self.dst.copy_(self.src)
            self.src = self.dst


def make_table(pieces: list[Piece]) -> table.Table:
    src, dst = [p.src for p in pieces], [p.dst for p in pieces]
    ids, offsets, groups = zip(*[(p.tensor_id, p.offset, p.group) for p in pieces], strict=True)
    return table.build(src, dst, ids, offsets, groups)


def seeds_and_coefs(k: int, groups: int) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    seeds = [reference.derive_seed(11, 5, i) for i in range(k)]
    generator = torch.Generator().manual_seed(k)
    return seeds, torch.randn(groups, k, generator=generator) * 0.1, 1 - torch.rand(groups, generator=generator) * 0.1


def check(
    pieces: list[Piece],
    dtype: torch.dtype,
    *,
    k: int = 1,
    groups: int = 1,
    distribution: str = "normal",
    how: str = "nearest",
    enabled: int | None = None,
) -> None:
    """Runs one pass and compares every tensor, and the memory around it, with the reference."""
    seeds, coefs, decays = seeds_and_coefs(k, groups)
    for p in pieces:
        p.allocate(dtype)
    wanted, guards = [], []
    for p in pieces:
        src = to_storage(p.src).copy()
        result = reference.add_noise(
            src, dtype=name_of(dtype), tensor_id=p.tensor_id, seeds=seeds, coefs=coefs[p.group].tolist(),
            decay=decays[p.group].item(), distribution=distribution, rounding=how, rounding_seed=99, offset=p.offset,
        )  # fmt: skip
        wanted.append(p.dst.clone().cpu() if enabled == 0 else from_storage(result, dtype))
        guards.append(p.guarded.clone())
    rows = make_table(pieces)
    numbers = scalars.PassNumbers(
        torch.tensor(seeds, dtype=torch.int64, device=DEVICE),
        coefs.unsqueeze(1).to(DEVICE),
        decays.unsqueeze(1).to(DEVICE),
        torch.tensor([99, 0], device=DEVICE),
        None if enabled is None else torch.tensor([enabled], dtype=torch.int32, device=DEVICE),
    )
    launch.run(rows, replace(scalars.AXPY, direction=DIRECTIONS[distribution], rounding=how), numbers)
    for p, want, guard in zip(pieces, wanted, guards, strict=True):
        assert torch.equal(p.dst.cpu(), want), p
        start = p.dst.storage_offset()
        assert torch.equal(p.guarded[:start], guard[:start]), f"{p}: wrote before the tensor"
        assert torch.equal(p.guarded[start + p.numel :], guard[start + p.numel :]), f"{p}: wrote behind the tensor"


@pytest.mark.parametrize(("dtype", "how"), DTYPE_ROUNDINGS, ids=DTYPE_IDS)
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_pass(dtype: torch.dtype, how: str, distribution: str) -> None:
    """Whole and cut tiles and chunks, odd lengths, starts in the middle of a block, one element, none at all."""
    pieces = [
        Piece(CHUNK + 2 * 1024 + 5, 1),
        Piece(2500, 2, offset=1021),
        Piece(1, 3, offset=7),
        Piece(0, 4),
        Piece(3, 5, offset=CHUNK - 1),
        Piece(1024, 0xFFFFFFFF, offset=5 * CHUNK, in_place=True),
    ]
    check(pieces, dtype, distribution=distribution, how=how)


@pytest.mark.parametrize(("dtype", "how"), DTYPE_ROUNDINGS, ids=DTYPE_IDS)
@pytest.mark.parametrize("shifts", [(1, 0), (0, 1), (3, 5)])
def test_unaligned(dtype: torch.dtype, how: str, shifts: tuple[int, int]) -> None:
    pieces = [Piece(3001, 6, offset=o, src_shift=shifts[0], dst_shift=shifts[1]) for o in (0, 13)]
    check(pieces, dtype, how=how)


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("offset", [2**32 - 1500, 2**32 + 3, 2**35 - 2040, 2**35 + 130, 2**39 - 1000, 2**40 - 2048])
def test_far_offsets(offset: int, distribution: str) -> None:
    """Index above 2^32, block above 2^32 (2^35 elements), Rademacher block above 2^32 (2^39 elements)."""
    check([Piece(2048, 3, offset=offset)], torch.bfloat16, distribution=distribution, how="stochastic")


@pytest.mark.parametrize("k", [0, 1, 2, 5, 33])
@pytest.mark.parametrize(("dtype", "distribution"), [(torch.float32, "normal"), (torch.bfloat16, "rademacher")])
def test_directions(k: int, dtype: torch.dtype, distribution: str) -> None:
    check([Piece(1300, 1, offset=4)], dtype, k=k, distribution=distribution)


@pytest.mark.skipif(not launch.INTERPRETED, reason="a compiler's target decides")
@pytest.mark.parametrize(("dtype", "how"), DTYPE_ROUNDINGS, ids=DTYPE_IDS)
@pytest.mark.parametrize("k", [1, 3])
def test_cosines_and_sines_apart(k: int, dtype: torch.dtype, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for AMD's GPUs: the same bits."""
    monkeypatch.setattr(launch, "apart", lambda target, dtype, distribution: distribution == "normal")
    used: list[Any] = []
    grown = kernels.apart
    monkeypatch.setattr(kernels, "apart", lambda x: used.append(x) or grown(x))
    check([Piece(CHUNK + 2 * 1024 + 5, 1), Piece(2500, 2, offset=1021)], dtype, k=k, how=how)
    assert len(used) > 3


TARGETS = {
    name: SimpleNamespace(backend="hip" if name.startswith("gfx") else "cuda", arch=arch)
    for name, arch in (
        ("gfx942", "gfx942"),
        ("gfx950", "gfx950"),
        ("gfx1250", "gfx1250"),
        ("sm_90", 90),
        ("sm_100", 100),
        ("sm_120", 120),
    )
}


def test_what_a_pass_is_compiled_with_follows_its_target() -> None:
    """Not PyTorch's build: a CUDA build compiles for AMD's GPUs too. maxnreg is NVIDIA's alone, waves_per_eu AMD's."""
    bf16, fp32, axpy, helene = torch.bfloat16, torch.float32, RULES["axpy"], RULES["helene"]
    for name, target in TARGETS.items():
        amd = name.startswith("gfx")
        assert launch.apart(target, bf16, "normal") == amd
        assert not launch.apart(target, fp32, "normal")
        assert not launch.apart(target, bf16, "lowrank")
        assert launch.in_pairs(target, bf16) == (name == "sm_100")
        unfused = [dtype for dtype in (fp32, bf16, torch.float16) if launch.of_target(target, dtype)["UNFUSED"]]
        assert unfused == ([bf16] * (name == "gfx1250") + [torch.float16] if amd else [])
        assert ("maxnreg" in launch.options(target, helene, bf16, "nearest", "lowrank")) == (not amd)
        assert ("maxnreg" in launch.options(target, helene, fp32, "nearest", "lowrank")) == (not amd)
        assert "maxnreg" not in launch.options(target, axpy, bf16, "nearest", "lowrank")
        assert ("maxnreg" in launch.chain_options(target, "lowrank")) == (not amd)
        assert launch.chain_options(target, "normal") == launch.LAUNCH_OPTIONS
        assert ("waves_per_eu" in launch.options(target, axpy, bf16, "nearest", "normal")) == amd
        assert launch.options(target, axpy, fp32, "nearest", "normal") == launch.LAUNCH_OPTIONS
    assert launch.of_target(None, torch.float16) == {"PACKED": False, "UNFUSED": False}
    assert launch.options(None, helene, bf16, "stochastic", "lowrank") == launch.LAUNCH_OPTIONS


def test_many_tensors_and_groups() -> None:
    """A table with rows of every size in several groups, in one launch."""
    sizes = [(i, 1 + 37 * i % 1500) for i in range(40)]
    pieces = [Piece(n, 100 + i, offset=11 * i, group=i % 4, src_shift=i % 3, dst_shift=i % 2) for i, n in sizes]
    check(pieces, torch.float16, k=3, groups=4, how="stochastic")


@pytest.mark.parametrize("enabled", [0, 1])
def test_enabled(enabled: int) -> None:
    check([Piece(2100, 1), Piece(9, 2, offset=3)], torch.bfloat16, enabled=enabled)


def test_minus_zero_and_huge() -> None:
    """K = 0 and decay 1 is a copy that keeps the sign of zero, infinities and subnormals."""
    x = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-45, -1e-40, 3.4e38, 1.0], device=DEVICE)
    out = torch.empty_like(x)
    empty = scalars.PassNumbers(
        torch.empty(0, dtype=torch.int64, device=DEVICE),
        torch.empty(1, 1, 0, device=DEVICE),
        torch.ones(1, 1, device=DEVICE),
    )
    launch.run(table.build([x], [out], [0], [0], [0]), scalars.AXPY, empty)
    assert torch.equal(bits_of(out), bits_of(x))


def test_nothing_to_do() -> None:
    """No chunk at all, and the chunk that the table gives an empty tensor in the middle of one."""
    check([Piece(0, 1)], torch.float32)
    check([Piece(0, 1, offset=1500), Piece(3, 1)], torch.float32)


def test_backend_protocol() -> None:
    """What backends.choose hands out: a table, scalars on the host, names."""
    piece = Piece(1100, 5)
    piece.allocate(torch.bfloat16)
    seeds, coefs, decays = seeds_and_coefs(2, 1)
    want = reference.add_noise(
        to_storage(piece.src).copy(), dtype="bfloat16", tensor_id=5, seeds=seeds, coefs=coefs[0].tolist(),
        decay=decays[0].item(), rounding="stochastic", rounding_seed=8,
    )  # fmt: skip
    shared, enabled = decays.unsqueeze(1), torch.ones(1, dtype=torch.int32)
    numbers = scalars.PassNumbers(torch.tensor(seeds), coefs.unsqueeze(1), shared, torch.tensor([8, 0]), enabled)
    backend.run(make_table([piece]), replace(scalars.AXPY, rounding="stochastic"), numbers)
    assert torch.equal(piece.dst.cpu(), from_storage(want, torch.bfloat16))


@pytest.mark.skipif(devices.EMULATED, reason="emulation puts away with the reasons")
def test_unavailable_reason() -> None:
    assert backend.unavailable_reason(torch.device(DEVICE)) is None
    other = torch.device("cuda" if DEVICE == "cpu" else "cpu")
    assert "tensors only" in (backend.unavailable_reason(other) or "")


@pytest.mark.skipif(not launch.INTERPRETED, reason="a GPU's tile is one block per thread")
@pytest.mark.parametrize("block", [16, 512, 2048])
def test_tile_size_changes_no_bit(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "block", lambda target: block)
    pieces = [Piece(2 * block * 8 + 3, 1, offset=max(CHUNK - 8 * block - 2, 5))]
    check(pieces, torch.bfloat16, k=2, how="stochastic")
    check(pieces, torch.float32, distribution="rademacher")


@pytest.mark.skipif(not launch.INTERPRETED, reason="looks into the interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("offset", "touched"), [(0, 4), (1021, 5)])
@pytest.mark.parametrize("shift", [0, 1])
def test_wide_accesses_are_aligned(
    dtype: torch.dtype, offset: int, touched: int, shift: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole tiles of an aligned tensor, and only those, use 16-byte accesses, at multiples of 16 bytes."""
    original, wide, cut = kernels._addresses, [], []

    def spy(pointer: Any, offsets: Any, CUT: bool) -> Any:
        address = original(pointer, offsets, CUT)
        (cut if CUT else wide).append(address.handle.data)
        return address

    monkeypatch.setattr(kernels, "_addresses", spy)
    monkeypatch.setattr(launch, "block", lambda target: 128)
    check([Piece(3 * 1024 + 5, 1, offset=offset, src_shift=shift)], dtype)  # three of the touched tiles are whole
    whole, accesses = 0 if shift else 3, 4 if dtype == torch.float32 else 2
    assert all((rows[:, 0] % 16 == 0).all() for rows in wide)
    assert len(wide) == whole * accesses
    assert len(cut) == (touched - whole) * accesses


# ------------------------------------------------------------------------------------------------------------ low rank


def low_rank_results(case: tuple[Any, ...], on: Any) -> list[torch.Tensor]:
    """Everything that a pass or a chain may have written, by this backend or the CPU's."""
    rule_name, dtype, state, how, rank, k, stages, fork, pieces = case
    rule, generator = RULES[rule_name], torch.Generator().manual_seed(rank)
    device = torch.device(DEVICE) if on is backend else torch.device("cpu")

    def drawn(shape: tuple[int, ...], of: torch.dtype) -> torch.Tensor:
        return (torch.randn(shape, generator=generator).abs() + 0.1).to(of).to(device)

    shapes = [shape for shape, *_ in pieces]
    offsets, strides, wholes = ([p[i] for p in pieces] for i in (1, 2, 3))
    src = [drawn(shape, dtype) for shape in shapes]
    states = [[drawn(shape, state) for shape in shapes] for _ in rule.states]
    probes = [torch.zeros_like(x) for x in src] if fork else []
    made, _ = table.tables(
        src, src, list(range(len(src))), offsets, [0] * len(src), None, states, probes, strides, wholes, rank
    )  # fmt: skip
    direction = LowRank(rank)

    def stage(name: str, count: int) -> tuple[scalars.PassSpec, scalars.PassNumbers]:
        of = RULES[name]
        numbers = scalars.PassNumbers(
            torch.randint(0, 2**62, (count,), generator=generator).to(device),
            torch.rand(1, len(of.coefs), count, generator=generator).to(device) * 0.1,
            torch.rand(1, len(of.scalars), generator=generator).to(device) * 0.5 + 0.4,
            torch.tensor([5, 6], device=device),
        )
        return scalars.PassSpec(of, direction, how), numbers

    perturbs = scalars.rule_of_probes(rule).name
    todo = [stage(rule_name if i % 2 else perturbs, (k, 0, 1)[i % 3]) for i in range(stages)] or [stage(rule_name, k)]
    if fork:
        todo[-1] = stage(perturbs, k)
    assert all(one.factors is not None for one in made)
    for one in made:
        if stages:
            on.run_chain(one, scalars.Chain(todo, rule, fork))
        else:
            on.run(one, *todo[0])
    return [t.cpu() for t in (*src, *probes, *itertools.chain(*states))]


def whole(*shape: int) -> tuple[Any, ...]:
    return shape, 0, 0, shape


# Shape here, global index of its first element, stride between its rows, shape of the whole.
LOW_RANK = {
    "rows of whole blocks": (
        "axpy", torch.bfloat16, torch.float32, "stochastic", 1, 3, 0, False, [whole(40, 64), whole(300, 8)],
    ),
    "thin rows": ("axpy", torch.float32, torch.float32, "nearest", 1, 2, 0, False, [whole(60, c) for c in (2, 3, 5, 7, 9)]),
    "rows over chunks": (
        "axpy", torch.float16, torch.float32, "nearest", 2, 1, 0, False,
        [
            ((700,), 2 * 16400 - 300, 0, (3, 16400)),
            ((700,), 16393 - 300, 0, (3, 16393)),  # its second row begins one behind a block's first in a chunk
            ((90,), 5 * CHUNK - 40, 0, (5000, 37)),
        ],
    ),
    "stacks": ("hizoo", torch.bfloat16, torch.bfloat16, "stochastic", 4, 2, 0, False, [whole(5, 9, 24), whole(4, 6, 7)]),
    "shards": (
        "adam", torch.float32, torch.float32, "nearest", 2, 2, 0, False,
        [((5, 24), 8, 96, (5, 96)), ((4, 5), 3, 13, (4, 13)), ((3, 40), 28 * 2048 + 1000, 2048, (2, 30, 2048))],
    ),
    "helene": ("helene", torch.float16, torch.float32, "stochastic", 4, 3, 0, False, [whole(9, 40)]),
    "chain": ("hizoo", torch.bfloat16, torch.float32, "stochastic", 2, 3, 4, True, [whole(9, 40), whole(6, 13)]),
    "chain of rank 1": ("momentum", torch.float32, torch.float32, "nearest", 1, 2, 3, False, [whole(3, 9, 24)]),
}  # fmt: skip


@pytest.mark.parametrize("case", LOW_RANK)
def test_low_rank(case: str) -> None:
    got, want = low_rank_results(LOW_RANK[case], backend), low_rank_results(LOW_RANK[case], cpu)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("rule", [name for name in RULES if name not in ("axpy", "hizoo", "adam", "helene")])
def test_low_rank_in_every_rule(rule: str) -> None:
    case = (rule, torch.bfloat16, torch.float32, "stochastic", 2, 2, 0, False, [whole(5, 24)])
    got, want = low_rank_results(case, backend), low_rank_results(case, cpu)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_low_rank_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors that do not fit are made and used by and by: the bits are the same, also of a chain."""
    for case in (LOW_RANK["thin rows"], LOW_RANK["chain"]):
        want = low_rank_results(case, cpu)
        with monkeypatch.context() as patch:
            patch.setattr(factors, "MOST_BYTES", 1)
            filled: list[Any] = []
            fill = launch.fill
            patch.setattr(launch, "fill", lambda *given, fill=fill, filled=filled: filled.append(given) or fill(*given))
            got = low_rank_results(case, backend)
        assert len(filled) == len(case[-1])
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@triton.jit
def factor_kernel(x, out, n, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + i, lowrank._factor(tl.load(x + i, mask=i < n, other=0.0)), mask=i < n)


def test_low_rank_factors_are_rounded_to_the_grid() -> None:
    """Halves of its steps, beside them, and where it becomes coarser than bfloat16 and finer."""
    halves = torch.arange(0, 2000) * 2.0**-25
    wide = torch.randn(4000, generator=torch.Generator().manual_seed(4)) * 2.0 ** torch.arange(-30, 2).repeat(125)
    x = torch.cat([halves, halves * (1 + 2.0**-23), halves * (1 - 2.0**-24), wide])
    x = torch.cat([x, -x]).to(DEVICE)
    out = torch.empty_like(x)
    run(factor_kernel, triton.cdiv(x.numel(), 4096), x, out, x.numel(), SIZE=4096)
    assert torch.equal(out.cpu(), torch.from_numpy(reference.factor(x.cpu().numpy())))


@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_factors(rank: int) -> None:
    """As the reference has them, with no number written beside them."""
    whole_tensor = torch.zeros(2, 5, 41, device=DEVICE)
    (made,), _ = table.tables([whole_tensor], [whole_tensor], [9], [0], [0], rank=rank)
    found = made.factors
    assert found is not None
    (piece,), seeds = found.pieces(2), [7, 2**62 + 1]
    values = torch.full((2 * piece.of_seed,), -7.0, device=DEVICE)
    launch.fill(found, piece, torch.tensor(seeds, device=DEVICE), values.data_ptr())
    for own, seed in zip(values.cpu().view(2, -1), seeds, strict=True):
        for side, want in zip(found.sides.tolist(), reference.factors((2, 5, 41), rank, seed, 9), strict=True):
            numel, _, _, place = side
            assert torch.equal(own[place : place + numel], torch.from_numpy(want.reshape(-1)))
            assert (own[place + numel : place + factors.padded(numel)] == -7).all()


# ------------------------------------------------------------------------------------------------------ the interpreter


def exact_fma(a: float, b: float, c: float) -> float:
    """Correctly rounded float32 of the exact a*b + c, by rational arithmetic."""
    value = Fraction(a) * Fraction(b) + Fraction(c)
    if value == 0:
        return float(np.float32(a) * np.float32(b) + np.float32(c))
    magnitude = abs(value)
    exponent = max(magnitude.numerator.bit_length() - magnitude.denominator.bit_length() - 1, -126)
    if magnitude >= Fraction(2) ** (exponent + 1) and exponent >= -126:
        exponent += 1
    ulp = Fraction(2) ** (exponent - 23)
    rounded_value = round(magnitude / ulp) * ulp  # Python rounds halves of a Fraction to even
    if rounded_value >= Fraction(2) ** 128:
        return float("inf") if value > 0 else float("-inf")
    return float(rounded_value) if value > 0 else -float(rounded_value)


def test_fma_is_fused() -> None:
    """Random, cancelling, halfway and subnormal cases against rational arithmetic."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 0xFF000000, (3, 3000), dtype=np.uint32)
    bits = (bits & np.uint32(0x80FFFFFF) | bits & np.uint32(0x7E000000)).view(np.float32)  # spans all finite exponents
    narrow = rng.standard_normal((3, 3000)).astype(np.float32)
    a, b, c = np.concatenate([bits, narrow], axis=1)
    with np.errstate(over="ignore"):
        cancelling = -(a.astype(np.float64) * b).astype(np.float32)
    # 1 + 2^-24 + tiny: a double rounding through float64 loses the tiny part and rounds the tie to even
    tie_a, tie_b = np.float32(1 + 2**-12), np.float32(1 - 2**-12)
    a = np.concatenate([a, a, [tie_a, 2.0**-60, -(2.0**-60), 2.0**-75]]).astype(np.float32)
    b = np.concatenate([b, b, [tie_b, 2.0**-30, 2.0**-30, 2.0**-75]]).astype(np.float32)
    c = np.concatenate([c, cancelling, [2.0**-24, 1 + 2**-23, 1 + 2**-23, 1e-45]]).astype(np.float32)
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    a, b, c = a[finite], b[finite], c[finite]
    want = np.array([exact_fma(float(x), float(y), float(z)) for x, y, z in zip(a, b, c, strict=True)], np.float32)
    assert np.array_equal(interpreter.fma(a, b, c).view(np.uint32) << 1, want.view(np.uint32) << 1)  # not 0's sign
    with np.errstate(all="ignore"):
        for x, y, z in [(np.inf, 0, 1), (np.inf, 1, -np.inf), (np.nan, 1, 1), (np.inf, 2, 5), (-3e38, 3e38, 0)]:
            got = interpreter.fma(*(np.array([v], np.float32) for v in (x, y, z)))
            assert np.array_equal(got, np.array([np.float32(x * y + z)]), equal_nan=True)


def test_halfway_case_needs_round_to_odd() -> None:
    """1.000244140625^2 is a tie of float32, and the addend too small for float64: only its sign decides."""
    x, tiny = np.array([1 + 2.0**-12], np.float32), np.array([2.0**-80], np.float32)
    down, up = np.float32(1 + 2.0**-11), np.float32(1 + 2.0**-11 + 2.0**-23)
    assert interpreter.fma(x, x, tiny) == up
    assert interpreter.fma(x, x, -tiny) == down
    assert interpreter.fma(-x, x, -tiny) == -up
    assert interpreter.fma(x, x, 0 * tiny) == down


@triton.jit
def count_kernel(bounds, out):
    total = 0
    for i in range(tl.load(bounds), tl.load(bounds + 1)):
        total += i
    tl.store(out, total)


@pytest.mark.skipif(not launch.INTERPRETED, reason="only the interpreter is patched")
def test_a_tensor_is_a_bound_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with Triton 3.6's own rule, which NumPy 2.4 refuses: int() of the array of one element that a scalar is."""
    from triton.runtime import interpreter as of_triton

    original, used = of_triton._patch_lang_tensor, []

    def refuse(tensor: Any) -> int:
        used.append(tensor)
        raise TypeError("only 0-dimensional arrays can be converted to Python scalars")

    def as_triton_3_6(tensor: Any, *scope: Any) -> None:
        original(tensor, *scope)
        tensor.__index__ = refuse

    monkeypatch.setattr(of_triton, "_patch_lang_tensor", as_triton_3_6)
    bounds, out = torch.tensor([3, 7]), torch.zeros(1, dtype=torch.int64)
    run(count_kernel, 1, bounds, out)
    assert int(out) == 3 + 4 + 5 + 6
    assert used == []
    with pytest.raises(Exception, match="only 0-dimensional"):  # what is patched is what loops ask
        count_kernel[(1,)](bounds, out)
    assert len(used) == 1


@pytest.mark.parametrize(("data", "value"), [([2**40 + 1], 2**40 + 1), ([[-3]], -3), (7, 7)])
def test_the_integer_of_a_tensor(data: Any, value: int) -> None:
    def tensor(data: Any) -> Any:
        return SimpleNamespace(handle=SimpleNamespace(data=np.array(data, np.int64)))

    got = interpreter.index(tensor(data))
    assert (got, type(got)) == (value, int)
    with pytest.raises(ValueError, match="size 1"):  # several are no bound
        interpreter.index(tensor([1, 2]))


@pytest.mark.skipif(not launch.INTERPRETED, reason="only the interpreter is patched")
def test_interpreter_is_restored() -> None:
    from triton.runtime import interpreter as of_triton

    names = ["_patch_lang", "_patch_lang_tensor", "_get_np_dtype"]
    before, patches = dict(vars(of_triton.interpreter_builder)), [getattr(of_triton, name) for name in names]
    types = [tl.block_type.__init__, tl.tensor.__init__]

    @interpreter.exact_arithmetic()
    def fail() -> None:
        assert "create_fma" in vars(of_triton.interpreter_builder)
        assert all(getattr(of_triton, name) is not patch for name, patch in zip(names, patches, strict=True))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert vars(of_triton.interpreter_builder) == before
    assert [getattr(of_triton, name) for name in names] == patches
    assert [tl.block_type.__init__, tl.tensor.__init__] == types


@pytest.mark.skipif(not launch.INTERPRETED, reason="only the interpreter is patched")
def test_interpreter_patches_the_language_once_for_each_file_and_launch(monkeypatch) -> None:
    """And not at each call of a function, which takes most of a launch's time; Triton's own functions have files too."""
    from triton.runtime import interpreter as of_triton

    files: list[str] = []
    patch = of_triton._patch_lang
    monkeypatch.setattr(of_triton, "_patch_lang", lambda fn: [files.append(fn.__globals__["__name__"]), patch(fn)][1])
    first = checksum.normal_checksum(0, 3000, torch.device("cpu"))
    once, files[:] = list(files), []
    assert len(set(once)) == len(once) > 3
    assert "triton.language.standard" in once
    assert checksum.normal_checksum(0, 3000, torch.device("cpu")) == first
    assert files == once


@pytest.mark.skipif(not launch.INTERPRETED, reason="only the interpreter is patched")
def test_interpreter_works_a_type_out_once(monkeypatch) -> None:
    """In a launch, and not for each result of an operation."""
    made: list[tuple[str, ...]] = []

    def noting(init):
        def noted(self, *args) -> None:
            init(self, *args)
            if not getattr(self, "dtype", self).is_ptr() and not getattr(self, "element_ty", tl.int1).is_ptr():
                made.append((type(self).__name__, self.type.name if isinstance(self, tl.tensor) else self.name))

        return noted

    for cls in (tl.block_type, tl.tensor):
        monkeypatch.setattr(cls, "__init__", noting(cls.__init__))
    checksum.normal_checksum(0, 3000, torch.device("cpu"))
    assert {name for name, _ in made} == {"block_type", "tensor"}
    assert len(set(made)) == len(made) > 10
