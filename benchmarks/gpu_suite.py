"""Everything that needs an NVIDIA GPU, in one command: build, bits, tests, sanitizer, checksum, kernels, steps.

bash benchmarks/gpu_suite.sh OUTDIR     # or python benchmarks/gpu_suite.py OUTDIR

Ends inside its deadline of 9 minutes; truth comes first, speed last, and what does not fit is skipped and said to be.
Needs a GPU, the CUDA toolkit, PyTorch with CUDA and Triton, and no network. A section that lacks something says what.
OUTDIR gets summary.json, logs/, each benchmark's JSON and plots, and suite.tar.gz with all of it. Exit code: 0 if every
section that ran passed, 1 if not, 2 for wrong arguments, 3 if none ran, 130 if it was interrupted.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import xml.etree.ElementTree
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from suite_runner import Command, Runner, Section, choose

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS, TESTS = ROOT / "benchmarks", ROOT / "tests"
CUDA_HOMES = ("CUDA_HOME", "CUDA_PATH")
DEADLINE = 540.0
SANITIZERS = ("memcheck", "racecheck", "initcheck")
BUILD_NEEDS = ("torch", "pip", "setuptools", "pybind11")
NO_GPU = "no NVIDIA GPU (nvidia-smi finds none)"


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


def untestable() -> dict[str, str]:
    """Test files that import what is not installed, and what that is; pytest would fail to collect them."""
    out = {}
    for path in sorted(TESTS.glob("test_*.py")):
        imported = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                imported.add(node.module)
        tops = sorted({name.partition(".")[0] for name in imported})
        local = {p.stem for p in (*TESTS.glob("*.py"), *BENCHMARKS.glob("*.py"))} | {"zokern"}
        if missing := [top for top in tops if top not in local and importlib.util.find_spec(top) is None]:
            out[path.name] = ", ".join(missing)
    return out


# ------------------------------------------------------------------------------------------------------------ sections


def script(name: str, *arguments: object) -> list[str]:
    return [sys.executable, str(BENCHMARKS / name), *map(str, arguments)]


def build(seconds: float) -> list[Command]:
    """An editable install, or where the system forbids pip to install (PEP 668) the extension alone, in place."""
    if sys.prefix == sys.base_prefix and Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists():
        return [[sys.executable, "setup.py", "build_ext", "--inplace"]]
    quiet = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "-v"]
    return [[sys.executable, "-m", "pip", "install", *quiet, "-e", str(ROOT)]]


def pytest_runs(out: Path) -> list[Command]:
    ignored = [
        f"--ignore={TESTS / name}" for name in (*untestable(), "test_machine_code.py", "test_machine_code_table.py")
    ]
    workers = ["-n", "6"] if importlib.util.find_spec("xdist") else []  # Triton compiles for most of the time
    base = [sys.executable, "-m", "pytest", str(TESTS), *ignored, "-rfEs", "--tb=short", "-p", "no:cacheprovider"]
    return [
        [*base, "-m", "gpu", f"--junitxml={out / 'tests-gpu.xml'}"],
        [
            *base,
            *workers,
            "-m",
            "not gpu and not slow_machine_code",
            "-k",
            "cuda or triton",
            f"--junitxml={out / 'tests-backends.xml'}",
        ],
    ]


def tests_note(out: Path) -> str:
    notes = []
    for path in (out / "tests-gpu.xml", out / "tests-backends.xml"):
        if path.exists():
            suite: Any = xml.etree.ElementTree.parse(path).getroot().find("testsuite")
            total, bad, skipped = (int(suite.get(key)) for key in ("tests", "failures", "skipped"))
            bad += int(suite.get("errors"))
            notes.append(f"{path.stem}: {total - bad - skipped} passed, {bad} failed, {skipped} skipped")
    notes += [f"{name} not run for the lack of {missing}" for name, missing in untestable().items()]
    return "; ".join(notes)


def equality(out: Path, name: str, elements: int, jobs: int, seconds: float) -> list[str]:
    limits = ["--elements", elements, "--jobs", jobs, "--time-limit", int(seconds - 10)]
    return script("equality.py", "--device", "cuda", *limits, "--output", out / f"{name}.json")


def sanitizer(seconds: float) -> list[Command]:
    """Without PyTorch's caching allocator each tensor is an allocation of its own, whose ends the tools know."""
    options = ["--error-exitcode", "86", "--target-processes", "all", "--print-limit", "20"]
    watched = tool("compute-sanitizer") or "compute-sanitizer"
    limit = max(int(seconds / len(SANITIZERS) - 8), 5)  # the rest is for starting Python under the tool
    program = script("sanitizer_program.py", "--device", "cuda", "--time-limit", limit)
    return [[watched, "--tool", name, *options, *program] for name in SANITIZERS]


def bench(out: Path, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "zokern", "bench", *map(str, arguments), "--device", "cuda", "--output", str(out)]


def step(out: Path, model: str) -> Section:
    return Section(
        f"step-{model.removeprefix('opt-')}",
        f"whole steps of {model}",
        lambda s: [bench(out, "step", "--model", model, "--time-limit", int(max(s - 25, 10)))],
        110, 45, lambda: lacks(("torch", "typer", "rich", "transformers")),
    )  # fmt: skip


def all_sections(out: Path) -> list[Section]:
    cap = (gpu() or {}).get("compute_cap", "")
    plain = ("torch", "numpy")
    plotting = [] if importlib.util.find_spec("matplotlib") else ["--no-plot"]
    jobs = max(min((os.cpu_count() or 2) // 2, 8), 1)
    return [
        Section("build", "the extension, for this GPU's architecture", build, 170, 60,
                lambda: lacks(BUILD_NEEDS, ("nvcc", "cmake", "ninja", "c++")),
                env={"TORCH_CUDA_ARCH_LIST": cap, "ZOKERN_CUDA": "on"}),
        Section("equality", "bits of CUDA and Triton against the CPU's, every rule",
                lambda s: [equality(out, "equality", 1_000_000, jobs, s)],
                75, 20, lambda: lacks(plain)),
        Section("tests", "the tests of the GPU, and those of every backend", lambda s: pytest_runs(out), 150, 20,
                lambda: lacks((*plain, "pytest")), lambda: tests_note(out)),
        Section("sanitizer", ", ".join(SANITIZERS), sanitizer, 90, 20, lambda: lacks(plain, ("compute-sanitizer",)),
                env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
        Section("checksum", "all 2^32 words, on CUDA and on Triton",
                lambda s: [script("checksum.py", "--device", "cuda", "--output", out / "checksum.json")],
                40, 10, lambda: lacks(plain)),
        Section("equality-large", "bits again, 50 million elements",
                lambda s: [equality(out, "equality-large", 50_000_000, (jobs + 1) // 2, s)],
                60, 20, lambda: lacks(plain)),
        Section("kernels", "every kernel's time",
                lambda s: [bench(out, "kernels", "--time-limit", int(max(s - 25, 10)), *plotting)], 120, 40,
                lambda: lacks(("torch", "typer", "rich")),
                lambda: "no pictures, for the lack of matplotlib" if plotting else ""),
        step(out, "opt-1.3b"),
        step(out, "opt-13b"),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------ command line


def facts() -> dict[str, Any]:
    """Machine, versions and commit; the benchmarks' own files say more."""
    packages = (
        "torch",
        "triton",
        "numpy",
        "transformers",
        "typer",
        "rich",
        "pytest",
        "hypothesis",
        "pybind11",
        "cmake",
    )
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    nvcc = tool("nvcc")
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout if nvcc else ""
    found = re.search(r"release ([\d.]+)", release)
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    head = (
        subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() if shutil.which("git") else ""
    )
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": head or "unknown",
        "gpu": gpu(),
        "python": sys.version.split()[0],
        "versions": versions,
        "nvcc": found[1] if found else "not found",
        "processors": os.cpu_count(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", metavar="OUTDIR", help="a new or empty folder for the results")
    parser.add_argument("--only", default="", metavar="A,B", help="run these sections alone")
    parser.add_argument("--skip", default="", metavar="A,B", help="leave these sections out")
    parser.add_argument("--deadline", type=float, default=DEADLINE, metavar="SECONDS", help="of all (default: 540)")
    parser.add_argument("--list", action="store_true", help="list the sections, and why one cannot run here")
    options = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # a GPU's kernels are to be compiled
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ["PATH"]]
    )  # cmake, ninja from pip
    os.environ["PYTHONUNBUFFERED"] = "1"  # a log that is cut off has all that was printed
    if options.list:
        for section in all_sections(Path("OUTDIR")):
            print(f"{section.name:<15} {section.about}; {section.reason() or 'can run here'}")
        return 0
    if options.out is None:
        parser.error("OUTDIR is missing: name a folder for the results")
    if options.deadline <= 0:
        parser.error(f"--deadline is {options.deadline}; it must be a positive number of seconds")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        parser.error(f"OUTDIR {options.out} is not an empty folder; name a new one")
    out = options.out.resolve()
    lists = [[name for name in given.split(",") if name] for given in (options.only, options.skip)]
    try:
        sections = choose(all_sections(out), *lists)
    except ValueError as error:
        parser.error(str(error))
    os.chdir(ROOT)
    return Runner(out, options.deadline, facts()).run(sections)


if __name__ == "__main__":
    sys.exit(main())
