"""The commit of the source that runs. The standard library alone: the GPU suite runs this file, torch or not."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = "ZOKERN_COMMIT"  # for a machine that gets the files without .git
UNKNOWN = "unknown"


def commit(root: Path = ROOT) -> str:
    """ZOKERN_COMMIT where it is set; else that of the git checkout at `root`, "+changes" behind it; else "unknown".

    A repository around the project does not count: its commit says nothing about these files.
    """
    if told := os.environ.get(ENVIRONMENT, "").strip():
        return told
    try:
        top, head = (_git(root, "rev-parse", what) for what in ("--show-toplevel", "HEAD"))
        if Path(top).resolve() != root.resolve():
            return UNKNOWN
        return head + ("+changes" if _git(root, "status", "--porcelain", "--", "csrc", "zokern") else "")
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN


def _git(root: Path, *command: str) -> str:
    # Inside a hook GIT_DIR names the hook's own repository, whatever -C says.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=True, env=env)
    return done.stdout.strip()
