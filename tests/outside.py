"""What `make matrix` and `make arm` share: the tests in an environment of their own, so that nothing of the checkout is
imported, and commands whose output goes to a log."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PYTEST = ("-m", "pytest", "-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder", "-p", "no:cacheprovider")
LAST = 30  # lines of a command that failed

Cell = dict[str, Any]


class Failed(Exception):
    """A command did; its text is which, and the end of what it said."""


def run(
    command: Sequence[str | Path], log: Path, seen: Callable[[str], None] = lambda line: None, **options: Any
) -> str:
    """All that it prints, which is added to the log as it comes, line by line.

    Args:
        seen: Called with each line.

    Raises:
        Failed: where it ends with another exit code than 0.
    """
    words, lines = [*map(str, command)], list[str]()
    with (
        log.open("a") as file,
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options) as process,
    ):
        print(f"$ {' '.join(words)}", file=file, flush=True)
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            file.write(line)
            file.flush()
            seen(line)
        print(file=file)
    if process.returncode:
        told = f"{' '.join([Path(words[0]).name, *words[1:3]])} ended with exit code {process.returncode}"
        raise Failed("\n".join([told, *"".join(lines).splitlines()[-LAST:]]))
    return "".join(lines)


class Told:
    """Says how far pytest is, where that is a tenth further than what was said."""

    def __init__(self) -> None:
        self.said = 0

    def __call__(self, line: str) -> None:
        percent = re.search(r"\[ *(\d+)%\]$", line.rstrip())
        if percent is not None and int(percent[1]) >= self.said + 10:
            self.said = int(percent[1])
            say(f"  {self.said} %")


def begun(name: str) -> Path:
    """The log of a call, in build/, empty."""
    log = ROOT / "build" / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    log.write_text("")
    say(f"all output is in {log}")
    return log


def source_distribution(folder: Path, log: Path) -> Path:
    run(["pyproject-build", "--sdist", "--outdir", folder, ROOT], log)
    (sdist,) = folder.glob("zokern-*.tar.gz")
    return sdist


def variables(venv: Path) -> dict[str, str]:
    """The environment of a process in venv: this one's, without what would let the checkout in."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    return {**kept, "VIRTUAL_ENV": str(venv), "COLUMNS": "200"}


VERSIONS = """
import importlib.metadata as metadata, json, sys
print(json.dumps({"python": sys.version.split()[0], **{name: metadata.version(name) for name in sys.argv[1:]}}))
"""


def versions(python: Path, names: Sequence[str], log: Path, env: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = json.loads(run([python, "-c", VERSIONS, *names], log, cwd=python.parent, env=env))
    return found


def copied(folder: Path) -> Path:
    """What the tests need of the checkout, without the package: the files that git knows."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if not name.startswith(("zokern/", "csrc/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def counted(report: Path) -> Cell:
    """Of a JUnit file: how many tests passed and were skipped, and the names of those that failed."""
    found: Cell = {"passed": 0, "skipped": 0, "failed": []}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {part.tag for part in case}
        if kinds & {"failure", "error"}:
            found["failed"].append(f"{case.get('classname', '').replace('.', '/')}::{case.get('name')}")
        else:
            found["skipped" if "skipped" in kinds else "passed"] += 1
    return found


def tested(python: Path, tests: Sequence[str], outside: Path, log: Path, env: Mapping[str, str]) -> Cell:
    """The tests of a copy, counted, and what they took.

    Raises:
        Failed: where pytest has no tests.
    """
    report, start = outside / "tests.xml", time.monotonic()
    try:
        shown = {**env, "PYTHONUNBUFFERED": "1"}
        run([python, *PYTEST, f"--junitxml={report}", *tests], log, Told(), cwd=outside, env=shown)
    except Failed:
        if not report.is_file():
            raise
    return {**counted(report), "seconds": round(time.monotonic() - start)}


def told(cell: Cell) -> str:
    if "broke" in cell:
        return f"  broke:\n{cell['broke']}"
    if "not at hand" in cell:
        return f"  {cell['not at hand']}"
    shown = ", ".join(f"{name} {version}" for name, version in cell["versions"].items())
    counts = f"{cell['passed']} passed, {cell['skipped']} skipped, {len(cell['failed'])} failed"
    return "\n    ".join([f"  {counts} in {cell['seconds']} s: {shown}", *cell["failed"]])


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
