"""Makes the stored data of cases that have none yet: python -m tests.net. With --all, of all (see __init__.py)."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from . import store
from .cases import every
from .runs import do


def main() -> None:
    torch.set_num_threads(1)
    fresh = "--all" in sys.argv or not (store.DATA / "net.json").exists()
    hashes, files = ({}, {}) if fresh else (dict(store.hashes()), dict(store.files()))
    missing = [case for case in every() if str(case) not in hashes]
    with tempfile.TemporaryDirectory() as folder:
        for i, case in enumerate(missing):
            path = Path(folder) / "run.zkj"
            path.unlink(missing_ok=True)
            found = do(case, path)
            if "saved" in found:
                files[f"{case}.pt"] = found.pop("saved")
            else:
                files[f"{case}.zkj"] = path.read_bytes()
            hashes[str(case)] = found
            if (i + 1) % 50 == 0:
                print(f"{i + 1} of {len(missing)}", flush=True)
    store.write(hashes, files)
    print(f"{len(missing)} cases added, {len(hashes)} in all")


main()
