"""The compiled CPU passes run on the threads of torch's operators, and on threads of their own in a forked child."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import zokern
from zokern.backends import native

pytestmark = pytest.mark.skipif(native.extension is None, reason="needs the compiled module")
ROOT = Path(__file__).parents[2]
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at /proc and OpenMP's library")


def _threads() -> set[str]:
    return {entry.name for entry in Path("/proc/self/task").iterdir()}


@LINUX
def test_no_thread_is_started_beside_those_of_torch() -> None:
    ready, go, done = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        torch.ones(1 << 20).exp_()  # OpenMP has a team for each thread that calls it
        ready.set()
        go.wait(60)
        while not looked:
            native.extension.cpu_normal_checksum(0, 1 << 26, 2, native.extension.cpu_instruction_sets()[0])
        done.set()

    looked: list[set[str]] = []
    threads_before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        caller = threading.Thread(target=work)
        caller.start()
        assert ready.wait(60)
        before = _threads()
        assert len(before) > 2, "torch has started no team: this test looks at nothing"
        go.set()
        seen: set[str] = set()
        for _ in range(200):  # while it works: until `looked` is set it does nothing else
            seen |= _threads()
            done.wait(0.001)
        looked.append(seen)
        caller.join(60)
        assert seen <= before
    finally:
        torch.set_num_threads(threads_before)


UNSEEN = """
import ctypes
whole = ctypes.CDLL
class Local(whole):  # torch's libraries, opened so that the process does not see their names
    def __init__(self, name, *args, **options):
        super().__init__(name)
ctypes.CDLL = Local
import torch
ctypes.CDLL = whole
assert not hasattr(whole(None), "GOMP_parallel"), "OpenMP is seen: this test looks at nothing"
from tests.backends import test_threads
test_threads.test_no_thread_is_started_beside_those_of_torch()
"""


@LINUX
def test_nor_where_torch_keeps_its_openmp_to_itself() -> None:
    """As its wheels for Arm do."""
    result = subprocess.run([sys.executable, "-c", UNSEEN], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert result.returncode == 0, result.stderr


IN_A_CHILD = """
import os, signal, sys
import torch, zokern

torch.set_num_threads(2)
signal.alarm(60)
torch.zeros(1 << 20).exp_()  # torch's team is there
ours, childs = torch.zeros(1 << 20), torch.zeros(1 << 20)
zokern.add_noise_([ours], tensor_ids=[1], seeds=[3], coefs=[1.0])
child = os.fork()
if child == 0:
    signal.alarm(20)  # to wait for threads of a team that only the parent has is to wait for ever
    zokern.add_noise_([childs], tensor_ids=[1], seeds=[3], coefs=[1.0])
    same = ours.numpy().tobytes() == childs.numpy().tobytes()  # an operator of torch would wait
    os._exit(0 if torch.get_num_threads() == 2 and same else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@LINUX
def test_a_forked_child_does_not_wait_for_threads_that_it_lacks() -> None:
    result = subprocess.run([sys.executable, "-c", IN_A_CHILD], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@LINUX
def test_a_small_pass_stays_on_the_thread_that_asks_for_it() -> None:
    counts = []

    def work() -> None:  # OpenMP has no team for this thread yet
        counts.append(len(_threads()))
        for sizes in ([500] * 60, [1 << 20]):
            tensors = [torch.zeros(size) for size in sizes]
            zokern.add_noise_(tensors, tensor_ids=range(len(sizes)), seeds=[3], coefs=[1.0], backend="cpu")
            counts.append(len(_threads()))

    threads_before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        caller = threading.Thread(target=work)
        caller.start()
        caller.join(60)
    finally:
        torch.set_num_threads(threads_before)
    before, small, large = counts
    assert (small, large) == (before, before + 1)
