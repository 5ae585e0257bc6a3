"""The output directory of a run: what stays in it, who has it, and what is done when it is taken away."""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import zokern
from tests.finetune.children import killed_at, limited
from tests.finetune.test_replacing import contents, model
from zokern.finetune import FinetuneError, Options, former, locking, output
from zokern.finetune.output import Output, claim
from zokern.finetune.replacing import MARKER, PREFIX
from zokern.journal import tools

EVAL = {"kind": "eval", "step": 0, "loss": 1.0, "accuracy": 0.5, "lr": 0.1, "eps": 0.1, "seconds": 0.0, "forwards": 0}
TRAIN = {**EVAL, "kind": "train", "step": 3, "skipped": 0, "projected_gradient": 1.0}


@pytest.fixture
def said() -> list[str]:
    return []


def write_journal(path: Path, steps: int) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = zokern.MeZO([("w", parameter)], 1e-2)
    with zokern.journal.write(optimizer, path):
        for _ in range(steps):
            optimizer.step(lambda: parameter.sum())


def write_run(at: Path, steps: int = 3, finished: bool = True, name: str = "old") -> Path:
    """What a run leaves, finished or killed after some steps."""
    at.mkdir(parents=True, exist_ok=True)
    (at / "options.json").write_text(json.dumps({"model": name, "steps": 3}))
    lines = [EVAL] + [TRAIN] * (steps > 0)
    (at / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    write_journal(at / "journal.zkj", steps)
    if finished:
        model(at / "checkpoint", name)
        (at / "run.json").write_text(json.dumps({"options": {}, "summary": name}))
        (at / "curves.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return at


class Saved(torch.nn.Module):
    """A model that saves itself as text."""

    def save_pretrained(self, path: Path) -> None:
        if not path.exists():
            model(path, "new")


def run(at: Path, said: list[str], force: bool = False, steps: int = 2) -> None:
    """A whole run, in little."""
    with claim(at, force=force, resume=False, say=said.append) as out:
        out.begin({"model": "new", "steps": steps})
        out.log(EVAL)
        write_journal(out.journal, steps)
        out.watch_journal()
        out.log(TRAIN)
        out.mend()
        out.save_model(Saved(), Saved())
        out.save_json("run.json", {"options": {}, "summary": "new"})
        out.complete()


# ------------------------------------------------------------------------------------------------------- earlier results


def test_earlier_results_stay_until_the_new_ones_are_whole(tmp_path: Path, said: list[str]) -> None:
    at = write_run(tmp_path / "out")
    for name in ("thesis.txt", "checkpoint.tmp", "run.json.tmp"):
        (at / name).write_text("mine")
    before = contents(at)
    with claim(at, force=True, resume=False, say=said.append) as out:
        assert contents(at).items() >= before.items()
        out.begin({"model": "new", "steps": 2})
        aside = at / "earlier-run-1"
        assert contents(aside / "checkpoint") == contents_of(before, "checkpoint/")
        assert any(str(aside) in line for line in said)
        write_journal(out.journal, 2)
        out.watch_journal()
        out.mend()
        out.save_model(Saved(), Saved())
        assert (aside / "checkpoint" / "config.json").read_text() == "old"
        out.save_json("run.json", {"options": {}, "summary": "new"})
        out.complete()
    left = {path.name for path in at.iterdir()}
    assert left == {
        "checkpoint", "run.json", "metrics.jsonl", "options.json", "journal.zkj", "thesis.txt", "checkpoint.tmp",
        "run.json.tmp",
    }  # fmt: skip
    assert (at / "checkpoint" / "config.json").read_text() == "new"
    assert (at / "checkpoint.tmp").read_text() == "mine"


def contents_of(found: dict[str, object], head: str) -> dict[str, object]:
    return {name[len(head) :]: value for name, value in found.items() if name.startswith(head)}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_fails_before_its_first_step_leaves_all_as_it_was(
    error: type[BaseException], tmp_path: Path, said: list[str]
) -> None:
    at = write_run(tmp_path / "out")
    before = contents(at)
    with claim(at, force=True, resume=False, say=said.append) as out:
        out.begin({"model": "new", "steps": 2})
        out.log(EVAL)
        write_journal(out.journal, 0)
        out.watch_journal()
        assert out.abandon()
    assert contents(at) == before


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.faults)])
def test_killed_at_any_change_the_old_or_the_new_results_are_there(
    stride: int, tmp_path: Path, said: list[str]
) -> None:
    """Whatever the moment, the next start puts it right: the old results, or the new ones, or both; never none."""
    number, status = 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        at = write_run(tmp_path / str(number))
        (at / "thesis.txt").write_text("mine")
        again = functools.partial(run, at, said, force=True)
        status = killed_at(again, tmp_path / "said", at, number)
        with claim(at, force=True, resume=False, say=said.append):
            places = [at, *former.asides(at)]
            names = {(p / "checkpoint/config.json").read_text() for p in places if (p / "checkpoint").exists()}
            assert names in ({"old"}, {"new"}, {"old", "new"}), number
            if names == {"old"}:
                whole = next(p for p in places if (p / "checkpoint").exists())
                assert {path.name for path in whole.iterdir()} >= set(former.NAMES), number
        again()
        assert sorted(p.name for p in at.iterdir()) == [
            "checkpoint", "journal.zkj", "metrics.jsonl", "options.json", "run.json", "thesis.txt",
        ]  # fmt: skip
        assert (at / "checkpoint" / "config.json").read_text() == "new"
        number += stride
    assert status == 0, (tmp_path / "said").read_text()
    assert number > 25


def test_a_run_that_was_killed_in_its_steps_keeps_both(tmp_path: Path, said: list[str]) -> None:
    at = write_run(tmp_path / "out")
    aside = former.put_aside(at)
    write_run(at, finished=False, name="killed")
    said.clear()
    with claim(at, force=True, resume=False, say=said.append):
        assert any(str(aside) in line for line in said)
    run(at, said, force=True)
    assert (at / "checkpoint" / "config.json").read_text() == "new"
    assert former.asides(at) == []


def test_killed_while_the_earlier_results_go_they_go(tmp_path: Path, said: list[str]) -> None:
    at = write_run(tmp_path / "out")
    place = former.put_aside(at)
    assert place is not None
    write_run(at, name="new")
    (place / MARKER).write_text("no longer needed")
    (place / "checkpoint" / "config.json").unlink()
    with claim(at, force=True, resume=False, say=said.append):
        assert not place.exists()


@pytest.mark.parametrize("size", [0, 3, 14, 40, 300, 2000])
def test_a_full_disk_takes_no_earlier_results(size: int, tmp_path: Path, said: list[str]) -> None:
    at = write_run(tmp_path / "out")
    before = contents(at)

    def full() -> None:
        with claim(at, force=True, resume=False, say=print) as out:
            try:
                out.begin({"model": "new", "steps": 2})
                out.log({**EVAL, "filler": "x" * 5000})
            except OSError:
                assert out.abandon()
                raise

    assert limited(full, tmp_path / "said", size) == 99
    assert "File too large" in (tmp_path / "said").read_text()
    with claim(at, force=True, resume=False, say=said.append):
        pass
    assert contents(at) == before


@pytest.mark.parametrize(
    "leave",
    [
        {},
        {"metrics.jsonl": b""},
        {"options.json": b'{"model": "x", "steps": 1}', "metrics.jsonl": b""},
        {"options.json": b'{"model": "x", "steps": 1}', "journal.zkj": b""},
        {locking.NAME: b"123"},
    ],
)
def test_what_has_no_step_needs_no_force(leave: dict[str, bytes], tmp_path: Path, said: list[str]) -> None:
    at = tmp_path / "out"
    at.mkdir()
    for name, data in leave.items():
        (at / name).write_bytes(data)
    dead = at / f"{PREFIX}0"
    dead.mkdir()
    (dead / MARKER).touch()
    (dead / "new").write_text("half of options.json")
    run(at, said)
    assert not dead.exists()
    with pytest.raises(FinetuneError, match=r"is not empty.*--force.*--resume"):
        run(at, said)


def test_a_run_without_a_step_is_no_loss_and_one_with_a_step_is(tmp_path: Path, said: list[str]) -> None:
    write_run(tmp_path / "none", steps=0, finished=False)
    former.check(tmp_path / "none", force=False)
    write_run(tmp_path / "one", steps=1, finished=False)
    (tmp_path / "one" / "metrics.jsonl").unlink()
    with pytest.raises(FinetuneError, match="--force"):
        former.check(tmp_path / "one", force=False)


# -------------------------------------------------------------------------------------------------- what is not a run's


def _linked(at: Path) -> None:
    model(at.parent / "elsewhere", "x")
    (at / "checkpoint").symlink_to(at.parent / "elsewhere")


MINE = {
    "notes in checkpoint": (lambda at: model(at / "checkpoint", "x", "notes.md"), r"checkpoint there .*notes\.md"),
    "checkpoint is a file": (lambda at: (at / "checkpoint").write_text("x"), "checkpoint there is not a directory"),
    "checkpoint is a link": (_linked, "checkpoint there is a symbolic link"),
    "metrics.jsonl": (
        lambda at: (at / "metrics.jsonl").write_text("my own\n"),
        r"metrics\.jsonl there was not written",
    ),
    "run.json": (lambda at: (at / "run.json").write_text("[1]"), r"run\.json there was not written"),
    "options.json": (lambda at: (at / "options.json").write_text('{"a": 1}'), r"options\.json there was not written"),
    "journal.zkj": (lambda at: (at / "journal.zkj").write_text("dear diary"), r"journal\.zkj there was not written"),
    "curves.png": (lambda at: (at / "curves.png").write_text("P"), r"curves\.png there was not written"),
    "directory": (lambda at: (at / "run.json").mkdir(), r"run\.json there is not a file"),
    "link": (lambda at: (at / "run.json").symlink_to("x"), r"run\.json there is a symbolic link"),
}


@pytest.mark.parametrize("kind", MINE)
def test_force_refuses_what_no_run_wrote(kind: str, tmp_path: Path, said: list[str]) -> None:
    make, message = MINE[kind]
    at = tmp_path / "out"
    at.mkdir()
    make(at)
    before = contents(tmp_path)
    with pytest.raises(FinetuneError, match=rf"--output .*{message}.*; move it away"):
        run(at, said, force=True)
    assert contents(tmp_path) == before


def test_a_damaged_file_of_a_run_is_the_runs(tmp_path: Path, said: list[str]) -> None:
    at = write_run(tmp_path / "out")
    (at / "metrics.jsonl").write_bytes(b"\xff\xfe")
    (at / "options.json").write_bytes(b"{")
    run(at, said, force=True)


# ---------------------------------------------------------------------------------------------------------------- the lock


def test_the_second_process_is_told_of_the_first(tmp_path: Path, said: list[str]) -> None:
    code = (
        "import sys; from pathlib import Path; from zokern.finetune.output import claim\n"
        "with claim(Path(sys.argv[1]), force=False, resume=False, say=print):\n"
        "    print('mine', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "mine\n"
    for resume in (False, True):
        with (
            pytest.raises(FinetuneError, match=rf"--output .* in use by another run, process {other.pid}; "),
            claim(tmp_path / "out", force=True, resume=resume, say=said.append),
        ):
            pass
    other.kill()
    other.communicate()
    assert (tmp_path / "out" / locking.NAME).exists()  # of a process that was killed: no lock
    run(tmp_path / "out", said)
    assert not (tmp_path / "out" / locking.NAME).exists()


def test_a_lock_on_a_file_that_its_holder_has_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, removed = fcntl.flock, []

    def flock(*arguments: object) -> None:
        if not removed:  # the holder before ends between our opening of the file and our lock
            removed.append((tmp_path / locking.NAME).unlink())
        plain(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = locking.Lock(tmp_path)
    assert (tmp_path / locking.NAME).read_text() == str(os.getpid())
    with pytest.raises(FinetuneError, match="in use"):
        locking.Lock(tmp_path)
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_taken_up_and_fails_stays(tmp_path: Path, said: list[str]) -> None:
    at = write_run(tmp_path / "out", steps=0, finished=False)
    before = contents(at)
    with claim(at, force=False, resume=True, say=said.append) as out:
        out.look_back()
        assert not out.abandon()
    assert contents(at) == before


def test_a_file_system_without_locks_is_told(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(zokern.ZokernWarning, match=r"journal\.zkj: its file system has no locks"):
        run(tmp_path / "out", said)
    assert sum("has no locks (No locks available)" in line for line in said) == 1


@pytest.mark.parametrize("output", ["file/sub", "/proc/nothing/here", "/dev/null"])
def test_a_place_where_nothing_can_be_is_a_sentence(
    output: str, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FinetuneError, match=r"--output '.*' cannot be used \(.*\); give another directory"):
        run(Path(output), said)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["output", "data", "descriptions"])
def test_a_path_that_no_file_can_have_is_a_sentence(name: str, tmp_path: Path) -> None:
    value = str(tmp_path / ("x" * 300)) + ".csv"
    with pytest.raises(FinetuneError, match=rf"--{name} is '.*', which cannot be .*\(File name too long\)"):
        Options(**{"output": tmp_path / "out", name: value}).check()


def test_a_directory_that_cannot_be_looked_into_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(former, "check", fail)
    with pytest.raises(FinetuneError, match=r"--output '.*' cannot be used \(.*Permission denied\); give another"):
        Options(output=tmp_path).check()


def test_directories_that_were_made_for_nothing_go_again(tmp_path: Path, said: list[str]) -> None:
    with claim(tmp_path / "a" / "b" / "c", force=False, resume=False, say=said.append):
        pass
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------- taken away


def taken(at: Path, said: list[str], take: object) -> Output:
    """A run from which something is taken away while it goes on."""
    with claim(at, force=False, resume=False, say=said.append) as out:
        out.begin({"model": "new", "steps": 2})
        out.log(EVAL)
        write_journal(out.journal, 2)
        out.watch_journal()
        out.look()
        assert out.lost == []
        take(at)  # type: ignore[operator]
        out.log(TRAIN)
        out.look()
        assert len(out.lost) == 1
        out.look()
        out.mend()
        out.log({**EVAL, "step": 2})
        out.save_model(Saved(), Saved())
        out.mend()
        out.save_json("run.json", {"options": {}, "summary": "new"})
        out.complete()
    return out


def _replace(at: Path) -> None:
    shutil.rmtree(at)
    at.mkdir()
    (at / "theirs").write_text("x")


TAKEN = {
    "removed": lambda at: shutil.rmtree(at),
    "renamed": lambda at: at.rename(at.with_name("moved")),
    "journal removed": lambda at: (at / "journal.zkj").unlink(),
    "metrics removed": lambda at: (at / "metrics.jsonl").unlink(),
    "metrics edited": lambda at: ((at / "b").write_text("mine"), (at / "b").replace(at / "metrics.jsonl")),
    "journal replaced": lambda at: ((at / "b").write_text("mine"), (at / "b").replace(at / "journal.zkj")),
    "another directory": _replace,
}


@pytest.mark.parametrize("what", TAKEN)
def test_what_is_taken_away_is_told_and_written_again(what: str, tmp_path: Path, said: list[str]) -> None:
    at = tmp_path / "out"
    out = taken(at, said, TAKEN[what])
    assert any(line.startswith("warning: ") for line in said)
    where = tmp_path / "out-1" if what == "another directory" else at
    assert out.directory == where
    names = {path.name for path in where.iterdir()}
    assert names >= {"checkpoint", "journal.zkj", "metrics.jsonl", "options.json", "run.json"}
    assert [json.loads(line)["step"] for line in (where / "metrics.jsonl").read_text().splitlines()] == [0, 3, 2]
    journal = where / ("journal-1.zkj" if what == "journal replaced" else "journal.zkj")
    assert len(tools.summary(journal)["steps"]) == 2
    assert not out.incomplete
    if what == "another directory":
        assert [path.name for path in at.iterdir()] == ["theirs"]
    if what.endswith(("edited", "replaced")):
        kept = "metrics-1.jsonl" if what == "metrics edited" else "journal.zkj"
        assert (at / kept).read_text() == "mine"


def test_a_journal_that_cannot_be_written_again_is_an_error(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(output.shutil, "copyfileobj", fail)
    out = taken(tmp_path / "out", said, TAKEN["journal removed"])
    assert out.incomplete
    assert "error: the journal is lost: No space left on device" in said
