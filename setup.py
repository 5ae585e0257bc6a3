"""Builds zokern._C with CMake and Ninja. All metadata is in pyproject.toml.

Environment: ZOKERN_CUDA=auto|on|off (auto: where nvcc is found, whether or not a GPU is), CUDA_HOME, TORCH_CUDA_ARCH_LIST
("8.0;9.0+PTX"), MAX_JOBS, CXX. Nothing is downloaded, and torch is not imported.
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
            + ". Install the CUDA toolkit, "
            "set CUDA_HOME to it, or build without the CUDA kernels with ZOKERN_CUDA=off (Triton still runs on the GPU)."
        )
    return nvcc


def architectures(nvcc: str) -> str:
    """TORCH_CUDA_ARCH_LIST in CMake's words; by default sm_80, sm_90, the newest that nvcc knows, and PTX of sm_90.

    The PTX is sm_90's, not the newest's, because the driver compiles it for every later GPU, not only for the newest.
    """
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not listed:
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
        newest = max((int(n) for n in re.findall(r"compute_(\d+)", known)), default=90)
        return ";".join(dict.fromkeys(["80-real", "90-real", "90-virtual", f"{newest}-real"]))
    out: list[str] = []
    for item in listed:
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", item)
        if match is None:
            raise SystemExit(f"zokern: TORCH_CUDA_ARCH_LIST has {item!r}; wanted numbers like 8.0, 9.0a or 9.0+PTX")
        name = match[1] + match[2] + match[3]
        out += [f"{name}-real"] + ([f"{name}-virtual"] if match[4] else [])
    return ";".join(dict.fromkeys(out))


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

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
            subprocess.run([*configure, "--fresh"], check=True)
        subprocess.run(["cmake", "--build", str(work), *(["-j", jobs] if jobs else [])], check=True)


setup(ext_modules=[Extension("zokern._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
