"""Paths and names that docs, docstrings and comments mention are there."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("benchmarks", "csrc", "docs", "examples", "findings", "tests", "zokern")
PATH = re.compile(r"(?<![\w/.{-])((?:[\w-]+/)+[\w-]+\.(?:py|cuh|cu|cpp|h|md|sh))\b")
NAME = re.compile(r"(?<![\w/.-])(zokern(?:\.[A-Za-z_]\w*)+)")
OURS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
SOURCES = [
    p
    for folder in ("zokern", "csrc")
    for p in (ROOT / folder).rglob("*")
    if p.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"}
]


def there() -> set[str]:
    """Every file's path, from any of its folders on: "journal/format.py" too."""
    found = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            parts = path.relative_to(ROOT).parts
            found |= {"/".join(parts[i:]) for i in range(len(parts))}
    return found


def resolves(name: str) -> bool:
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ImportError:
            continue
        for part in parts[i:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def mentioned(pattern: re.Pattern[str], files: list[Path]) -> Iterator[tuple[str, str]]:
    for path in files:
        text = re.sub(r"(?s)\n## Adding\n.*?\n## ", "\n## ", path.read_text())  # recipes: test_recipes.py follows them
        for found in sorted(set(pattern.findall(text))):
            yield str(path.relative_to(ROOT)), found


@pytest.mark.parametrize("files", [OURS, SOURCES], ids=["docs", "sources"])
def test_paths_lead_somewhere(files: list[Path]) -> None:
    known = there()
    outside = ("pybind11/", "root/", "large_models/", "MeZO/", "es_at_scale/")  # other projects', and a variable
    wrong = [one for one in mentioned(PATH, files) if one[1] not in known and not one[1].startswith(outside)]
    assert wrong == []


@pytest.mark.filterwarnings("ignore:.*has moved to:DeprecationWarning")
@pytest.mark.parametrize("files", [OURS, SOURCES], ids=["docs", "sources"])
def test_names_are_there(files: list[Path]) -> None:
    assert [one for one in mentioned(NAME, files) if not resolves(one[1])] == []


def test_a_wrong_path_and_a_wrong_name_are_seen() -> None:
    assert PATH.findall("see `zokern/no_such.py` and tests/ptx/no.cuh.") == ["zokern/no_such.py", "tests/ptx/no.cuh"]
    assert NAME.findall("zokern.MeZO(…) zokern.optim.base.nothing") == ["zokern.MeZO", "zokern.optim.base.nothing"]
    assert resolves("zokern.MeZO.step")
    assert not resolves("zokern.optim.base.nothing")
