"""Passes on a real GPU: bits across backends, no waiting, graphs, streams, tensors beyond 2^31 elements, errors.

Every test here is skipped where PyTorch sees no NVIDIA GPU. Whole steps are tested elsewhere; this is about passes.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import zokern
from benchmarks.gpu import cases as pass_cases
from tests.launching import launch
from zokern import backends
from zokern.backends import native
from zokern.contract.rules import RULES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="needs an NVIDIA GPU"),
]
GPU_BACKENDS = ("cuda", "triton")
CHECKSUM = 0x689CC1A256A1D052  # of all 2^32 words; docs/noise.md


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", 0)


def perturbed(w: Tensor, backend: str, **more: object) -> Tensor:
    """What one pass makes of a copy of w, on the host."""
    moved = w.clone()
    zokern.add_noise_([moved], tensor_ids=[3], seeds=[5], coefs=[0.5], backend=backend, **more)
    return moved.cpu()


# ---------------------------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", list(RULES))
def test_cuda_triton_and_cpu_have_the_same_bits(rule: str, dtype: torch.dtype, device: torch.device) -> None:
    """A rule's kernels, both roundings and distributions, one seed and several, at 400,000 elements."""
    names = [name for name in GPU_BACKENDS if backends.unavailable_reason(name, device) is None]
    assert names, backends.explain(device)
    for case in pass_cases.all_cases([rule], seeds=(1, 2)):
        if case.dtype != dtype or (case.distribution == "rademacher" and case.rounding == "stochastic"):
            continue  # benchmarks/gpu/equality.py has the rest
        start = pass_cases.inputs(case, 400_000, pass_cases.CPU)
        wanted = pass_cases.apply(case, pass_cases.copy(start, pass_cases.CPU), "cpu")
        for name in names:
            got = pass_cases.apply(case, pass_cases.copy(start, device), name)
            for number, (mine, want) in enumerate(zip(got, wanted, strict=True)):
                wrong = int(pass_cases.different(mine.cpu(), want).sum())
                assert wrong == 0, f"{name}: {wrong} of {want.numel()} elements of tensor {number} differ: {case}"


def test_exhaustive_checksum_on_triton(device: torch.device) -> None:
    reason = backends.unavailable_reason("triton", device)
    if reason is not None:
        pytest.skip(reason)
    from zokern.backends.triton.checksum import normal_checksum

    assert normal_checksum(0, 1 << 32, device) == CHECKSUM


def test_a_pass_is_the_same_each_time(gpu_backend: str, device: torch.device) -> None:
    w = torch.randn(3_000_001, device=device, generator=torch.Generator(device).manual_seed(0)).to(torch.bfloat16)
    first = perturbed(w, gpu_backend, rounding="stochastic", rounding_seed=1)
    for _ in range(20):
        assert torch.equal(perturbed(w, gpu_backend, rounding="stochastic", rounding_seed=1), first)


# ------------------------------------------------------------------------------------------------------------- waiting


@pytest.mark.parametrize("on_device", [False, True], ids=["host-scalars", "device-scalars"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_pass_does_not_wait(
    gpu_backend: str, on_device: bool, rounding: str, device: torch.device, no_waiting: None
) -> None:
    """Neither when a table is new nor when it is found again; one seed and several."""
    tensors = [torch.ones(n, dtype=torch.bfloat16, device=device) for n in (100_000, 33)]
    for k in (1, 3):
        where = device if on_device else torch.device("cpu")
        seeds, coefs = torch.arange(k).to(where), torch.full((k,), 0.5).to(where)
        decay = torch.tensor(0.5).to(where)
        more = {"rounding": rounding, "rounding_seed": 4 if rounding == "stochastic" else None}
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(2):
            zokern.add_noise_(
                tensors, tensor_ids=[0, 1], seeds=seeds, coefs=coefs, decay=decay, backend=gpu_backend, **more
            )
        torch.cuda.set_sync_debug_mode("default")
    assert all(bool(t.isfinite().all()) for t in tensors)


def test_the_guard_against_waiting_works(device: torch.device, no_waiting: None) -> None:
    """The test above means something only if an operation that waits does raise."""
    x = torch.ones(3, device=device)
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchroniz"):
        x.sum().item()


# -------------------------------------------------------------------------------------------------- graphs and streams


def test_a_pass_is_captured_in_a_graph_and_reads_its_numbers_at_each_replay(
    gpu_backend: str, device: torch.device
) -> None:
    """Seeds, coefficients and decay are device memory: changed between replays, they change what a replay does."""
    w = torch.linspace(-1, 1, 100_003, device=device).to(torch.bfloat16)
    start = w.clone()
    seeds, coefs = torch.tensor([7, 8], device=device), torch.tensor([0.5, -0.25], device=device)
    decay = torch.tensor(0.75, device=device)

    def step() -> None:
        zokern.add_noise_([w], tensor_ids=[3], seeds=seeds, coefs=coefs, decay=decay, backend=gpu_backend)

    def eager(seed_values: list[int], coef_values: list[float], decay_value: float) -> Tensor:
        expected = start.cpu()
        zokern.add_noise_(
            [expected], tensor_ids=[3], seeds=seed_values, coefs=coef_values, decay=decay_value, backend="cpu"
        )
        return expected

    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # compiles, and builds the table
        step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    w.copy_(start)
    torch.cuda.synchronize()
    graph.replay()
    assert torch.equal(w.cpu(), eager([7, 8], [0.5, -0.25], 0.75))
    w.copy_(start)
    seeds.copy_(torch.tensor([2**63 - 1, 1]))
    coefs.copy_(torch.tensor([1.0, 2.0]))
    decay.fill_(0.5)
    graph.replay()
    assert torch.equal(w.cpu(), eager([2**63 - 1, 1], [1.0, 2.0], 0.5))


def test_a_disabled_pass_in_a_graph_writes_nothing(gpu_backend: str, device: torch.device) -> None:
    w = torch.ones(5000, device=device)
    enabled = torch.ones(1, dtype=torch.int32, device=device)
    numbers = {
        "seeds": torch.tensor([3], device=device),
        "coefs": torch.ones(1, 1, 1, device=device),
        "shared": torch.ones(1, 1, device=device),
    }

    def step() -> None:
        launch([w], None, tensor_ids=[0], offsets=[0], groups=[0], enabled=enabled, backend=gpu_backend, **numbers)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    w.fill_(1.0)
    enabled.zero_()
    graph.replay()
    assert torch.equal(w.cpu(), torch.ones(5000))
    enabled.fill_(1)
    graph.replay()
    assert not torch.equal(w.cpu(), torch.ones(5000))


def test_a_pass_runs_on_the_current_stream(gpu_backend: str, device: torch.device) -> None:
    """On a busy side stream the pass comes after what was put there before it, and before what comes after."""
    ones = torch.ones(1_000_000, device=device)
    expected = perturbed(ones, gpu_backend)
    w, side = torch.zeros_like(ones), torch.cuda.Stream(device)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # cycles: some 50 ms in which a pass on another stream would be done
        w.fill_(1.0)
        zokern.add_noise_([w], tensor_ids=[3], seeds=[5], coefs=[0.5], backend=gpu_backend)
        after = w.clone()
        w.fill_(2.0)
    side.synchronize()
    assert torch.equal(after.cpu(), expected)
    assert torch.equal(w.cpu(), torch.full((1_000_000,), 2.0))


def test_host_numbers_of_passes_in_flight_are_not_overwritten(gpu_backend: str, device: torch.device) -> None:
    """Many passes are queued behind a busy stream; each must see the seeds and coefficients that it was given."""
    w, expected = torch.zeros(1000, device=device), torch.zeros(1000)
    torch.cuda.synchronize()
    torch.cuda._sleep(50_000_000)
    for step in range(60):
        numbers = {"tensor_ids": [0], "seeds": [step, 2 * step + 1], "coefs": [0.5 + step, -0.25 * step]}
        zokern.add_noise_([w], backend=gpu_backend, **numbers)
        zokern.add_noise_([expected], backend="cpu", **numbers)
    assert torch.equal(w.cpu(), expected)


# ---------------------------------------------------------------------------------------------------------------- size


def test_tensors_of_more_than_2_31_elements(gpu_backend: str, device: torch.device) -> None:
    """bfloat16: more than 2^32 bytes, and element indices beyond int32. Looked at: both ends and around 2^31."""
    elements = 2**31 + 2**20 + 5
    free, _ = torch.cuda.mem_get_info(device)
    if free < 2 * elements + 2**29:
        pytest.skip(f"needs {2 * elements / 2**30 + 0.5:.1f} GiB of free device memory, there are {free / 2**30:.1f}")
    w = torch.zeros(elements, dtype=torch.bfloat16, device=device)
    zokern.add_noise_([w], tensor_ids=[9], seeds=[4], coefs=[0.25], backend=gpu_backend)
    for begin, end in ((0, 70_000), (2**31 - 70_000, 2**31 + 70_000), (elements - 70_001, elements)):
        part = torch.zeros(end - begin, dtype=torch.bfloat16)
        zokern.add_noise_([part], tensor_ids=[9], seeds=[4], coefs=[0.25], offsets=[begin], backend="cpu")
        assert torch.equal(w[begin:end].cpu(), part), (begin, end)
    step = 2**28  # every element was visited: a normal is exactly zero about once in 2^32
    zeros = sum(int((w[i : i + step] == 0).sum()) for i in range(0, elements, step))
    assert zeros < 1000, f"{zeros} elements were left out"


def test_a_pass_allocates_nothing_that_grows_with_the_tensor(gpu_backend: str, device: torch.device) -> None:
    peaks = []
    for elements in (10_000, 50_000_000):
        w = torch.zeros(elements, dtype=torch.bfloat16, device=device)
        for _ in range(2):  # the first builds the table
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            zokern.add_noise_([w], tensor_ids=[0], seeds=[1, 2], coefs=[1e-3, 1e-3], backend=gpu_backend)
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
        del w
    assert peaks[0] == peaks[1] < 10_000


# -------------------------------------------------------------------------------------------------------------- errors


def test_backends_refuse_tensors_that_they_cannot_reach(gpu_backend: str, device: torch.device) -> None:
    on_host, on_gpu = torch.ones(9), torch.ones(9, device=device)
    numbers = {"seeds": [1], "coefs": [1.0]}
    with pytest.raises(RuntimeError, match=f"backend '{gpu_backend}' cannot run on cpu"):
        zokern.add_noise_([on_host], tensor_ids=[0], backend=gpu_backend, **numbers)
    for name in ("cpu", "reference"):
        with pytest.raises(RuntimeError, match="it works on CPU tensors only"):
            zokern.add_noise_([on_gpu], tensor_ids=[0], backend=name, **numbers)
    with pytest.raises(ValueError, match="make one call per device"):
        zokern.add_noise_([on_gpu, on_host], tensor_ids=[0, 1], backend=gpu_backend, **numbers)
    with pytest.raises(ValueError, match="seeds is on cuda:0, tensors on"):
        zokern.add_noise_([on_host], tensor_ids=[0], seeds=torch.tensor([1], device=device), coefs=[1.0])
    assert torch.equal(on_gpu.cpu(), torch.ones(9))
    assert torch.equal(on_host, torch.ones(9))


def test_the_module_reports_what_cuda_says(device: torch.device) -> None:
    """A device that is not there: the driver's words arrive as an exception, and the next pass is not affected."""
    reason = backends.unavailable_reason("cuda", device)
    if reason is not None:
        pytest.skip(reason)
    total = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(RuntimeError, match=r"zokern: selecting the device: .*\(cudaErrorInvalidDevice\)"):
        native.extension.cuda_normal_checksum(0, 1, total.data_ptr(), torch.cuda.device_count(), 0)
    assert torch.equal(perturbed(torch.ones(100, device=device), "cuda"), perturbed(torch.ones(100), "cpu"))


def test_the_best_backend_is_chosen_and_said(device: torch.device) -> None:
    explained = backends.explain(device)
    available = [name for name in GPU_BACKENDS if explained[name] is None]
    assert backends.choose("auto", device) is backends.module(available[0])
    assert explained["cpu"] == "it works on CPU tensors only"


def test_a_second_gpu(gpu_backend: str) -> None:
    """A pass works on its tensors' device, whichever is current, and leaves the choice alone."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    w = torch.ones(1000, device="cuda:1")
    with torch.cuda.device(0):
        assert torch.equal(perturbed(w, gpu_backend), perturbed(torch.ones(1000), "cpu"))
        assert torch.cuda.current_device() == 0
