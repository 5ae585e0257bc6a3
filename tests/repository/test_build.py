"""The build's choices and errors (setup.py), driven with stand-ins for nvcc; and what a device says to a build that is
not for it. The wheel itself: test_wheel.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zokern import backends
from zokern.backends import cuda, native

ROOT = Path(__file__).parents[2]
CUDA_12_4 = (50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90)
CUDA_13_0 = (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)


def stand_in(folder: Path, release: str = "13.0", known: tuple[int, ...] = CUDA_13_0, code: int = 0) -> dict[str, str]:
    """The environment of a build with an nvcc that answers the two questions that it is asked."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    names = "\n".join(f"compute_{n}" for n in known)
    said = f"echo 'Cuda compilation tools, release {release}, V{release}.1'"
    nvcc.write_text(f"#!/bin/sh\ncase $1 in\n--version) {said};;\n*) echo '{names}';;\nesac\nexit {code}\n")
    nvcc.chmod(0o755)
    return {"CUDA_HOME": str(folder)}


def setup_py(expression: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Evaluates an expression among the functions of setup.py, which then builds nothing."""
    code = "import runpy, setuptools; setuptools.setup = lambda **kw: None; m = runpy.run_path('setup.py'); "
    code += f"print({expression})"
    unset = {name: value for name, value in os.environ.items() if name not in ("TORCH_CUDA_ARCH_LIST", "ZOKERN_CUDA")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=unset | env, timeout=300
    )


def architectures(**env: str) -> subprocess.CompletedProcess[str]:
    return setup_py("m['architectures'](m['find_nvcc']()[0])", **env)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("known", "built"),
    [
        (CUDA_13_0, "80-real;90-real;100-real;120-real;90-virtual;100-virtual"),
        (CUDA_12_4, "80-real;90-real;90-virtual"),
        ((90, 100, 120, 130), "90-real;100-real;120-real;90-virtual;100-virtual"),
    ],
)
def test_default_architectures(known: tuple[int, ...], built: str, tmp_path: Path) -> None:
    assert architectures(**stand_in(tmp_path, known=known)).stdout.strip() == built


def test_listed_architectures_win(tmp_path: Path) -> None:
    env = stand_in(tmp_path)
    done = architectures(TORCH_CUDA_ARCH_LIST="8.6;9.0a+PTX 12.0f 8.6", **env)
    assert done.stdout.strip() == "86-real;90a-real;90a-virtual;120f-real"
    assert architectures(TORCH_CUDA_ARCH_LIST=" ; ", **env).stdout.strip().endswith("100-virtual")


def test_a_machine_without_a_compiler_is_told_so(tmp_path: Path) -> None:
    said = refusal(setup_py("m['check_tools']()", PATH=str(tmp_path), CXX=""))
    assert "there is no C++ compiler" in said
    assert "Looked at: c++, g++, clang++ on PATH" in said
    assert "apt install g++" in said
    said = refusal(setup_py("m['check_tools']()", CXX="ccache-of-nowhere g++"))
    assert "Looked at: CXX=ccache-of-nowhere." in said
    tool(tmp_path / "c++")
    assert "cmake is not on PATH" in refusal(setup_py("m['check_tools']()", PATH=str(tmp_path), CXX=""))
    tool(tmp_path / "cmake")
    assert setup_py("m['check_tools']()", PATH=str(tmp_path), CXX="").stdout.strip() == "None"


def tool(path: Path) -> None:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


def test_a_checkout_that_hides_an_install_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After pip install . in a checkout, python -m zokern in there finds the sources."""
    monkeypatch.setattr(native, "__file__", str(tmp_path / "zokern" / "backends" / "native.py"))
    assert native.hidden() is None  # an install
    (tmp_path / "CMakeLists.txt").touch()
    assert f"found the sources in {tmp_path} first" in str(native.hidden())
    assert "pip install -e . builds it there" in str(native.hidden())
    (tmp_path / "zokern").mkdir()
    (tmp_path / "zokern" / "_C.cpython-310-x86_64-linux-gnu.so").touch()  # of another Python
    assert native.hidden() is None


def test_what_fails_in_a_build_is_not_followed_by_a_trace() -> None:
    said = refusal(setup_py(f"m['run']([{sys.executable!r}, '-c', 'raise SystemExit(3)'])"))
    assert said.strip() == f"zokern: {sys.executable} -c ended with exit code 3; why, stands above."


@pytest.mark.parametrize("item", ["Hopper", "7.5", "13.0", "9.0b", "8.0a", "9.0f", "90", "9.0+ptx"])
def test_architectures_that_cannot_be_built_are_named(item: str, tmp_path: Path) -> None:
    said = refusal(architectures(TORCH_CUDA_ARCH_LIST=f"8.0 {item}", **stand_in(tmp_path)))
    assert f"TORCH_CUDA_ARCH_LIST has '{item}'" in said
    assert "from 8.0 on" in said
    assert f"{tmp_path}/bin/nvcc (CUDA 13.0) knows 8.0, 8.6, 8.7, 8.8, 8.9, 9.0, 10.0, 10.3, 11.0, 12.0, 12.1." in said
    assert "unset it" in said


@pytest.mark.parametrize("switch", ["auto", "on"])
@pytest.mark.parametrize(("release", "old"), [("11.8", True), ("9.2", True), ("12.0", False), ("13.4", False)])
def test_an_old_nvcc_is_refused_with_both_versions(release: str, old: bool, switch: str, tmp_path: Path) -> None:
    done = setup_py("m['wanted_nvcc']()", ZOKERN_CUDA=switch, **stand_in(tmp_path, release))
    if not old:
        assert done.stdout.strip() == f"{tmp_path}/bin/nvcc"
        return
    said = refusal(done)
    assert f"{tmp_path}/bin/nvcc is of CUDA {release}, and the kernels need 12.0 or newer" in said
    assert "CUDA_HOME" in said
    assert "ZOKERN_CUDA=off" in said


def test_an_old_nvcc_is_not_asked_where_cuda_is_off(tmp_path: Path) -> None:
    assert setup_py("m['wanted_nvcc']()", ZOKERN_CUDA="off", **stand_in(tmp_path, "9.2")).stdout.strip() == "None"


def test_an_nvcc_that_does_not_run_is_told(tmp_path: Path) -> None:
    env = stand_in(tmp_path, code=3)
    for expression in ("m['wanted_nvcc']()", "m['architectures'](m['find_nvcc']()[0])"):
        said = refusal(setup_py(expression, **env))
        assert f"{tmp_path}/bin/nvcc --" in said
        assert "fails, saying" in said
        assert "ZOKERN_CUDA=off" in said
    (tmp_path / "bin" / "nvcc").write_text("not a program")  # which the system refuses to start
    assert "fails, saying" in refusal(setup_py("m['wanted_nvcc']()", **env))
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\necho hello\n")
    assert "names no release: 'hello'" in refusal(setup_py("m['wanted_nvcc']()", **env))


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"ZOKERN_CUDA": "on", "CUDA_HOME": "/nonexistent"}, "there is no nvcc. Looked at: /nonexistent/bin/nvcc"),
        ({"ZOKERN_CUDA": "maybe"}, "'maybe' is not one of auto, on, off"),
    ],
)
def test_build_errors_say_what_to_do(env: dict[str, str], message: str, tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **env}, timeout=300)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


def test_compiled_module_links_no_libtorch() -> None:
    needed = subprocess.run(["readelf", "-d", native.extension.__file__], capture_output=True, text=True, check=True)
    libraries = re.findall(r"NEEDED.*\[(.*?)\]", needed.stdout)
    assert libraries
    assert not [name for name in libraries if "torch" in name or "c10" in name or "cudart" in name]


# ------------------------------------------------------------------------------------------------------- at run time


@pytest.mark.parametrize(
    ("built", "runs", "does_not"),
    [
        ("80-real", [(8, 0), (8, 9)], [(9, 0)]),
        ("86-real 90-real", [(8, 6), (8, 9), (9, 0)], [(8, 0), (10, 0)]),
        ("90-virtual", [(9, 0), (10, 3), (12, 0)], [(8, 9)]),
        ("90", [(9, 0), (12, 1)], [(8, 9)]),
        ("90a-real 90a-virtual", [(9, 0)], [(10, 0), (8, 0)]),
        ("100a-real", [(10, 0)], [(10, 3)]),
        ("103f-real", [(10, 3)], [(10, 0), (11, 0), (12, 0)]),
        ("100f-virtual", [(10, 0), (10, 3)], [(11, 0)]),
        ("80-real 90-real 100-real 120-real 100-virtual", [(8, 7), (9, 0), (10, 3), (11, 0), (12, 1), (13, 0)], []),
        ("80-real 90-real 90-virtual", [(11, 0), (12, 0)], []),
        ("native", [(9, 0)], []),  # CMake's word, which names no number
        ("unknown", [(9, 0)], []),
    ],
)
def test_what_a_build_runs_on(built: str, runs: list[tuple[int, int]], does_not: list[tuple[int, int]]) -> None:
    for capability in runs:
        assert cuda.has_code_for(built, capability), capability
    for capability in does_not:
        assert not cuda.has_code_for(built, capability), capability


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A build for some architectures, and a device."""

    def pretend(built: str, capability: tuple[int, int]) -> None:
        module = SimpleNamespace(cuda_run=None, cuda_architectures=built)
        monkeypatch.setattr(native, "extension", module)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Thor")

    return pretend


def test_a_device_that_nobody_built_for_is_told_before_a_launch(pretend: Any) -> None:
    device = torch.device("cuda", 0)
    pretend("80-real 90-real", (11, 0))
    reason = backends.unavailable_reason("cuda", device)
    assert reason == (
        "zokern._C was built for 80-real 90-real, and NVIDIA Thor has compute capability 11.0; "
        "rebuild with TORCH_CUDA_ARCH_LIST=11.0, or use the Triton backend"
    )
    with pytest.raises(RuntimeError, match=r"backend 'cuda' cannot run on cuda:0: .* built for 80-real 90-real"):
        backends.choose("cuda", device)
    pretend("80-real 90-virtual", (11, 0))
    assert backends.unavailable_reason("cuda", device) is None
    pretend("75-real", (7, 5))
    assert "needs compute capability 8.0" in str(backends.unavailable_reason("cuda", device))
