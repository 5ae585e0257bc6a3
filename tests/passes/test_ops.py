"""The pass on every backend: bit equality with the reference, independence of geometry, bad input by name."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import zokern
from tests import devices
from tests.devices import DTYPES
from tests.launching import launch
from tests.pairs import pairs
from zokern import backends
from zokern.backends import native
from zokern.passes import table

# Values over many magnitudes: each dtype's subnormals, the usual size of weights, and numbers near overflow.
SCALES = (1.0, 1e-2, 1e-6, 1e-30, 3e4)
SIZES = (1, 7, 8, 129, 16385, 40001)
SMALL_SIZES = (1, 7, 8, 129, 1000)
CPU = torch.device("cpu")


def weights(dtype: torch.dtype, sizes: tuple[int, ...] = SIZES) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    scales = [SCALES[i % len(SCALES)] for i in range(len(sizes))]
    return [(torch.randn(n, generator=g) * s).to(dtype) for n, s in zip(sizes, scales, strict=True)]


def run(start: list[torch.Tensor], backend: str, device: torch.device, **pass_: object) -> list[torch.Tensor]:
    moved = [t.clone().to(device) for t in start]
    zokern.add_noise_(moved, backend=backend, **pass_)
    return [t.cpu() for t in moved]


def assert_same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y), f"{int((x != y).sum())} of {x.numel()} elements differ"


# A kernel is made for a dtype, a distribution and a rounding: each meets every number of seeds and every place.
KERNELS = list(itertools.product(DTYPES, ["normal", "rademacher"], ["nearest", "stochastic"]))
PLACES = [(0, 1.0), (3, 0.9), (2**35 - 5, 1.0), (2**40 + 1, -0.5)]  # offset and decay


@pytest.mark.parametrize(("kernel", "num_seeds", "place"), pairs(KERNELS, [0, 1, 2, 5, 33], PLACES), ids=str)
@pytest.mark.parametrize("backend", [name for name in backends.BACKENDS if name != "reference"], indirect=True)
def test_bits_equal_the_reference(
    backend: str, device: torch.device, kernel: tuple[torch.dtype, str, str], num_seeds: int, place: tuple[int, float]
) -> None:
    (dtype, distribution, rounding), (offset, decay) = kernel, place
    # tests/backends/test_triton.py has the rest
    start = weights(dtype, SMALL_SIZES[3:4] if backend in devices.SLOW else SIZES)
    pass_ = {
        "tensor_ids": [2**32 - 1 - i for i in range(len(start))],
        "seeds": [2**63 - 1 - k for k in range(num_seeds)],
        "coefs": [0.5 / (k + 1) for k in range(num_seeds)],
        "decay": decay,
        "distribution": distribution,
        "rounding": rounding,
        "rounding_seed": 9 if rounding == "stochastic" else None,
        "offsets": [offset + 8 * i for i in range(len(start))],
    }
    assert_same(run(start, backend, device, **pass_), run(start, "reference", CPU, **pass_))


def test_noise_known_answers(backend: str, device: torch.device, vectors: dict) -> None:
    for e in vectors["normal"]:
        z = zokern.noise(
            len(e["z"]), seed=e["seed"], tensor_id=e["tensor_id"], offset=e["offset"], backend=backend, device=device
        )
        assert [f"{x & 0xFFFFFFFF:08x}" for x in z.cpu().view(torch.int32).tolist()] == e["z"]
    for e in vectors["rademacher"]:
        z = zokern.noise(
            len(e["sign"]),
            seed=e["seed"],
            tensor_id=e["tensor_id"],
            offset=e["offset"],
            distribution="rademacher",
            backend=backend,
            device=device,
        )
        assert z.tolist() == e["sign"]


def test_stochastic_bf16_known_answers(backend: str, device: torch.device, vectors: dict) -> None:
    """coef 0 leaves acc = decay*w; the values come in through a float32 add, which only bf16 pairs can express."""
    for e in vectors["rounding_bf16"]:
        bits = torch.tensor([int(x, 16) for x in e["x"]], dtype=torch.int64).to(torch.int32)
        x = bits.view(torch.float32)
        high = (bits & ~0xFFFF).view(torch.float32)  # exact in bf16
        for i in range(len(x)):
            if not torch.isfinite(x[i]):
                continue
            w = high[i : i + 1].to(torch.bfloat16).to(device)
            low = float(x[i].double() - high[i].double())
            at = {"tensor_id": e["tensor_id"], "offset": e["offset"] + i}
            sign = zokern.noise(1, seed=1, **at, distribution="rademacher", backend=backend, device=device)
            zokern.add_noise_(
                [w],
                tensor_ids=[e["tensor_id"]],
                seeds=[1],
                coefs=[low * float(sign)],
                distribution="rademacher",
                rounding="stochastic",
                rounding_seed=e["seed"],
                offsets=[e["offset"] + i],
                backend=backend,
            )
            assert f"{int(w.cpu().view(torch.int16)) & 0xFFFF:04x}" == e["bf16"][i]


def test_special_values(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Infinities stay, NaN stays NaN in its place, and everything else equals the reference."""
    w = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1.0, -65504.0, 1e-7] * 3).to(dtype)
    for rounding, seed in (("nearest", None), ("stochastic", 4)):
        pass_ = {"tensor_ids": [0], "seeds": [1], "coefs": [1e-3], "rounding": rounding, "rounding_seed": seed}
        got, expected = run([w], backend, device, **pass_)[0], run([w], "reference", CPU, **pass_)[0]
        assert torch.equal(got.isnan(), w.isnan())
        assert torch.equal(got[~w.isnan()], expected[~w.isnan()])


def test_flush_to_zero_of_the_process_does_not_matter() -> None:
    """Subnormal weights and results, in a process that flushes them: the pass sets the standard mode for itself."""
    start = [torch.linspace(-1e-38, 1e-38, 5001), torch.linspace(-1e-38, 1e-38, 5001).to(torch.bfloat16)]
    pass_ = {"tensor_ids": [0, 1], "seeds": [1], "coefs": [2e-38]}
    expected = [t.view(torch.int32 if t.element_size() == 4 else torch.int16) for t in run(start, "cpu", CPU, **pass_)]
    assert bool((start[0][start[0] != 0].abs() < 1.1754944e-38).any()), "there must be subnormal numbers to flush"
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush to zero")
    try:
        got = run(start, "cpu", CPU, **pass_)
    finally:
        torch.set_flush_denormal(False)
    assert_same([t.view(e.dtype) for t, e in zip(got, expected, strict=True)], expected)


@pytest.mark.parametrize("instruction_set", native.extension.cpu_instruction_sets())
def test_instruction_sets_and_threads_give_the_same_bits(
    instruction_set: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = weights(dtype)
    for rounding, seed in (("nearest", None), ("stochastic", 4)):
        for distribution in ("normal", "rademacher"):
            pass_ = {
                "tensor_ids": list(range(len(start))),
                "seeds": [1, 2],
                "coefs": [0.1, 0.2],
                "distribution": distribution,
                "rounding": rounding,
                "rounding_seed": seed,
                "offsets": [5] * len(start),
            }
            expected = run(start, "reference", CPU, **pass_)
            monkeypatch.setenv("ZOKERN_CPU_ISA", instruction_set)
            threads = torch.get_num_threads()
            for n in (1, 3):
                torch.set_num_threads(n)
                try:
                    assert_same(run(start, "cpu", CPU, **pass_), expected)
                finally:
                    torch.set_num_threads(threads)


@pytest.mark.parametrize("chunk_bits", [7, 10, 20])
def test_chunk_size_does_not_matter(chunk_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole tensor, and the same cut into shards of awkward sizes, each with its own chunks."""
    w = weights(torch.bfloat16, (50_001,))[0]
    pass_ = {"seeds": [3], "coefs": [0.01], "rounding": "stochastic", "rounding_seed": 8}
    whole = run([w], "cpu", CPU, tensor_ids=[1], **pass_)[0]
    size = (1 << chunk_bits) + 3
    shards = [s.clone() for s in w.split(size)]
    offsets = [i * size for i in range(len(shards))]
    zokern.add_noise_(shards, tensor_ids=[1] * len(shards), offsets=offsets, **pass_)
    assert torch.equal(torch.cat(shards), whole)


def test_unaligned_views(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    base = weights(dtype, (4000,))[0].to(device)
    untouched = base.clone()
    view, expected = base[3:3001], base[3:3001].clone().cpu()
    pass_ = {"tensor_ids": [4], "seeds": [6], "coefs": [0.3], "offsets": [13]}
    zokern.add_noise_([view], backend=backend, **pass_)
    zokern.add_noise_([expected], backend="reference", **pass_)
    assert torch.equal(view.cpu(), expected)
    assert torch.equal(base[:3], untouched[:3])
    assert torch.equal(base[3001:], untouched[3001:])


def test_out_of_place(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    start = [t.to(device) for t in weights(dtype, SMALL_SIZES)]
    before = [t.clone() for t in start]
    out = [torch.full_like(t, 7) for t in start]
    pass_ = {"tensor_ids": list(range(len(start))), "seeds": [1, 2], "coefs": [0.5, -1.0], "decay": 0.5}
    zokern.add_noise_(start, out=out, backend=backend, **pass_)
    assert_same(start, before)
    assert_same([t.cpu() for t in out], run(before, "reference", CPU, **pass_))


def test_scalars_from_tensors_equal_scalars_from_lists(backend: str, device: torch.device) -> None:
    start = weights(torch.float32, SMALL_SIZES)
    ids = list(range(len(start)))
    from_lists = run(start, backend, device, tensor_ids=ids, seeds=[5, 6], coefs=[0.1, 0.2], decay=0.7)
    from_tensors = run(
        start,
        backend,
        device,
        tensor_ids=ids,
        seeds=torch.tensor([5, 6], device=device),
        coefs=torch.tensor([0.1, 0.2], device=device),
        decay=torch.tensor(0.7, device=device),
    )
    assert_same(from_lists, from_tensors)


def test_groups_and_the_enabled_flag(backend: str, device: torch.device) -> None:
    start = weights(torch.float32, (100, 200))
    for enabled in (1, 0):
        moved = [t.clone().to(device) for t in start]
        launch(
            moved,
            None,
            tensor_ids=[0, 1],
            offsets=[0, 0],
            groups=[1, 0],
            seeds=torch.tensor([3, 4]),
            coefs=torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]),
            shared=torch.tensor([[0.5], [0.25]]),
            enabled=torch.tensor([enabled], dtype=torch.int32, device=device),
            backend=backend,
        )
        expected = [t.clone() for t in start]
        if enabled:
            for i, (decay, coefs) in enumerate([(0.25, [3.0, 4.0]), (0.5, [1.0, 2.0])]):
                zokern.add_noise_(
                    [expected[i]], tensor_ids=[i], seeds=[3, 4], coefs=coefs, decay=decay, backend="reference"
                )
        assert_same([t.cpu() for t in moved], expected)


def test_mixed_dtypes_in_one_call() -> None:
    start = [t for d in (torch.float32, torch.bfloat16, torch.float16) for t in weights(d, SMALL_SIZES)]
    pass_ = {
        "tensor_ids": list(range(len(start))),
        "seeds": [1],
        "coefs": [0.1],
        "rounding": "stochastic",
        "rounding_seed": 2,
    }
    assert_same(run(start, "cpu", CPU, **pass_), run(start, "reference", CPU, **pass_))


@pytest.mark.built
def test_exhaustive_checksum_of_the_transform() -> None:
    """All 2^32 words through the compiled normal_pair: the whole transform, not a sample."""
    best = native.extension.cpu_instruction_sets()[0]
    assert native.extension.cpu_normal_checksum(0, 1 << 32, 2, best) == 0x689CC1A256A1D052


@pytest.mark.parametrize("instruction_set", native.extension.cpu_instruction_sets())
def test_checksum_of_a_part_equals_the_reference(instruction_set: str) -> None:
    from zokern.contract import reference

    first = 0x7FFF8000  # across the sign change of the angle
    words = np.arange(first, first + (1 << 16), dtype=np.uint64)
    z0, z1 = reference.normal_pair(words.astype(np.uint32))
    terms = z0.view(np.uint32).astype(np.uint64) * (2 * words + 1) + z1.view(np.uint32).astype(np.uint64) * (
        2 * words + 2
    )
    expected = int(terms.sum(dtype=np.uint64))
    assert native.extension.cpu_normal_checksum(first, first + (1 << 16), 2, instruction_set) == expected


@pytest.mark.gpu
def test_exhaustive_checksum_on_cuda() -> None:
    device = devices.device_of("cuda")
    if device.type != "cuda":
        pytest.skip("2^32 words take a GPU")
    total = torch.zeros(1, dtype=torch.int64, device=device)
    stream = torch.cuda.current_stream().cuda_stream
    native.extension.cuda_normal_checksum(0, 1 << 32, total.data_ptr(), 0, stream)
    assert int(total) & (2**64 - 1) == 0x689CC1A256A1D052


# ------------------------------------------------------------------------------------------------------- what it costs


def test_a_pass_allocates_nothing_that_grows_with_the_tensor() -> None:
    """Counted by PyTorch's profiler: the same few bytes of scalars for a tensor a thousand times larger."""
    allocated = []
    for n in (10_000, 10_000_000):
        w = torch.zeros(n)
        kw = {"tensor_ids": [0], "seeds": [1], "coefs": [1e-3]}
        zokern.add_noise_([w], **kw)  # builds the table
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            zokern.add_noise_([w], **kw)
        allocated.append(sum(max(e.self_cpu_memory_usage, 0) for e in profile.key_averages()))
    assert allocated[0] == allocated[1] < 1000


def test_peak_memory_of_a_pass() -> None:
    """The process' own counter: a pass over 64 MB does not raise the peak by even a tenth of that."""
    import resource

    w = torch.zeros(16_000_000)
    zokern.add_noise_([w[:1000]], tensor_ids=[0], seeds=[1], coefs=[1e-3])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    zokern.add_noise_([w], tensor_ids=[0], seeds=[1], coefs=[1e-3])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 6_000


def test_tables_are_built_once_and_found_again() -> None:
    tensors = weights(torch.float32, SMALL_SIZES)
    args = (tensors, tensors, list(range(5)), [0] * 5, [0] * 5)
    first, new = table.tables(*args)
    again, new_again = table.tables(*args)
    assert new
    assert not new_again
    assert again is first
    assert len(first) == 1, "one launch for all tensors of a dtype"
    moved = [t.clone() for t in tensors]
    assert table.tables(moved, moved, *args[2:])[1]


def test_global_generators_are_left_alone(backend: str, device: torch.device) -> None:
    before = torch.get_rng_state()
    numpy_before = np.random.get_state()[1].copy()
    zokern.noise(100, seed=1, backend=backend, device=device)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()


# --------------------------------------------------------------------------------------------------------- torch.library


def operator_arguments(tensors: list[torch.Tensor]) -> tuple[object, ...]:
    n = len(tensors)
    return (
        [],
        [],
        list(range(n)),
        [0] * n,
        [0] * n,
        torch.tensor([1, 2]),
        torch.tensor([[[0.1, 0.2]]]),
        torch.tensor([[1.0]]),
        None,
        None,
        "axpy",
        "normal",
        "nearest",
        False,
        False,
        "cpu",
    )


def test_opcheck() -> None:
    tensors = weights(torch.float32, (10, 20))
    torch.library.opcheck(torch.ops.zokern.pass_, (tensors, *operator_arguments(tensors)))
    out = [torch.empty_like(t) for t in tensors]
    torch.library.opcheck(torch.ops.zokern.pass_out, (tensors, out, *operator_arguments(tensors)))


def test_compiles_as_one_graph_with_the_same_bits() -> None:
    def perturbed_sum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        torch.ops.zokern.pass_([a, b], *operator_arguments([a, b]))
        return a.sum() * 2 + b.sum()

    eager, compiled = weights(torch.float32, (100, 200)), weights(torch.float32, (100, 200))
    expected = perturbed_sum(*eager)
    got = torch.compile(perturbed_sum, fullgraph=True)(*compiled)
    assert_same(compiled, eager)
    torch.testing.assert_close(got, expected)


def test_public_function_compiles_as_one_graph() -> None:
    def step(w: torch.Tensor) -> torch.Tensor:
        zokern.add_noise_([w], tensor_ids=[3], seeds=[5], coefs=[0.5], backend="cpu")
        return w * 2

    a, b = weights(torch.float32, (300,))[0], weights(torch.float32, (300,))[0]
    expected = step(a)
    assert torch.equal(torch.compile(step, fullgraph=True)(b), expected)
    assert torch.equal(a, b)


def test_autograd_sees_that_the_values_changed() -> None:
    w = torch.ones(3)
    version = w._version
    zokern.add_noise_([w], tensor_ids=[0], seeds=[1], coefs=[1.0])
    assert w._version > version
