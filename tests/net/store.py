"""The stored data: tests/data/net.json has each case's hashes, net.tar.xz the journals and saved states."""

from __future__ import annotations

import functools
import io
import json
import tarfile
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "data"


@functools.cache
def hashes() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DATA / "net.json").read_text())
    return found


@functools.cache
def files() -> dict[str, bytes]:
    with tarfile.open(DATA / "net.tar.xz") as archive:
        return {m.name: archive.extractfile(m).read() for m in archive.getmembers()}  # type: ignore[union-attr]


def write(hashes: dict[str, Any], files: dict[str, bytes]) -> None:
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(hashes[name], sort_keys=True)}" for name in sorted(hashes))
    (DATA / "net.json").write_text("{\n" + lines + "\n}\n")
    with tarfile.open(DATA / "net.tar.xz", "w:xz", preset=9) as archive:
        for name in sorted(files):
            entry = tarfile.TarInfo(name)
            entry.size = len(files[name])
            archive.addfile(entry, io.BytesIO(files[name]))
