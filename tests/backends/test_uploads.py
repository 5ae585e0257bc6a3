"""What a pass is told goes to the device in one transfer, or in none where it is there: counted without a GPU.

The device is PyTorch's "meta", the launches are stand-ins that note what they are given.
"""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from dataclasses import fields, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods import METHODS
from tests.optim.test_no_waiting import DEVICE, PLACEMENTS, Transfers, loss_of, on_device
from tests.pairs import pairs
from zokern import backends, sweep
from zokern.backends import native, triton
from zokern.contract.rules import RULES
from zokern.passes import operands, table
from zokern.passes.spec import AXPY, Chain, PassNumbers
from zokern.sweep import Passes

if triton.unavailable_reason() is not None:
    pytest.skip(f"Triton backend: {triton.unavailable_reason()}", allow_module_level=True)

from zokern.backends.triton import launch

NAMES = [field.name for field in fields(PassNumbers) if field.name != "elsewhere"]
STREAM = SimpleNamespace(cuda_stream=7)


# Arguments of the extension's Pass, after its table and its flags.
PASS = (
    "seeds", "num_seeds", "seeds_on_host", "coefs", "scalars", "rounding_seed", "rounding_on_host", "enabled", "factors",
)  # fmt: skip


class Given:
    """The arguments of every launch, and of what it was made from."""

    def __init__(self) -> None:
        self.passes: list[dict[str, Any]] = []
        self.chains: list[dict[str, Any]] = []
        self.kernels: list[tuple[Any, ...]] = []

    def Pass(self, table: Any, flags: Any, *given: Any) -> None:
        self.passes.append(dict(zip(PASS, given, strict=True)))

    def Chain(self, **given: Any) -> None:
        self.chains.append(given)

    def cuda_run(self, made: None, **how: Any) -> None:
        assert how["stream"] == 7

    cuda_run_chain = cuda_run

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *given, **constants: self.kernels.append(given)

    def all_on_device(self) -> bool:
        """Whether launches were given no memory of the host; addresses of the device are counted from 0."""
        names = ("tensors", "chunks", "coefs", "scalars", "enabled")
        addresses = [0] + [one.get(name, 0) for one in (*self.passes, *self.chains) for name in names]
        for one in self.passes:  # what the host has is read there if it travels in the launch
            addresses += [0 if one["seeds_on_host"] and one["num_seeds"] == 1 else one["seeds"]]
            addresses += [0 if one["rounding_on_host"] else one["rounding_seed"]]
        addresses += [address for one in self.chains for row in one["stages"] for address in row[:4]]
        tensors = [t for one in self.kernels for t in one if isinstance(t, Tensor)]
        return max(addresses) < 4096 and all(t.device == DEVICE for t in tensors)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Given:
    made = Given()
    monkeypatch.setattr(Tensor, "pin_memory", lambda t: t)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: STREAM)
    monkeypatch.setattr(native, "extension", made)
    monkeypatch.setattr(launch, "pass_kernel", made)
    monkeypatch.setattr(launch, "chain_kernel", made)
    monkeypatch.setattr(table.Table, "read_on", lambda self, stream: None)
    return made


@pytest.fixture(params=["cuda", "triton"])
def gpu(request: pytest.FixtureRequest, given: Given) -> ModuleType:
    return backends.module(request.param)


def a_table(dtype: torch.dtype = torch.bfloat16) -> table.Table:
    w = torch.zeros(100, dtype=dtype, device=DEVICE)
    return table.build([w], [w], [0], [0], [0])


def numbers(where: torch.device | str, seeds: int, rounding: bool, enabled: bool, start: int = 0) -> PassNumbers:
    return PassNumbers(
        torch.arange(start + 1, start + 1 + seeds).to(where),
        torch.arange(seeds, dtype=torch.float32).reshape(1, 1, seeds).to(where),
        torch.tensor([[0.5]]).to(where),
        torch.tensor([8, 9]).to(where) if rounding else None,
        torch.ones(1, dtype=torch.int32).to(where) if enabled else None,
    )


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("seeds", [0, 1, 3])
def test_a_pass_sends_its_numbers_at_once(
    gpu: ModuleType, given: Given, seeds: int, rounding: bool, enabled: bool
) -> None:
    rows, kind = a_table(), replace(AXPY, rounding="stochastic" if rounding else "nearest")
    for where, uploads in (("cpu", 1), (DEVICE, 0)):
        told = numbers(where, seeds, rounding, enabled)
        with Transfers() as transfers:
            gpu.run(rows, kind, told)
        assert len(transfers.seen) == uploads
        assert transfers.waited == []
        with Transfers() as transfers:  # a second table of the same numbers: they are there
            gpu.run(rows, kind, gpu.near(told, DEVICE))
        assert len(transfers.seen) == uploads
        there = gpu.near(told, DEVICE)
        with Transfers() as transfers:
            gpu.run(rows, kind, there)
        assert transfers.seen == []
    assert len(given.passes) + len(given.kernels) == 6
    assert given.all_on_device()


def test_what_a_launch_of_cuda_takes_along_stays(given: Given) -> None:
    """One seed and the rounding seeds, where the host knows them; on the device they are read by address."""
    cuda, rows = backends.module("cuda"), a_table()
    cuda.run(rows, replace(AXPY, rounding="stochastic"), numbers("cpu", 1, True, False))
    made = given.passes[-1]
    assert (made["num_seeds"], made["seeds_on_host"], made["rounding_on_host"]) == (1, True, True)
    there = cuda.near(numbers("cpu", 3, True, True), DEVICE)
    assert {name: getattr(there, name).device.type for name in NAMES} == {
        "seeds": "meta", "coefs": "meta", "shared": "meta", "rounding_seed": "cpu", "enabled": "meta"
    }  # fmt: skip
    every = backends.module("triton").near(numbers("cpu", 1, True, True), DEVICE)
    assert {getattr(every, name).device for name in NAMES} == {DEVICE}


@pytest.mark.parametrize("where", ["cpu", DEVICE], ids=str)
def test_a_chain_sends_its_numbers_at_once(gpu: ModuleType, given: Given, where: torch.device | str) -> None:
    """Triton's table of addresses with them."""
    rule, enabled = RULES["axpy"], torch.ones(1, dtype=torch.int32).to(where)
    stages = [(replace(AXPY, rule=rule), numbers(where, k, True, False, start=10 * k)) for k in (1, 3)]
    rows = a_table()
    with Transfers() as transfers:
        gpu.run_chain(rows, Chain(stages, rule, True, enabled))
    assert len(transfers.seen) == (0 if where == DEVICE and gpu.__name__.endswith("cuda") else 1)
    assert transfers.waited == []
    assert len(given.chains) + len(given.kernels) == 1
    assert given.all_on_device()


def at(address: int, like: Tensor) -> Tensor:
    """What lies at an address, in the shape and dtype of `like`."""
    memory = (ctypes.c_uint8 * like.nbytes).from_address(address)
    return torch.frombuffer(bytearray(memory), dtype=like.dtype).reshape(like.shape)


@pytest.fixture
def buffers(given: Given, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The device's memory, which is the host's here, so that it can be looked at."""
    made: list[Tensor] = []
    original = torch.empty

    def empty(*size: Any, **options: Any) -> Tensor:
        if options.get("dtype") != torch.uint8:
            return original(*size, **options)
        made.append(original(*size, dtype=torch.uint8).zero_())
        return made[-1]

    monkeypatch.setattr(torch, "empty", empty)
    return made


def test_numbers_arrive_as_they_were(buffers: list[Tensor]) -> None:
    """Also those that are not contiguous on the host, or that somebody trains."""
    told = PassNumbers(
        torch.tensor([1, 2**63 - 1, 3]),
        torch.arange(12, dtype=torch.float32).reshape(3, 2, 2).transpose(0, 1)[:, :, 1:],
        torch.tensor([[0.5]], requires_grad=True).expand(3, 1),
        torch.tensor([8, 9]),
        torch.tensor([1], dtype=torch.int32),
    )
    there = backends.module("triton").near(told, DEVICE)
    assert len(buffers) == 1
    begin, end = buffers[0].data_ptr(), buffers[0].data_ptr() + buffers[0].nbytes
    for name in NAMES:
        got, wanted = getattr(there, name), getattr(told, name)
        assert got.is_contiguous()
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted), name
        assert begin <= got.data_ptr() < end
        assert got.data_ptr() % 16 == 0, "Triton would compile another kernel"


def test_addresses_of_a_chain_are_those_of_its_numbers(given: Given, buffers: list[Tensor], monkeypatch) -> None:
    rule = RULES["axpy"]
    stages = [(replace(AXPY, rule=rule), numbers("cpu", k, k == 3, False, start=10 * k)) for k in (1, 3)]
    rows = a_table()
    buffers.clear()
    backends.module("triton").run_chain(rows, Chain(stages, rule, False, torch.ones(1, dtype=torch.int32)))
    assert len(buffers) == 1
    addresses, enabled = given.kernels[0][2], given.kernels[0][3]
    assert torch.equal(enabled, torch.ones(1, dtype=torch.int32))
    for row, (_, told) in zip(addresses.tolist(), stages, strict=True):
        for address, wanted in zip(row, (told.seeds, told.coefs, told.shared, told.rounding_seed), strict=False):
            assert (address == 0) if wanted is None else torch.equal(at(address, wanted), wanted)
    backends.module("cuda").run_chain(rows, Chain(stages, rule))
    for row, (_, told) in zip(given.chains[0]["stages"], stages, strict=True):
        assert torch.equal(at(row[1], told.coefs), told.coefs)


def test_tables_of_two_dtypes_share_one_transfer(gpu: ModuleType, monkeypatch) -> None:
    """ops sends the numbers before it launches on the tables, one for each dtype."""
    name = gpu.__name__.rsplit(".", 1)[1]
    monkeypatch.setattr(backends, "unavailable_reason", lambda name, device: None)
    tensors = [torch.zeros(100, dtype=dtype, device=DEVICE) for dtype in (torch.bfloat16, torch.float32)]
    made = [a_table(torch.bfloat16), a_table(torch.float32)]
    monkeypatch.setattr(operands, "tables", lambda *args: (made, False))
    told = numbers("cpu", 3, True, True)
    both = operands.Operands(tensors, None, [], [0, 1], [0, 0], [0, 0])
    with Transfers() as transfers:
        sweep.launch(both, replace(AXPY, rounding="stochastic"), told, name)
    assert len(transfers.seen) == 1


class Counted:
    """The transfers of each pass of steps; of launches, which cannot run here, what they have to send."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, transfers: Transfers, backend: ModuleType) -> None:
        self.passes: list[int] = []
        real = Passes.run

        monkeypatch.setattr(backends, "choose", lambda name, device: backend)

        def run(*args: Any, **options: Any) -> None:
            before = len(transfers.seen)
            real(*args, **options)
            self.passes.append(len(transfers.seen) - before)

        monkeypatch.setattr(Passes, "run", run)


@pytest.mark.parametrize(
    ("name", "backend", "placement"), pairs(list(METHODS), ["cuda", "triton"], ["inplace", "shadow", "stream"])
)
def test_a_pass_of_a_step_makes_at_most_one_transfer(name: str, backend: str, placement: str, monkeypatch) -> None:
    """And stream's pieces of a sweep one together."""
    model, opt = on_device(METHODS[name], placement, monkeypatch)
    with Transfers() as transfers:
        counted = Counted(monkeypatch, transfers, backends.module(backend))
        for _ in range(3):
            opt.step(lambda: loss_of(model))
    assert max(counted.passes) <= 1
    assert sum(counted.passes) <= opt.counters["passes"]
    if placement == "stream":
        assert len(counted.passes) > 2 * opt.counters["passes"]


@PLACEMENTS
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_pass_whose_losses_are_the_hosts_makes_at_most_one_transfer(
    backend: str, placement: str, monkeypatch
) -> None:
    """A reward, say, that no device has computed: coefficients and the flag of a skipped step come from the host."""
    model, opt = on_device(METHODS["es"], placement, monkeypatch)
    with Transfers() as transfers:
        counted = Counted(monkeypatch, transfers, backends.module(backend))

        def reward() -> float:
            model(torch.zeros(2, 5, dtype=torch.int64, device=DEVICE))
            return float(len(counted.passes))

        for _ in range(3):
            opt.step(reward)
    assert max(counted.passes) == 1


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_launch_is_noted_with_its_stream(backend: str, given: Given, monkeypatch) -> None:
    """The table's memory is kept for it: test_prepared.py."""
    rows, rule, module = a_table(), RULES["axpy"], backends.module(backend)
    noted: list[object] = []
    monkeypatch.setattr(table.Table, "read_on", lambda self, stream: noted.append((self, stream)))
    if backend == "triton":  # which asks for a stream on GPUs alone, and makes such a device the current one
        monkeypatch.setattr(launch, "on_gpu", lambda device: True)
        monkeypatch.setattr(launch, "_launch_context", lambda device: nullcontext())
    module.run(rows, AXPY, numbers("cpu", 1, False, False))
    module.run_chain(rows, Chain([(replace(AXPY, rule=rule), numbers("cpu", 1, False, False))], rule))
    assert noted == [(rows, STREAM)] * 2
