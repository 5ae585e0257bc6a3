"""A GPU that a test has lost ends its process, with the test's name; torch is a stand-in in fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import lost_gpu

TORCH = """
class cuda:
    is_initialized = staticmethod(lambda: True)
    synchronize = staticmethod(lambda: None)
"""
TESTS = """
import pytest, torch

def lost():
    raise RuntimeError("CUDA error: an illegal memory access\\nCUDA kernel errors might be reported at some other call")

@pytest.mark.parametrize("i", range(6))
def test_it(i):
    if i == 2:  # passes, and the GPU finds out later
        torch.cuda.synchronize = lost
"""
LINE = "CUDA is lost after test_it.py::test_it[2]: CUDA error: an illegal memory access"


def run(folder: Path, *options: str) -> tuple[int, str, dict[str, int]]:
    """Exit code, output, and the XML's counts of a run of TESTS. Without torch and plugins, each process starts at once."""
    (folder / "torch.py").write_text(TORCH)
    (folder / "test_it.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "lost_gpu", "-v", "--junitxml=x.xml", *options]
    path = os.pathsep.join(map(str, (folder, Path(__file__).parents[1])))
    env = {**os.environ, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)
    suite: Any = xml.etree.ElementTree.parse(folder / "x.xml").getroot().find("testsuite")
    return done.returncode, done.stdout + done.stderr, {k: int(suite.get(k)) for k in ("tests", "failures", "errors")}


def test_one_process_ends_with_the_name_of_the_test(tmp_path: Path) -> None:
    code, said, counts = run(tmp_path)
    assert code == lost_gpu.EXIT_CODE
    assert LINE in said
    assert "some other call" not in said
    assert said.count("PASSED") == 3  # none after it
    assert counts["errors"] == 1


def test_of_several_workers_one_ends_and_the_other_tests_run(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    code, said, counts = run(tmp_path, "-p", "xdist", "-n", "2")
    assert code == 1
    assert LINE in said
    for i in range(6):
        assert f"PASSED test_it.py::test_it[{i}]" in said
    assert counts["errors"] >= 1
    assert "crashed while running" in said


def test_a_process_that_used_no_gpu_is_not_made_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: pytest.fail("it started CUDA"))
    assert lost_gpu.error() is None


def test_the_suite_has_the_hook(request: pytest.FixtureRequest) -> None:
    hook = request.config.pluginmanager.hook.pytest_runtest_protocol
    assert lost_gpu.pytest_runtest_protocol in [each.function for each in hook.get_hookimpls()]
