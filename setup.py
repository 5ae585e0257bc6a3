"""Builds zokern._C with CMake and Ninja. All metadata is in pyproject.toml.

docs/install.md has the environment variables that it reads. Nothing is downloaded, and torch is not imported.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# docs/install.md says why these.
OLDEST_NVCC = (12, 0)
OLDEST_GPU = 80
CODE_FOR = (80, 90, 100, 120)  # machine code, as far as nvcc knows them
PTX_OF = (90, 100)  # PTX, likewise: for later GPUs the last, and both for tests/ptx
SUFFIXES = {"a": 90, "f": 100}  # the first architectures that have a variant of their own, or one of their family
WITHOUT = "build without the CUDA kernels with ZOKERN_CUDA=off (Triton still runs on the GPU)"


def find_nvcc() -> tuple[str | None, list[str]]:
    """The compiler's path, or None, and the places that were looked at."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [str(Path(home) / "bin" / "nvcc") for home in homes]
    if not homes:
        candidates += [shutil.which("nvcc") or "nvcc on PATH", "/usr/local/cuda/bin/nvcc"]
    for path in candidates:
        if os.access(path, os.X_OK):
            return path, candidates
    return None, candidates


def wanted_nvcc() -> str | None:
    switch = os.environ.get("ZOKERN_CUDA", "auto").lower()
    if switch not in ("auto", "on", "off"):
        raise SystemExit(f"zokern: ZOKERN_CUDA={switch!r} is not one of auto, on, off")
    if switch == "off":
        return None
    nvcc, looked = find_nvcc()
    if nvcc is None and switch == "on":
        raise SystemExit(
            "zokern: ZOKERN_CUDA=on, but there is no nvcc. Looked at: "
            + ", ".join(looked)
            + f". Install the CUDA toolkit, set CUDA_HOME to it, or {WITHOUT}."
        )
    if nvcc is not None and version(nvcc) < OLDEST_NVCC:
        raise SystemExit(
            f"zokern: {nvcc} is of CUDA {numbers(version(nvcc))}, and the kernels need {numbers(OLDEST_NVCC)} or newer. "
            f"Install a newer CUDA toolkit and set CUDA_HOME to it, or {WITHOUT}."
        )
    return nvcc


def dotted(architecture: int) -> str:
    """As TORCH_CUDA_ARCH_LIST has it: 9.0 for 90."""
    return f"{architecture // 10}.{architecture % 10}"


def numbers(of: tuple[int, int]) -> str:
    return f"{of[0]}.{of[1]}"


def ask(nvcc: str, option: str) -> str:
    """What nvcc prints when it is called with one option."""
    try:
        done = subprocess.run([nvcc, option], capture_output=True, text=True, check=False)
        said, failed = done.stdout + done.stderr, done.returncode != 0
    except OSError as error:
        said, failed = str(error), True
    if failed:
        raise SystemExit(
            f"zokern: {nvcc} {option} fails, saying {said.strip()!r}. Repair the CUDA toolkit, or {WITHOUT}."
        )
    return said


def version(nvcc: str) -> tuple[int, int]:
    said = ask(nvcc, "--version")
    found = re.search(r"release (\d+)\.(\d+)", said)
    if found is None:
        raise SystemExit(f"zokern: {nvcc} --version names no release: {said.strip()!r}. {WITHOUT.capitalize()}.")
    return int(found[1]), int(found[2])


def architectures(nvcc: str) -> str:
    """TORCH_CUDA_ARCH_LIST, or what docs/install.md says is built by default, in CMake's words."""
    known = {int(n) for n in re.findall(r"compute_(\d+)", ask(nvcc, "--list-gpu-arch"))}
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not listed:
        code, ptx = [n for n in CODE_FOR if n in known], [n for n in PTX_OF if n in known]
        return ";".join([*(f"{n}-real" for n in code), *(f"{n}-virtual" for n in ptx)])
    out: list[str] = []
    for item in listed:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        number, suffix = (int(match[1] + match[2]), match[3]) if match else (0, "")
        if match is None or number < OLDEST_GPU or number not in known or number < SUFFIXES.get(suffix, 0):
            can = ", ".join(dotted(n) for n in sorted(known) if n >= OLDEST_GPU)
            raise SystemExit(
                f"zokern: TORCH_CUDA_ARCH_LIST has {item!r}; wanted numbers like 8.0, 9.0a or 9.0+PTX, from "
                f"{dotted(OLDEST_GPU)} on, that nvcc knows. {nvcc} (CUDA {numbers(version(nvcc))}) knows {can}. "
                "Change TORCH_CUDA_ARCH_LIST, or unset it."
            )
        out += [f"{number}{suffix}-real"] + ([f"{number}{suffix}-virtual"] if match[4] else [])
    return ";".join(dict.fromkeys(out))


def check_tools() -> None:
    """A C++ compiler, where CMake looks for one, and CMake itself; raises SystemExit with the remedy."""
    named = os.environ.get("CXX", "").split()[:1]
    compilers = named or ["c++", "g++", "clang++"]
    if not any(shutil.which(one) for one in compilers):
        looked = f"CXX={named[0]}" if named else f"{', '.join(compilers)} on PATH"
        raise SystemExit(
            f"zokern: there is no C++ compiler, and the kernels are built from source. Looked at: {looked}. Install one "
            "(Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++), or set CXX to it."
        )
    if shutil.which("cmake") is None:
        raise SystemExit(
            "zokern: cmake is not on PATH. pip fetches it by itself; with --no-build-isolation, install what "
            "pyproject.toml names first: pip install cmake ninja pybind11."
        )


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        check_tools()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Kept between builds, so that a second one compiles only what changed.
        work = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        work.mkdir(parents=True, exist_ok=True)
        options = [
            f"-DCMAKE_BUILD_TYPE={os.environ.get('CMAKE_BUILD_TYPE', 'Release')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPYTHON_EXECUTABLE={sys.executable}",
        ]
        nvcc = wanted_nvcc()
        options.append(f"-DZOKERN_CUDA={'ON' if nvcc else 'OFF'}")
        if nvcc:
            options += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={architectures(nvcc)}"]
        print(f"zokern: CUDA kernels {'with ' + nvcc if nvcc else 'off'}", flush=True)
        jobs = os.environ.get("MAX_JOBS")
        # An isolated build has its own cmake and ninja, whose paths change from build to build.
        if ninja := shutil.which("ninja"):
            options.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(work), *options]
        if subprocess.run(configure).returncode:
            print("zokern: CMake cannot go on from the last build; beginning anew", flush=True)
            run([*configure, "--fresh"])
        run(["cmake", "--build", str(work), *(["-j", jobs] if jobs else [])])


def run(command: list[str]) -> None:
    """Ends with a sentence where it fails: what failed stands above it, and a trace of ours would hide that."""
    if code := subprocess.run(command).returncode:
        raise SystemExit(f"zokern: {' '.join(command[:2])} ended with exit code {code}; why, stands above.")


setup(ext_modules=[Extension("zokern._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
