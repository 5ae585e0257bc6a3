"""The sections of the GPU suite, their commands, and what each needs of the machine. suite.py runs them.

The standard library alone, because the suite also runs where little else is installed: a section that lacks something
says what, and the others run.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import xml.etree.ElementTree
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu.runner import Command, Section

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
CUDA_HOMES = ("CUDA_HOME", "CUDA_PATH")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
BUILD_NEEDS = ("torch", "pybind11")
SETUPTOOLS = 77  # the oldest that reads pyproject.toml
BENCH_NEEDS = ("torch", "typer", "rich")
NO_GPU = "no NVIDIA GPU (nvidia-smi finds none)"
PLAIN = ("torch", "numpy")
# Test files of the kernels' code, not of what a GPU does with it.
WITHOUT_A_GPU = ("benchmarks/test_machine_code*.py", "ptx/test_*.py", "benchmarks/test_interpreted.py")
SANITIZER_ENDING = 5  # seconds of each tool's share for the case at work and for the end of the process
TEST_LIMIT = 60  # seconds of one test, its kernels' compilation included
ENDING = 25  # seconds of a benchmark's section kept for starting Python, for the case at work when the time is up


# ------------------------------------------------------------------------------------------------------- what is there


@functools.cache
def gpu() -> dict[str, str] | None:
    """Name, compute capability and driver of the first GPU, or None where there is none."""
    smi = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path="/usr/local/nvidia/bin")
    if smi is None:
        return None
    command = [smi, "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = [row.split(", ") for row in done.stdout.splitlines() if row.count(", ") == 2]
    return dict(zip(("name", "compute_cap", "driver"), rows[0], strict=True)) if not done.returncode and rows else None


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit, or of PATH."""
    homes = [os.environ[home] for home in CUDA_HOMES if os.environ.get(home)] + ["/usr/local/cuda"]
    folders = [f"{home}/{part}" for home in homes for part in ("bin", "compute-sanitizer")]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def lacks(modules: Iterable[str] = (), tools: Iterable[str] = ()) -> str | None:
    """What keeps a section from running here, or None."""
    if gpu() is None:
        return NO_GPU
    missing = [f"the Python package {name}" for name in modules if importlib.util.find_spec(name) is None]
    missing += [f"the program {name}" for name in tools if tool(name) is None]
    return f"this machine lacks {', '.join(missing)}" if missing else None


def untestable() -> dict[Path, str]:
    """Test files that import what is not installed, and what that is; pytest would fail to collect them."""
    out = {}
    local = {p.stem for p in TESTS.rglob("*.py")} | {"benchmarks", "tests", "zokern"}
    for path in sorted(TESTS.rglob("test_*.py")):
        imported = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                imported.add(node.module.partition(".")[0])
        if missing := [top for top in sorted(imported - local) if importlib.util.find_spec(top) is None]:
            out[path] = ", ".join(missing)
    return out


# ------------------------------------------------------------------------------------------------------------ sections


def processors() -> int:
    return os.cpu_count() or 2


def program(*arguments: object) -> list[str]:
    """`python -m` what is given."""
    return [sys.executable, "-m", *map(str, arguments)]


def not_installable() -> str | None:
    """Why pip cannot install the project into this Python; tests and benchmarks also run from the checkout."""
    if importlib.util.find_spec("pip") is None:
        return "pip is missing"
    try:
        setuptools = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        return "setuptools is missing"
    if int(setuptools.partition(".")[0]) < SETUPTOOLS:
        return f"setuptools {setuptools} is older than {SETUPTOOLS}, which pyproject.toml needs"
    if sys.prefix == sys.base_prefix and Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists():
        return "the system forbids pip to install into its Python (PEP 668)"
    return None


def build(capability: str) -> list[Command]:
    """An editable install, or the extension alone, by CMake and in place."""
    if not_installable() is None:
        quiet = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "-v"]
        return [program("pip", "install", *quiet, "-e", ROOT)]
    import pybind11  # of BUILD_NEEDS; the other way does without

    work = str(ROOT / "build" / "suite")
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": ROOT / "zokern",
        "CMAKE_CUDA_ARCHITECTURES": f"{capability.replace('.', '')}-real",
        "CMAKE_CUDA_COMPILER": tool("nvcc"),
        "Python_EXECUTABLE": sys.executable,
        "PYTHON_EXECUTABLE": sys.executable,  # for an older pybind11
        "ZOKERN_CUDA": "ON",
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    defined = [f"-D{name}={value}" for name, value in options.items()]
    return [["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", work, *defined], ["cmake", "--build", work]]


def build_note() -> str:
    reason = not_installable()
    return f"by CMake, not installed: {reason}" if reason else ""


def pytest_run(out: Path, name: str, jobs: int, *chosen: str) -> Command:
    """`jobs` processes where pytest-xdist is there: Triton compiles for most of the time. Of a test that hangs the log has
    the stack, and it is ended where pytest-timeout is there."""
    left_out = {*untestable(), *(path for pattern in WITHOUT_A_GPU for path in TESTS.rglob(pattern))}
    workers = ["-n", str(jobs)] if importlib.util.find_spec("xdist") else []
    limit = [f"--timeout={TEST_LIMIT}", "--timeout-method=thread"] if importlib.util.find_spec("pytest_timeout") else []
    options = [f"--ignore={path}" for path in sorted(left_out)]
    options += ["-rfEs", "--tb=short", "-p", "no:cacheprovider"]
    options += ["-o", f"faulthandler_timeout={TEST_LIMIT - 10}"]  # what pytest-timeout prints is lost in a worker
    xml_file = f"--junitxml={out / f'{name}.xml'}"
    return program("pytest", TESTS, *options, *workers, *limit, *chosen, xml_file)


def tests_note(path: Path) -> str:
    notes = []
    if path.exists():
        suite: Any = xml.etree.ElementTree.parse(path).getroot().find("testsuite")
        total, failed, errors, skipped = (int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped"))
        bad = failed + errors
        notes.append(f"{total - bad - skipped} passed, {bad} failed, {skipped} skipped")
    if importlib.util.find_spec("xdist") is None:
        notes.append("in one process, for the lack of pytest-xdist")
    notes += [f"{path.name} not run for the lack of {missing}" for path, missing in untestable().items()]
    return "; ".join(notes)


def tests(out: Path, jobs: int) -> list[Section]:
    """Two sections, so that neither takes the other's time. Of torch's threads a process has its share: each with one for
    every processor, they wait for each other for most of the time."""
    share = {"OMP_NUM_THREADS": str(max(processors() // jobs, 1))}

    def section(name: str, about: str, budget: float, *chosen: str) -> Section:
        return Section(name, about, lambda s: [pytest_run(out, name, jobs, *chosen)], budget, 30,
                       lambda: lacks((*PLAIN, "pytest")), lambda: tests_note(out / f"{name}.xml"), env=share)  # fmt: skip

    # 85 s and 125 s on an H200 with 16 processors
    every = ("-m", "not gpu and not built and not slow_machine_code and not wheel", "-k", "cuda or triton")
    return [section("tests-gpu", "the tests that need a GPU", 130, "-m", "gpu"),
            section("tests", "the tests of every backend", 150, *every)]  # fmt: skip


def equality(out: Path, name: str, elements: int, jobs: int, seconds: float) -> list[str]:
    limits = ["--elements", elements, "--jobs", jobs, "--time-limit", int(seconds - 10)]
    return program("benchmarks.gpu.equality", "--device", "cuda", *limits, "--output", out / f"{name}.json")


def sanitizer(seconds: float) -> list[Command]:
    """Each tool in turn, the most telling first: where the time is too short, the last is cut off.

    The program's own limit counts from its start: Python and torch under a tool may take 20 seconds, which nobody knows
    before. Without PyTorch's caching allocator each tensor is an allocation of its own, whose ends the tools know.
    """
    # Calls that fail are no faults of kernels: libraries probe the driver for what it has, and ours raise an error.
    options = ["--error-exitcode", "86", "--target-processes", "all"]
    options += ["--print-limit", "20", "--report-api-errors", "no"]
    watched = tool("compute-sanitizer") or "compute-sanitizer"
    limit = max(int(seconds / len(SANITIZERS) - SANITIZER_ENDING), 5)
    passes = program("benchmarks.gpu.sanitizer", "--device", "cuda", "--time-limit", limit)
    return [[watched, "--tool", name, *options, *passes] for name in SANITIZERS]


def bench(*arguments: object) -> list[str]:
    return program("zokern", "bench", *arguments, "--device", "cuda")


def limit(seconds: float) -> list[object]:
    return ["--time-limit", int(max(seconds - ENDING, 10))]


def step(out: Path, model: str, tokens: str, methods: str) -> Section:
    """Few rounds: a step is long, and its rounds differ little on a GPU that does nothing else."""
    name = f"step-{model.removeprefix('opt-')}"
    placements = ["--placements", "stream,stream-pipelined,stream-prefetch,inplace"]
    chosen = ["--model", model, "--tokens", tokens, "--methods", methods, *placements, "--rounds", 3]
    return Section(
        name, f"whole steps of {model}, eager and in one CUDA graph",
        lambda s: [bench("step", *chosen, *limit(s), "--output", out / f"step-cuda-{model}.json")],
        100, 40, lambda: lacks((*BENCH_NEEDS, "transformers")),
    )  # fmt: skip


def kernels(out: Path, name: str, about: str, budget: float, minimum: float, *chosen: str) -> Section:
    """Smaller than the default, so that all have their turn."""
    plotting = [] if importlib.util.find_spec("matplotlib") else ["--no-plot"]
    size = ["--elements", 1 << 28, "--rounds", 10, *plotting]
    note = "no pictures, for the lack of matplotlib" if plotting else ""
    return Section(name, about, lambda s: [bench("kernels", *chosen, *size, *limit(s), "--output", out)], budget, minimum,
                   lambda: lacks(BENCH_NEEDS), lambda: note)  # fmt: skip


def all_sections(out: Path) -> list[Section]:
    """Truth first, then speed. Of either, what may be cut short comes last."""
    cap = (gpu() or {}).get("compute_cap", "")
    jobs = max(min(processors() // 2, 8), 1)
    return [
        Section("build", "the extension, for this GPU's architecture", lambda s: build(cap), 170, 60,
                lambda: lacks(BUILD_NEEDS, ("nvcc", "cmake", "ninja", "c++")), build_note,
                env={"TORCH_CUDA_ARCH_LIST": cap, "ZOKERN_CUDA": "on"}),
        Section("equality", "bits of CUDA and Triton against the CPU's, every rule",
                lambda s: [equality(out, "equality", 1_000_000, jobs, s)],
                75, 20, lambda: lacks(PLAIN)),
        *tests(out, min(processors(), 16)),
        Section("checksum", "all 2^32 words, on CUDA and on Triton",
                lambda s: [program("benchmarks.gpu.checksum", "--device", "cuda", "--output", out / "checksum.json")],
                25, 10, lambda: lacks(PLAIN)),
        Section("sanitizer", ", ".join(SANITIZERS), sanitizer, 160, 100, lambda: lacks(PLAIN, ("compute-sanitizer",)),
                env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
        kernels(out, "kernels", "every kernel's time", 110, 40, "--no-compiled"),
        step(out, "opt-1.3b", "16x256,16x32", "mezo,hizoo,helene,fzoo"),
        step(out, "opt-13b", "16x256", "mezo,hizoo"),
        # Into a folder of its own, because compiling takes most of the time and the rest should not wait for it.
        kernels(out / "compiled", "compiled", "MeZO's and HiZOO's kernels beside torch.compile", 100, 30,
                "axpy", "hizoo", "--compiled", "--dtype", "bfloat16"),
        Section("equality-large", "bits again, 50 million elements",
                lambda s: [equality(out, "equality-large", 50_000_000, (jobs + 1) // 2, s)],
                60, 20, lambda: lacks(PLAIN)),
    ]  # fmt: skip


# Two calls of at most nine minutes each have time for all; one has it for little more than the first.
PARTS = {
    "truth": ("build", "equality", "tests-gpu", "tests", "checksum", "sanitizer"),
    "speed": ("build", "kernels", "step-1.3b", "step-13b", "compiled", "equality-large"),
}
