"""Inputs that fuzzing found and that are kept (keep.py): journals that each reach something which no other one does.

tests/data/fuzz.tar.xz has them, fuzz.json how each ends. Fuzzing starts from these, and the runs' own journals (corpus.py).
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "data"
FOUND = Path(__file__).parents[2] / "build" / "fuzz"  # where a run leaves its inputs


def name_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


@functools.cache
def stored() -> dict[str, bytes]:
    with tarfile.open(DATA / "fuzz.tar.xz") as archive:
        return {one.name: archive.extractfile(one).read() for one in archive}  # type: ignore[union-attr]


def ends() -> dict[str, dict[str, Any]]:
    """By name: targets.outline of it."""
    found: dict[str, dict[str, Any]] = json.loads((DATA / "fuzz.json").read_text())
    return found


def store(inputs: list[bytes], ends: Mapping[str, Mapping[str, Any]]) -> None:
    """Bytes that depend on the inputs alone."""
    with tarfile.open(DATA / "fuzz.tar.xz", "w:xz", preset=9) as archive:
        for data in sorted(inputs, key=lambda data: (len(data), data)):
            member = tarfile.TarInfo(name_of(data))
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(end, sort_keys=True)}" for name, end in sorted(ends.items()))
    (DATA / "fuzz.json").write_text(f"{{\n{lines}\n}}\n")
