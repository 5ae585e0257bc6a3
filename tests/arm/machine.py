"""An Arm machine of Debian's packages in a folder: its files, QEMU to run them, Python, and an environment with torch.

Nothing is installed on this machine, and nothing of it is changed. Programs of Arm run by QEMU's user mode emulation, each
in a process of its own; what they start that is not of Arm, a compiler or CMake, runs as it is.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from benchmarks.arm.run import EMULATOR
from tests.outside import ROOT, run, say, variables

SUITE = "trixie"
PACKAGES = ("base-files", "python3", "python3-dev", "libgomp1", "libstdc++6", "ca-certificates")
COMPILER = "aarch64-linux-gnu-g++"
NEEDED = {  # program: Debian's package
    "mmdebstrap": "mmdebstrap", COMPILER: "g++-aarch64-linux-gnu",
    "uv": "", "pyproject-build": "", "cmake": "", "ninja": "",
}  # fmt: skip
# The newest of PyPI's wheels for Arm that are for CPUs alone; later ones bring CUDA's libraries.
TORCH = "torch==2.10.0"
# Without pointer authentication, which Debian's Python uses where it is there, and which takes QEMU most of the time.
PLAINEST = "neoverse-n1"
BUILD = ("setuptools>=77", "pybind11>=2.12")


def missing() -> str | None:
    """What this machine lacks, and where it comes from."""
    lacking = [name for name in NEEDED if shutil.which(name) is None]
    if not lacking:
        return None
    debian = [NEEDED[name] for name in lacking if NEEDED[name]]
    ours = [name for name in lacking if not NEEDED[name]]
    remedies = [f"apt install {' '.join(debian)}"] * bool(debian)
    remedies += ["pip install uv build cmake ninja, or `make arm`, which does"] * bool(ours)
    return f"{', '.join(lacking)} not on PATH: {'; '.join(remedies)}"


class Machine:
    """In folder, made where it is not there yet: some 3 GB, of which 0.6 are downloaded."""

    def __init__(self, folder: Path, log: Path, torch: str = TORCH) -> None:
        self.folder, self.log, self.torch = folder.resolve(), log, torch
        self.root, self.host, self.venv = self.folder / "root", self.folder / "host", self.folder / "venv"
        self.compiler = self.root / "usr" / "bin" / "compiler"
        self.headers = f"-idirafter {self.root}/usr/include"  # Python's header includes another by the processor's name
        self.emulator, self.python = self.host / "usr" / "bin" / "qemu-aarch64", self.venv / "bin" / "python"

    def make(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        _once(self.root, "the files of an Arm machine", self._root)
        _once(self.host, "QEMU", self._host)
        _once(self.venv, f"an environment with {self.torch}", self._venv)

    def variables(self, processor: str) -> dict[str, str]:
        """The environment of a process on that processor, by QEMU's name."""
        env = {**variables(self.venv), "QEMU_CPU": processor, "CXX": str(self.compiler)}
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # compiled each time, the libraries' sources would take most of it
        return env

    def version(self) -> str:
        """QEMU's."""
        said = run([self.emulator, "--version"], self.log)
        return said.split()[2]

    def wheel(self, sdist: Path, out: Path) -> Path:
        """A wheel for Arm, compiled by this machine's compiler.

        Python asks for it, emulated, as `pip install` does on an Arm machine; CMake and the compiler are this machine's.
        """
        described = self.folder / "arm.cmake"
        described.write_text(
            "set(CMAKE_SYSTEM_NAME Linux)\n"
            "set(CMAKE_SYSTEM_PROCESSOR aarch64)\n"
            f"set(CMAKE_CXX_COMPILER {COMPILER})\n"  # by whose name CMake finds the linker and others
            f'set(CMAKE_CXX_FLAGS_INIT "{self.headers}")\n'
        )
        env = {**self.variables(PLAINEST), "CMAKE_TOOLCHAIN_FILE": str(described), "ZOKERN_CUDA": "off"}
        command = ["uv", "build", "--wheel", "--no-build-isolation", "--python", self.python, "--out-dir", out, sdist]
        run(command, self.log, cwd=self.folder, env=env)
        (wheel,) = out.glob("zokern-*.whl")
        return wheel

    def install(self, wheel: Path) -> None:
        command = ["uv", "pip", "install", "--no-deps", "--reinstall", wheel]
        run(command, self.log, env=self.variables(PLAINEST))

    def _root(self) -> None:
        _debian("arm64", PACKAGES, self.root, self.log)
        # Called by any name, Python finds its libraries, or those of an environment, from there, and starts others by it.
        (python,) = self.root.glob("usr/bin/python3.[0-9]*[0-9]")
        run_by = f'"${{{EMULATOR}:-{self.emulator}}}" -L {self.root} -0 "$0"'
        _script(self.root / "usr" / "bin" / "emulated", f'exec {run_by} {python} "$@"')
        # For torch.compile, which asks for the instructions of the processor at hand.
        others = 'for word; do shift; [ "$word" = -march=native ] || set -- "$@" "$word"; done'
        _script(self.compiler, others, f'exec {COMPILER} {self.headers} "$@"')

    def _host(self) -> None:
        here = subprocess.run(["dpkg", "--print-architecture"], capture_output=True, text=True, check=True).stdout
        _debian(here.strip(), ("qemu-user",), self.host, self.log)

    def _venv(self) -> None:
        env = self.variables(PLAINEST)
        run(["uv", "venv", "--python", self.root / "usr" / "bin" / "emulated", self.venv], self.log, env=env)
        install = ["uv", "pip", "install", "--only-binary", ":all:"]
        run([*install, self.torch, *BUILD, "--extra", "test", "-r", ROOT / "pyproject.toml"], self.log, env=env)


def _debian(architecture: str, packages: tuple[str, ...], folder: Path, log: Path) -> None:
    options = ["--variant=extract", f"--architectures={architecture}", f"--include={','.join(packages)}"]
    run(["mmdebstrap", *options, SUITE, folder], log)


def _script(path: Path, *lines: str) -> None:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


def _once(folder: Path, what: str, make: Callable[[], None]) -> None:
    """A folder that an earlier call has begun and not ended is made anew."""
    done = folder.with_name(f"{folder.name}.made")
    if not done.exists():
        say(what)
        shutil.rmtree(folder, ignore_errors=True)
        make()
        done.touch()
