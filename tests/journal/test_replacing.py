"""force=True: the earlier journal is there until the new one has a step."""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
from pathlib import Path

import pytest

import zokern
from tests.methods import weights
from tests.models import toy
from zokern import journal


def run(path: Path, steps: int, *, seed: int = 0, **options: object) -> None:
    model = toy()
    opt = zokern.MeZO(model, 1e-2, seed=seed)
    with journal.write(opt, path, **options):
        for _ in range(steps):
            opt.step(model)


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    path = tmp_path / "run.zkj"
    run(path, 3)
    return path


def only(path: Path) -> bool:
    return [p.name for p in path.parent.iterdir()] == [path.name]


def killed(path: Path, place: str) -> None:
    """Begins a new run over the earlier one's journal, and is killed at that place."""
    model = toy()
    opt = zokern.MeZO(model, 1e-2, seed=9)
    replace = os.replace

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if place == "before it moves":
        os.replace = die
    elif place == "after it moved":
        os.replace = lambda *names: (replace(*names), die())
    with journal.write(opt, path, force=True):
        opt.step(die if place == "before the first step" else model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork in a process with threads
@pytest.mark.parametrize("place", ["before the first step", "before it moves", "after it moved"])
def test_killed(place: str, earlier: Path) -> None:
    before = earlier.read_bytes()
    child = multiprocessing.get_context("fork").Process(target=killed, args=(earlier, place), daemon=True)
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    moved = place == "after it moved"
    assert (earlier.read_bytes() == before) == (not moved)
    assert earlier.with_name("run.zkj.new").exists() == (not moved)
    model = toy()
    if not moved:
        assert journal.replay(earlier, model) == 3
        run(earlier, 2, seed=5, force=True)  # what was left over is in nobody's way
        assert len(list(journal.Reader(earlier).steps())) == 2
        return
    opt = zokern.MeZO(model, 1e-2, seed=9)
    with journal.resume(opt, earlier):
        assert opt.counters["steps"] == 1
        opt.step(model)
    twin = toy()
    other = zokern.MeZO(twin, 1e-2, seed=9)
    other.step(twin), other.step(twin)
    assert all(map(lambda a, b: a.equal(b), weights(model), weights(twin)))


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_first_step_that_raises(error: type[BaseException], earlier: Path) -> None:
    before, model = earlier.read_bytes(), toy()
    opt = zokern.MeZO(model, 1e-2)

    def closure() -> None:
        model()
        raise error

    with pytest.raises(error), journal.write(opt, earlier, force=True):
        opt.step(closure)
    assert earlier.read_bytes() == before
    assert only(earlier)


def test_what_raises_later_leaves_the_new_one(earlier: Path) -> None:
    model = toy()
    opt = zokern.MeZO(model, 1e-2, seed=4)
    before = earlier.read_bytes()

    def body() -> None:
        with journal.write(opt, earlier, force=True):
            assert earlier.read_bytes() == before
            opt.step(model)
            assert journal.Reader(earlier).header["seed"] == 4  # from the first step on it can be taken up
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        body()
    assert len(list(journal.Reader(earlier).steps())) == 1
    assert only(earlier)


def test_a_run_of_no_steps_replaces_at_its_end(earlier: Path) -> None:
    run(earlier, 0, seed=7, force=True)
    assert (journal.Reader(earlier).header["seed"], list(journal.Reader(earlier).steps())) == (7, [])
    assert only(earlier)


def test_nothing_of_the_user_s_is_written_over(earlier: Path) -> None:
    mine = earlier.with_name("run.zkj.new")
    mine.write_text("mine")
    run(earlier, 1, seed=7, force=True)
    assert mine.read_text() == "mine"
    assert sorted(p.name for p in earlier.parent.iterdir()) == ["run.zkj", "run.zkj.new"]


def test_links_and_modes_stay(earlier: Path) -> None:
    link = earlier.parent / "link.zkj"
    link.symlink_to(earlier.name)
    earlier.chmod(0o640)
    run(link, 1, seed=7, force=True)
    assert link.is_symlink()
    assert stat.S_IMODE(earlier.stat().st_mode) == 0o640
    assert journal.Reader(earlier).header["seed"] == 7


def test_an_empty_file_is_just_written(tmp_path: Path) -> None:
    (tmp_path / "run.zkj").touch()
    run(tmp_path / "run.zkj", 1, force=True)
    assert only(tmp_path / "run.zkj")


def test_two_of_them(earlier: Path) -> None:
    """The second is refused before and after the first has moved."""
    model = toy()
    opt = zokern.MeZO(model, 1e-2)
    with journal.write(opt, earlier, force=True):
        for _ in range(2):
            with pytest.raises(journal.JournalError, match="another process is writing it"):
                run(earlier, 1, force=True)
            opt.step(model)
    assert only(earlier)


def test_a_place_that_cannot_be_taken_is_told_and_nothing_is_lost(
    earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, model = earlier.read_bytes(), toy()
    opt = zokern.MeZO(model, 1e-2, seed=4)

    def refuse(*_: object) -> None:
        raise PermissionError("no")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", refuse)
        with pytest.raises(PermissionError), journal.write(opt, earlier, force=True):
            opt.step(model)
    assert opt.counters["steps"] == 1
    assert earlier.read_bytes() == before
    assert journal.replay(earlier.with_name("run.zkj.new"), toy()) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(earlier: Path) -> None:
    earlier.parent.chmod(0o555)
    try:
        with pytest.raises(journal.JournalError, match="give the name of a new file elsewhere"):
            run(earlier, 1, force=True)
    finally:
        earlier.parent.chmod(0o755)


@pytest.mark.parametrize("force", [False, True])
def test_a_name_that_cannot_be_is_named(force: bool, tmp_path: Path) -> None:
    with pytest.raises(journal.JournalError, match="cannot be written"):
        run(tmp_path / ("n" * 300), 1, force=force)
