"""Fixtures shared by the suite. Without a GPU, Triton's kernels run in its interpreter, on CPU tensors."""

from __future__ import annotations

import functools
import gc
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import devices
from tests.lost_gpu import pytest_runtest_protocol  # noqa: F401
from zokern import backends
from zokern.backends import native
from zokern.contract import reference

DATA = Path(__file__).parent / "data"


def _kept(pure: Callable[..., Any]) -> Callable[..., Any]:
    """The specification's random numbers depend on their arguments alone, and most of those that the suite asks for it has
    asked for before: 32 MB of them at most are kept, of short tensors."""
    known = functools.lru_cache(maxsize=1 << 12)(pure)

    @functools.wraps(pure)
    def again(*args: int) -> Any:
        return known(*args).copy() if args[0] <= 2048 else pure(*args)

    return again


reference._normals = _kept(reference._normals)


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # until the tests are collected: modules come, and nothing goes
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


def pytest_collection_finish() -> None:
    gc.enable()
    _look_at_newer_only()


_modules = 0  # how many there were when garbage was last looked for among all objects


def _look_at_newer_only() -> None:
    """The suite's modules and thousands of tests stay to the end: garbage is looked for among newer objects only."""
    global _modules
    gc.collect()
    gc.freeze()
    _modules = len(sys.modules)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """What a test imported stays too, and what a file's fixtures left is taken for good: else a Trainer, which collects
    garbage at each train(), looks through it for half a second."""
    if len(sys.modules) != _modules or nextitem is None or nextitem.path != item.path:
        _look_at_newer_only()


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


@pytest.fixture(params=["plain", "avx2", "avx512"])
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
