"""Imports go one way: a room knows those below it, and none above."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import zokern

ROOT = Path(zokern.__file__).parent
# From the ground up; rooms on one floor do not know each other.
FLOORS = (
    ("_checks", "_version", "_moved", "drawing", "failing", "interrupts"),
    ("kinds", "parts", "deltas"),
    ("hashing",),
    ("settings",),
    ("contract",),
    ("directions",),
    ("passes",),
    ("backends",),
    ("sweep",),
    ("ops",),
    ("noise", "layers", "scales"),
    ("placement",),
    ("distributed",),
    ("optim",),
    ("checking", "journal", "graphs"),
    ("report", "integrations", "tasks"),
    ("finetune",),
    ("bench",),
    ("cli",),
    ("__main__",),
)
MOVED = {"reference", "reference_rules", "rules"}  # names of one release more, which import where they point to
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}


def rooms() -> set[str]:
    return {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}


def imports(path: Path) -> Iterator[str]:
    """The modules of zokern that a file names, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("zokern."))
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module == "zokern":
            yield from (f"zokern.{name.name}" for name in node.names if name.name in rooms())
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("zokern."):
            yield str(node.module)


def test_every_room_has_a_floor() -> None:
    assert rooms() - {"__init__"} - MOVED == set(FLOOR)


def test_imports_go_down() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).with_suffix("").parts[0]
        for module in imports(path) if room in FLOOR else ():
            other = module.split(".")[1]
            if other != room and FLOOR[other] >= FLOOR[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert wrong == []
