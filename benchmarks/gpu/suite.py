"""Everything that needs an NVIDIA GPU: build, bits, tests, checksum, sanitizer; kernels, steps.

bash benchmarks/gpu_suite.sh OUTDIR --part truth
bash benchmarks/gpu_suite.sh OUTDIR2 --part speed

Each ends inside its deadline of 9 minutes, and what does not fit is skipped and said to be. Without --part it is one call,
which has time for the truth and for little of the speed. --list names the sections of each part.
Needs a GPU, the CUDA toolkit, PyTorch with CUDA and Triton, and no network. A section that lacks something says what.
OUTDIR gets summary.json, logs/, each benchmark's JSON and plots, and suite.tar.gz with all of it, both anew after every
section. --copy-to FOLDER keeps copies of these two there, for a machine that gives back a few files of one folder. Where
the files came without .git, ZOKERN_COMMIT says of which commit they are. Exit code: 0 if every section that ran passed,
1 if not, 2 for wrong arguments, 3 if none ran, 130 if it was interrupted.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.gpu.runner import Runner, choose, say
from benchmarks.gpu.sections import PARTS, ROOT, all_sections, gpu, tool

DEADLINE = 540.0
PACKAGES = ("torch", "triton", "numpy", "transformers", "typer", "rich", "pytest", "hypothesis", "pybind11", "cmake")
COMMIT = ROOT / "zokern" / "bench" / "commit.py"  # run as a file: importing zokern needs torch


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def facts() -> dict[str, Any]:
    """Machine, versions and commit; the benchmarks' own files say more."""
    nvcc = tool("nvcc")
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout if nvcc else ""
    found = re.search(r"release ([\d.]+)", release)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": runpy.run_path(str(COMMIT))["commit"](),
        "gpu": gpu(),
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in PACKAGES},
        "nvcc": found[1] if found else "not found",
        "processors": os.cpu_count(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="gpu_suite.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?", metavar="OUTDIR", help="a new or empty folder for the results")
    chosen = parser.add_mutually_exclusive_group()
    about = "; ".join(f"{part}: {', '.join(names)}" for part, names in PARTS.items())
    chosen.add_argument("--part", choices=PARTS, help=about)
    chosen.add_argument("--only", default="", metavar="A,B", help="run these sections alone")
    parser.add_argument("--skip", default="", metavar="A,B", help="leave these sections out")
    parser.add_argument("--deadline", type=float, default=DEADLINE, metavar="SECONDS", help="of all (default: 540)")
    parser.add_argument("--copy-to", type=Path, metavar="FOLDER", help="an existing folder that gets the two files too")
    parser.add_argument("--list", action="store_true", help="list the sections, and why one cannot run here")
    options = parser.parse_args(arguments)
    only = ",".join(PARTS[options.part]) if options.part else options.only
    os.environ.pop("TRITON_INTERPRET", None)  # a GPU's kernels are to be compiled
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # pip's cmake, ninja
    os.environ["PYTHONUNBUFFERED"] = "1"  # a log that is cut off has all that was printed
    if options.list:
        for section in all_sections(Path("OUTDIR")):
            parts = " and ".join(part for part, names in PARTS.items() if section.name in names)
            say(f"{section.name:<15} {parts:<16} {section.about}; {section.reason() or 'can run here'}")
        return 0
    if options.out is None:
        parser.error("OUTDIR is missing: name a folder for the results")
    if options.deadline <= 0:
        parser.error(f"--deadline is {options.deadline}; it must be a positive number of seconds")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        parser.error(f"OUTDIR {options.out} is not an empty folder; name a new one")
    if options.copy_to is not None and not options.copy_to.is_dir():
        parser.error(f"--copy-to {options.copy_to} is not a folder; make it first")
    out, copy_to = options.out.resolve(), options.copy_to and options.copy_to.resolve()
    if copy_to == out:
        parser.error("--copy-to is OUTDIR, where the two files are anyway; name another folder")
    lists = [[name for name in given.split(",") if name] for given in (only, options.skip)]
    try:
        sections = choose(all_sections(out), *lists)
    except ValueError as error:
        parser.error(str(error))
    os.chdir(ROOT)
    known = facts()
    if known["commit"] == "unknown":
        say("of which commit these files are is unknown here; ZOKERN_COMMIT=... tells it to all records")
    return Runner(out, options.deadline, known, copy_to=copy_to).run(sections)


if __name__ == "__main__":
    sys.exit(main())
