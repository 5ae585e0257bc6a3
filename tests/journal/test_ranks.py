"""A journal of several ranks is that of one process: the first writes it, all are taken up from it, errors reach all."""

from __future__ import annotations

import contextlib
import copy
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor, nn

import zokern
from tests.distributed.ranks import Outcome, outcomes, run
from tests.methods import METHODS, build, equal, weights
from tests.models import small, tokens
from zokern import journal
from zokern.distributed import pieces
from zokern.journal import tools

STEPS = 8
NOWHERE = Path("/no such folder")


def own(path: Path) -> Path:
    """The journal's path on this rank: the others have no such file system."""
    return path if dist.get_rank() == 0 else NOWHERE / path.name


def steps(opt: Any, model: nn.Module, first: int, last: int, parallel: str) -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    for t in range(first, last):
        if parallel == "data":
            opt.step(lambda t=t: model(tokens(t * world + rank)))
        else:
            opt.step(lambda t=t: model(tokens(t)))


def made(name: str, **options: Any) -> tuple[Any, nn.Module]:
    model = small()
    return build(METHODS[name], model, **options), model


# ------------------------------------------------------------------------------------------------------------ writing


def whole(name: str, path: Path, parallel: str) -> list[Tensor]:
    opt, model = made(name, parallel=parallel)
    with journal.write(opt, own(path)):
        steps(opt, model, 0, STEPS, parallel)
        journal.mark(opt)
    return weights(model)


def written(names: list[str], folder: Path, parallel: str) -> list[list[Tensor]]:
    return [whole(name, folder / f"{name}.zkj", parallel) for name in names]


@pytest.mark.parametrize(
    ("names", "parallel", "world"),
    [(["mezo", "mezo-adamezo", "helene-by-layer"], "data", 2), (["gv", "es"], "directions", 3)],
)
def test_is_that_of_one_process(names: list[str], parallel: str, world: int, tmp_path: Path) -> None:
    """One process that takes the same micro-batches writes the same records, and a replay needs no ranks."""
    found = run(world, written, names, tmp_path, parallel)
    for i, name in enumerate(names):
        path = tmp_path / f"{name}.zkj"
        opt, model = made(name)
        with journal.write(opt, tmp_path / "alone.zkj", force=True):
            for t in range(STEPS):
                opt.step(model, [tokens(t * world + r) for r in range(world)] if parallel == "data" else [tokens(t)])
        assert tools.first_difference(path, tmp_path / "alone.zkj") is None
        model = small()
        assert journal.replay(path, model) == STEPS
        assert all(equal(weights(model), ranks[i]) for ranks in found)
        assert len(tools.summary(path)["marks"]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*(f"{name}.zkj" for name in names), "alone.zkj"])


# ------------------------------------------------------------------------------------------------------------ taking up


def broken_off(name: str, path: Path) -> None:
    opt, model = made(name, parallel="directions")
    with contextlib.suppress(KeyError), journal.write(opt, own(path)):
        steps(opt, model, 0, 5, "directions")
        raise KeyError("the run breaks off on all ranks")


def taken_up(name: str, path: Path) -> tuple[list[Tensor], int, int]:
    opt, model = made(name, parallel="directions")
    with journal.resume(opt, own(path)) as done:
        steps(opt, model, done, STEPS, "directions")
    return weights(model), done, opt.exchanged()["collectives"]


@pytest.mark.parametrize("name", ["mezo-adam", "gv"])
def test_other_ranks_take_up_from_base_and_journal_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two wrote and three go on: the third joins."""
    (want, *_) = run(2, whole, name, tmp_path / "whole.zkj", "directions")
    path = tmp_path / "run.zkj"
    run(2, broken_off, name, path)
    with path.open("ab") as file:
        file.write(b"torn")
    found = run(3, taken_up_with_a_warning, name, path)
    assert [done for _, done, _ in found] == [5, 5, 5]
    assert all(equal(got, want) for got, *_ in found)
    assert tools.first_difference(path, tmp_path / "whole.zkj") is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.zkj", "run.zkj.cut", "whole.zkj"]


def taken_up_with_a_warning(name: str, path: Path) -> tuple[list[Tensor], int, int]:
    if dist.get_rank() == 0:
        with pytest.warns(zokern.ZokernWarning, match="they are cut off"):
            return taken_up(name, path)
    return taken_up(name, path)


def in_pieces(name: str, path: Path, size: int) -> tuple[list[Tensor], int, int]:
    pieces.PIECE = size
    return taken_up(name, path)


def test_the_bytes_come_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "run.zkj"
    (want, *_) = run(2, whole, "mezo", path, "directions")
    size = path.stat().st_size
    counts = []
    for piece in (1 << 20, 100):
        found = run(2, in_pieces, "mezo", path, piece)
        assert all(equal(got, want) for got, *_ in found)
        counts.append(found[0][2])
    assert counts[1] - counts[0] == -(-size // 100) - 1


def checkpointed(path: Path) -> list[Tensor]:
    """A checkpoint of step 5, after which the run goes on to step 7 and is lost."""
    opt, model = made("mezo-adam", parallel="data")
    with journal.write(opt, own(path)):
        steps(opt, model, 0, 5, "data")
        saved = copy.deepcopy((opt.state_dict(), model.state_dict()))
        journal.mark(opt)
        steps(opt, model, 5, 7, "data")
    opt, model = made("mezo-adam", parallel="data")
    opt.load_state_dict(saved[0])
    model.load_state_dict(saved[1])
    with journal.append(opt, own(path)):
        steps(opt, model, 5, STEPS, "data")
    return weights(model)


def test_written_on_after_a_checkpoint(tmp_path: Path) -> None:
    a, b = run(2, checkpointed, tmp_path / "run.zkj")
    model = small()
    assert journal.replay(tmp_path / "run.zkj", model) == STEPS
    assert equal(weights(model), a)
    assert equal(a, b)


# ------------------------------------------------------------------------------------------------------------- failures


def refused(path: Path, begin: str, spoil: Callable[[Any, nn.Module], object] | None) -> str:
    opt, model = made("mezo", parallel="data")
    before = weights(model)
    if spoil is not None:
        spoil(opt, model)
        before = weights(model)
    try:
        with getattr(journal, begin)(opt, own(path)):
            return "it has begun"
    except (journal.JournalError, zokern.RankError) as error:
        assert equal(weights(model), before)
        assert opt.listeners == []
        return f"{type(error).__name__}: {error}"


def spoil_second(opt: Any, model: nn.Module) -> None:
    if dist.get_rank() == 1:
        model.embedding.weight.data.add_(1)


def test_all_ranks_hear_why_a_journal_cannot_begin(tmp_path: Path) -> None:
    path = tmp_path / "run.zkj"
    run(2, whole, "mezo", path, "data")
    data = path.read_bytes()
    first, second = run(2, refused, path, "write", None)
    assert "run.zkj exists" in first
    assert "JournalError: /no such folder/run.zkj: rank 0 raised JournalError:" in second
    assert "run.zkj exists; give another name" in second
    first, second = run(2, refused, path, "resume", spoil_second)
    assert "rank 1 raised JournalError" in first
    assert "no such folder/run.zkj: the optimizer's weights are not those that the run started from" in second
    first, second = run(2, refused, tmp_path / "new.zkj", "write", spoil_second)
    assert first == second
    assert "RankError" in first
    assert "base is " in first
    assert not (tmp_path / "new.zkj").exists()
    assert path.read_bytes() == data
    path.write_bytes(data[:60] + b"x" + data[61:])
    first, second = run(2, refused, path, "resume", None)
    for said in (first, second):
        assert "run.zkj: its header is damaged" in said
        assert "zokern-" not in said


def one_alone(path: Path, after: int) -> str:
    """The idiom of `if rank == 0`, which leaves the others in a step."""
    opt, model = made("mezo", parallel="data")
    steps(opt, model, 0, after, "data")
    try:
        if opt.rank == 0:
            with journal.write(opt, path):
                steps(opt, model, after, after + 1, "data")
        else:
            steps(opt, model, after, after + 1, "data")
    except zokern.RankError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("after", [0, 2])
def test_one_rank_that_begins_alone_is_told(after: int, tmp_path: Path) -> None:
    for said in run(2, one_alone, tmp_path / "run.zkj", after):
        assert "journal.write" in said
        assert "rank 0" in said
    assert not (tmp_path / "run.zkj").exists()


class Full:
    """A file on a disk that fills up."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: Any) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(28, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def on_a_full_disk(path: Path, last: int) -> tuple[str, int]:
    """Room for two steps."""
    opt, model = made("mezo", parallel="data")
    try:
        with journal.write(opt, own(path)):
            steps(opt, model, 0, 2, "data")
            if opt.rank == 0:
                opt.listeners[0].writer.file = Full(opt.listeners[0].writer.file, 0)
            steps(opt, model, 2, last, "data")
    except (OSError, zokern.RankError) as error:
        return f"{type(error).__name__}: {error}", opt.counters["steps"]
    return "", opt.counters["steps"]


@pytest.mark.parametrize("last", [3, STEPS])
def test_a_disk_that_fills_up_ends_all_ranks(last: int, tmp_path: Path) -> None:
    """In the middle of a run, and in its last step."""
    (first, one), (second, two) = run(2, on_a_full_disk, tmp_path / "run.zkj", last)
    assert first == "OSError: [Errno 28] No space left on device"
    assert "rank 0 raised OSError: [Errno 28] No space left on device" in second
    assert one == two == 3
    assert tools.summary(tmp_path / "run.zkj")["steps"].tolist() == [0, 1]


def one_raises(path: Path, placement: str) -> tuple[list[Tensor], list[str]]:
    opt, model = made("mezo", parallel="data", placement=placement)
    said = []
    with journal.write(opt, own(path)):
        for t in range(4):
            calls = [0]

            def closure(t: int = t, calls: list[int] = calls) -> Tensor:
                calls[0] += 1
                if t == 2 and calls[0] == 2 and dist.get_rank() == 1:
                    raise MemoryError("in the second forward")
                return model(tokens(2 * t + dist.get_rank()))

            try:
                opt.step(closure)
            except (zokern.RankError, MemoryError) as error:
                said.append(type(error).__name__)
    return weights(model), said


@pytest.mark.parametrize("placement", ["inplace", "shadow"])
def test_a_step_that_another_rank_broke_off_is_recorded_as_ever(placement: str, tmp_path: Path) -> None:
    (a, first), (b, second) = run(2, one_raises, tmp_path / "run.zkj", placement)
    assert (first, second) == (["RankError"], ["MemoryError"])
    assert equal(a, b)
    found = tools.summary(tmp_path / "run.zkj")
    assert (len(found["steps"]), found["broken_off"]) == (3, int(placement == "inplace"))
    model = small()
    assert journal.replay(tmp_path / "run.zkj", model) == 3
    assert equal(weights(model), a)


def load_elsewhere(path: Path) -> str:
    opt, model = made("mezo-adam", parallel="data")
    saved = opt.state_dict()
    with journal.write(opt, own(path)):
        steps(opt, model, 0, 1, "data")
        with pytest.raises(journal.JournalError, match="already"), journal.write(opt, own(path)):
            pass
        try:
            opt.load_state_dict(saved)
        except journal.JournalError as error:
            return str(error)
    return ""


def test_no_rank_loads_while_a_journal_is_written(tmp_path: Path) -> None:
    assert all("load_state_dict was called" in said for said in run(2, load_elsewhere, tmp_path / "run.zkj"))


# --------------------------------------------------------------------------------------------------------------- kills


def killed(path: Path, rank: int, forward: int) -> list[Tensor]:
    """A run, or the rest of it, in which a rank is killed in a forward."""
    opt, model = made("mezo-adam", parallel="data")
    left = [forward]

    def closure(batch: Tensor) -> Tensor:
        left[0] -= 1
        if dist.get_rank() == rank and left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return model(batch)

    started = [path.exists()]
    dist.broadcast_object_list(started)
    with (journal.resume if started[0] else journal.write)(opt, own(path)):
        for t in range(opt.counters["steps"], STEPS):
            opt.step(closure, [tokens(2 * t + dist.get_rank())])
    return weights(model)


def killed_and_taken_up(folder: Path, kills: int, seed: int) -> int:
    """How many kills there were, until a run came to its end, which is that of the undisturbed run on both ranks."""
    want = run(2, killed, folder / "whole.zkj", -1, 0)
    draw, path, done = random.Random(seed), folder / "run.zkj", 0
    while done < kills:
        rank = draw.randrange(2)
        found = outcomes(2, killed, path, rank, draw.randrange(6))
        if ended(found):
            path.unlink()  # it had come to its end, and begins anew
            continue
        assert found[rank].code == -signal.SIGKILL
        assert found[1 - rank].error.startswith("RankError: "), found[1 - rank]
        assert found[1 - rank].seconds < 20
        done += 1
        if draw.randrange(3) == 0:  # a rank that is killed in its sleep, again and again
            continue
    for got in run(2, killed, path, -1, 0):
        assert equal(got, want[0])
    assert tools.first_difference(path, folder / "whole.zkj") is None
    return done


def ended(found: list[Outcome]) -> bool:
    return all(one.error == "" for one in found)


def test_a_rank_is_killed_and_all_go_on_from_the_journal(tmp_path: Path) -> None:
    assert killed_and_taken_up(tmp_path, 3, seed=1) == 3


@pytest.mark.faults
def test_ranks_are_killed_twenty_times(tmp_path: Path) -> None:
    for seed in range(5):
        (tmp_path / str(seed)).mkdir()
        assert killed_and_taken_up(tmp_path / str(seed), 4, seed) == 4
