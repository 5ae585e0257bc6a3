"""The commit that records name: of this source, and of no other repository that happens to lie around it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zokern.bench import commit, record

ROOT = Path(__file__).resolve().parents[2]
NOBODY = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


@pytest.fixture(autouse=True)
def not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(commit.ENVIRONMENT, raising=False)


def git(folder: Path, *command: str) -> str:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ["git", "-C", str(folder), *command], capture_output=True, text=True, check=True, env={**outside, **NOBODY}
    )
    return done.stdout.strip()


def project(folder: Path) -> Path:
    """The folders that count."""
    for part in ("csrc", "zokern", "docs"):
        (folder / part).mkdir(parents=True)
        (folder / part / "file").write_text("as committed")
    return folder


def committed(folder: Path) -> str:
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "all")
    return git(folder, "rev-parse", "HEAD")


@pytest.mark.parametrize("part", ["csrc", "zokern", "docs"])
def test_of_a_checkout_with_what_changed(part: str, tmp_path: Path) -> None:
    here = project(tmp_path / "project")
    head = committed(here)
    assert commit.commit(here) == head
    (here / part / "file").write_text("changed")
    assert commit.commit(here) == head + ("" if part == "docs" else "+changes")


def test_a_repository_around_the_project_does_not_count(tmp_path: Path) -> None:
    here = project(tmp_path / "outer" / "project")
    committed(tmp_path / "outer")
    assert commit.commit(here) == commit.UNKNOWN
    (tmp_path / "link").symlink_to(tmp_path / "outer")
    assert len(commit.commit(tmp_path / "link")) == 40  # another way to the root itself


def test_a_hook_of_another_repository_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, other = project(tmp_path / "project"), project(tmp_path / "other")
    committed(other)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert commit.commit(here) == commit.UNKNOWN


def test_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit.commit(tmp_path) == commit.UNKNOWN


def test_what_the_environment_tells_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = project(tmp_path / "project")
    head = committed(here)
    monkeypatch.setenv(commit.ENVIRONMENT, " 0123abcd+changes \n")
    assert commit.commit(here) == "0123abcd+changes"
    monkeypatch.setenv(commit.ENVIRONMENT, " ")
    assert commit.commit(here) == head


def test_records_and_the_suite_tell_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(commit.ENVIRONMENT, "told")
    assert record.commit.__wrapped__() == "told"  # it is asked for once in a process
    code = "import sys; from benchmarks.gpu import suite; print(suite.facts()['commit'], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["told", "False"]
