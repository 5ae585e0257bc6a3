"""The release, tried: built from its sdist on each Python at hand, with the oldest libraries it allows and the newest.

    make matrix                                              # all; some ten minutes a cell, the first time with downloads
    python -m tests.matrix --python 3.13 --libraries oldest  # a cell
    python -m tests.matrix --tests tests/contract            # fewer tests

From the sdist a wheel is made for each Python, without the CUDA kernels, and installed into a new environment for each set
of libraries. "oldest": of each library that pyproject.toml names the oldest version that it allows, that fits the others,
and that exists built for this Python; "newest": the newest. There run the report, some of Triton's kernels, compiled for a
GPU and emulated, and the CPU's tests, all of Triton's kernels in its interpreter among them, on a copy of the tests, so
that nothing of the checkout is imported. Each cell is stored as it ends, and `python -m benchmarks.pages docs/install.md`
tells of all. Needs the packages uv and build.
"""

from __future__ import annotations

import argparse
import email
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import zokern
from tests.outside import (
    ROOT,
    Cell,
    Failed,
    begun,
    copied,
    run,
    say,
    source_distribution,
    tested,
    told,
    variables,
    versions,
)
from zokern.bench.record import RESULTS, commit, store

PYTHONS = tuple(f"3.{minor}" for minor in range(10, 15))  # from the oldest that pyproject.toml allows
RESOLUTION = {"oldest": "lowest-direct", "newest": "highest"}  # uv's words
SHOWN = ("torch", "triton", "transformers", "peft", "accelerate", "trl", "lightning", "datasets", "numpy")
TESTS = ("contract", "passes", "optim", "placement", "journal", "checking", "integrations", "finetune", "tasks")
# Triton's kernels, compiled for a GPU, with fewer cases than `make ptx`: its interpreter takes what its compiler does not
EMULATED = ("-m", "tests.ptx", "--backend", "triton", "--arch", "90", "--quick", "--no-registers")


def interpreters() -> dict[str, Path]:
    """{"3.13": its executable}: of each version the newest that is on PATH or that pyenv has."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    path = os.pathsep.join([*map(str, sorted(pyenv.glob("*/bin"))), os.environ["PATH"]])
    listed = subprocess.run(
        ["uv", "python", "list", "--only-installed", "--output-format", "json"],
        env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict[str, tuple[tuple[int, ...], Path]] = {}
    for one in json.loads(listed.stdout):
        parts = one["version_parts"]
        version = parts["major"], parts["minor"], parts["patch"]
        name = f"{version[0]}.{version[1]}"
        known = one["implementation"] == "cpython" and one["variant"] == "default" and name in PYTHONS
        if known and (name not in found or version > found[name][0]):
            found[name] = version, Path(one["path"])
    return {name: found[name][1] for name in sorted(found, key=lambda name: found[name][0])}


def tried(python: Path, wheel: Path, libraries: str, tests: Sequence[str], work: Path, log: Path) -> Cell:
    """A cell of the matrix, in a new environment.

    Raises:
        Failed: where nothing can be installed, the report fails, or pytest has no tests.
    """
    venv, outside = work / "venv", copied(work / "outside")
    inside = variables(venv)
    run(["uv", "venv", "--seed", "--python", python, venv], log)
    # The wheel's own requirements would be nobody's direct ones, of which alone uv takes the oldest; so they come first.
    chosen = ["--resolution", RESOLUTION[libraries], "--only-binary", ":all:", "--extra", "test"]
    run(["uv", "pip", "install", *chosen, "-r", ROOT / "pyproject.toml"], log, env=inside)
    run(["uv", "pip", "install", "--no-deps", wheel], log, env=inside)
    run(["uv", "pip", "check"], log, env=inside)
    own = venv / "bin" / "python"
    found = versions(own, SHOWN, log, inside)
    run([own, "-m", "zokern"], log, cwd=work, env=inside)
    run([own, "-m", "zokern", "finetune", "--help"], log, cwd=work, env=inside)
    run([own, *EMULATED], log, cwd=outside, env=inside)
    return {"versions": found, **tested(own, tests, outside, log, inside)}


def looked_at(version: str, wheel: Path, log: Path) -> Cell:
    """What can be said of a Python that is not at hand: that it knows our syntax and types, and that the wheel admits it.

    Raises:
        Failed: where one of these is not so.
    """
    from packaging.specifiers import SpecifierSet

    target = f"py{version.replace('.', '')}"
    run(
        [sys.executable, "-m", "ruff", "check", "--select", "E9,F", "--target-version", target, "zokern"], log, cwd=ROOT
    )
    run([sys.executable, "-m", "mypy", "--python-version", version], log, cwd=ROOT)
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        needs = email.message_from_bytes(file.read(name))["Requires-Python"]
    if version not in SpecifierSet(needs):
        raise Failed(f"the wheel's Requires-Python, {needs}, does not admit {version}")
    return {"not at hand": "its syntax, types and the wheel's metadata were checked"}


def parse(at_hand: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", choices=at_hand, default=at_hand, metavar="X.Y", help="of those at hand: "
                        f"{', '.join(at_hand)} (default: all)")  # fmt: skip
    parser.add_argument(
        "--libraries", nargs="+", choices=list(RESOLUTION), default=list(RESOLUTION), help="(default: both)"
    )
    parser.add_argument("--tests", nargs="+", default=[f"tests/{name}" for name in TESTS], help="files or folders "
                        f"(default: of tests/ {', '.join(TESTS)})")  # fmt: skip
    parser.add_argument("--output", type=Path, default=RESULTS / "matrix.json", help="results (default: %(default)s)")
    return parser.parse_args()


def main() -> int:
    if missing := [name for name in ("uv", "pyproject-build") if shutil.which(name) is None]:
        raise SystemExit(f"{' and '.join(missing)} not on PATH: pip install uv build")
    at_hand = interpreters()
    options = parse(list(at_hand))
    kept = Kept(options, list(at_hand))
    log = begun("matrix")
    with tempfile.TemporaryDirectory(prefix="zokern-matrix-") as name:
        folder = Path(name)
        sdist = source_distribution(folder, log)
        for version in options.python:
            say(f"Python {version}: a wheel from the sdist")
            out = folder / version
            without = {**os.environ, "ZOKERN_CUDA": "off"}
            run(["uv", "build", "--wheel", "--python", at_hand[version], "--out-dir", out, sdist], log, env=without)
            (wheel,) = out.glob("zokern-*.whl")
            for libraries in options.libraries:
                say(f"Python {version}, the {libraries} libraries")
                with tempfile.TemporaryDirectory(dir=folder) as work:
                    one = functools.partial(tried, at_hand[version], wheel, libraries, options.tests, Path(work), log)
                    kept.add(f"{version} {libraries}", one)
        for version in PYTHONS:
            if version not in at_hand:
                say(f"Python {version}, which is not at hand")
                kept.add(version, functools.partial(looked_at, version, wheel, log))
    return int(kept.failed)


class Kept:
    """The cells so far, which are stored as each ends. failed: whether one of this call's was not all well."""

    def __init__(self, options: argparse.Namespace, at_hand: Sequence[str]) -> None:
        self.path, self.failed = options.output, False
        self.settings = {"tests": options.tests}
        former = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self.cells: Cell = former["results"] if former.get("settings") == self.settings else {}
        self.all = [f"{version} {libraries}" for version in at_hand for libraries in RESOLUTION]

    def add(self, name: str, make: Callable[[], Cell]) -> None:
        try:
            cell = make()
        except Failed as error:
            cell = {"broke": str(error)}
        self.failed |= bool(cell.get("broke") or cell.get("failed"))
        cells = {**self.cells, name: {**cell, "zokern": zokern.__version__, "commit": commit()}}
        order = sorted(cells, key=lambda name: (PYTHONS.index(name.split()[0]), "newest" in name))
        self.cells = {name: cells[name] for name in order}
        store("matrix", torch.device("cpu"), self.settings, self.cells, self.path, complete={*self.all} <= {*cells})
        say(told(cell))


if __name__ == "__main__":
    sys.exit(main())
