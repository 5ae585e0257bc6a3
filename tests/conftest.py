"""Fixtures shared by the suite. Without a GPU, Triton's kernels run in its interpreter, on CPU tensors."""

from __future__ import annotations

import os
import signal
import sys

# The tests' tensors are too small to share among threads, whose waiting slows down the other processes of the suite, those
# that tests start too. Tests of threads ask for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available() and "tests.ptx.plugin" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import devices, waste
from tests.lost_gpu import pytest_runtest_protocol  # noqa: F401
from tests.waste import (  # noqa: F401
    pytest_collection,
    pytest_collection_finish,
    pytest_runtest_teardown,
    pytest_xdist_make_scheduler,
)
from zokern import backends
from zokern.backends import native

DATA = Path(__file__).parent / "data"


def pytest_configure(config: pytest.Config) -> None:
    waste.avoid()
    _heed_signals()
    # Not in pyproject.toml: pytest imports the category from there before coverage looks on.
    config.addinivalue_line("filterwarnings", "error::zokern.ZokernWarning")
    # Toy losses move toy weights far. That no default does is tested by counts (optim/test_moves.py).
    config.addinivalue_line("filterwarnings", "ignore:a step moves the trained weights:zokern.ZokernWarning")


def _heed_signals() -> None:
    """Where a shell runs the suite in the background or by nohup, its processes ignore these signals, and those that tests
    start would too. A handler is not inherited: what is started has the default."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)  # the suite itself goes on, as nohup has it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: at the end they would keep one process busy and leave the others idle."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(params=backends.BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn; one that cannot run here is skipped with its own reason."""
    name: str = request.param
    devices.device_of(name)
    return name


@pytest.fixture(params=["cuda", "triton"])
def gpu_backend(request: pytest.FixtureRequest) -> str:
    """Each backend of a GPU in turn, for tests that are skipped without one."""
    reason = backends.unavailable_reason(request.param, torch.device("cuda", 0))
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return str(request.param)


@pytest.fixture(params=["plain", "avx2", "avx512", "neon"])
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU backend on each set of instructions in turn; one that is not here is skipped."""
    name: str = request.param
    if native.extension is None or name not in native.extension.cpu_instruction_sets():
        pytest.skip(f"{name} is not in this build, or not on this processor")
    monkeypatch.setenv("ZOKERN_CPU_ISA", name)
    return name


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """For tests that set torch's mode in which the host may not wait for the device: it may again, whatever happened."""
    torch.cuda.synchronize()
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def device(backend: str) -> torch.device:
    return devices.device_of(backend)


@pytest.fixture(params=devices.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="session")
def vectors() -> dict:
    """Known answers of the noise contract, made by an independent implementation."""
    return json.loads((DATA / "zk1.json").read_text())
