"""The journal of a sharded run: one file, of the whole model's tensors, that replays on any number of ranks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import zokern
from tests.distributed.ranks import run
from tests.distributed.test_shards_fsdp import full, nested, seeing, untied
from tests.methods import METHODS, build, given
from zokern.hashing import hash_of

CASES: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "mezo": ("mezo", torch.float32, {}),
    "exact": ("mezo-adam", torch.bfloat16, {"weight_decay": 0.1}),
    "hizoo": ("hizoo", torch.bfloat16, {"placement": "inplace"}),
    "lezo": ("helene", torch.float32, {"num_dropped": 1}),
}


def made(name: str, *, sharded: bool = True) -> tuple[nn.Module, Any]:
    method, dtype, options = CASES[name]
    model = untied(dtype)
    if sharded:
        nested(model)
    given_options = dict(options)
    if given_options.pop("num_dropped", None):
        given_options["layers"] = zokern.RandomBlocks(1)
    if not sharded:
        given_options["process_group"] = None
    return model, build(METHODS[method], model, **given_options)


def steps(name: str, model: nn.Module, opt: Any, numbers: range) -> None:
    for step in numbers:
        opt.step(seeing(model, step, given(METHODS[CASES[name][0]], step), []))


def recorded(folder: str) -> dict[str, str]:
    """Hashes of the weights at the end, of whole tensors."""
    found = {}
    for name in CASES:
        model, opt = made(name)
        with zokern.journal.write(opt, Path(folder) / name):
            steps(name, model, opt, range(2))
            zokern.journal.mark(opt)
            model(torch.arange(11))
            steps(name, model, opt, range(2, 4))
        found[name] = hash_of((key, full(p)) for key, p in model.named_parameters())
    return found


def replayed(folder: str) -> dict[str, str]:
    found = {}
    for name in CASES:
        model, _ = made(name)
        with torch.no_grad():
            model(torch.arange(11))  # a root that is gathered
        assert zokern.journal.replay(Path(folder) / name, model).verified
        found[name] = hash_of((key, full(p)) for key, p in model.named_parameters())
    return found


def gone_on(folder: str) -> dict[str, list[str]]:
    """Taken up after four steps, and from a checkpoint of two; against a whole run."""
    found = {}
    for name in CASES:
        path = Path(folder) / name
        model, opt = made(name)
        with zokern.journal.resume(opt, path) as done:
            assert done == 4
            steps(name, model, opt, range(4, 6))
        whole, theirs = made(name, sharded=False)
        steps(name, whole, theirs, range(6))
        found[name] = [hash_of((key, full(p)) for key, p in one.named_parameters()) for one in (model, whole)]
    return found


def test_a_journal_of_four_ranks_replays_on_any_number(tmp_path: Path) -> None:
    first, *others = run(4, recorded, str(tmp_path))
    assert all(other == first for other in others)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(CASES)
    for name in CASES:
        model, _ = made(name, sharded=False)
        assert zokern.journal.replay(tmp_path / name, model).verified
        assert hash_of(model.named_parameters()) == first[name]
        again, _ = made(name, sharded=False)
        assert zokern.journal.replay(tmp_path / name, again, until=2).verified
    assert run(3, replayed, str(tmp_path)) == [first] * 3
    for found in run(2, gone_on, str(tmp_path)):
        assert all(mine == whole for mine, whole in found.values())
    whole, _ = made("exact", sharded=False)
    assert zokern.journal.replay(tmp_path / "exact", whole) == 6


def refused(folder: str) -> list[str]:
    told = []
    model, opt = made("mezo")
    for path in (Path(folder) / "there", Path(folder) / "no" / "folder"):
        with pytest.raises(zokern.journal.JournalError) as error, zokern.journal.write(opt, path):
            raise AssertionError
        told.append(str(error.value))
    with pytest.raises(zokern.journal.JournalError) as error:
        zokern.journal.replay(Path(folder) / "missing", model)
    told.append(str(error.value))
    steps("mezo", model, opt, range(1))
    return told


def another_run(folder: str) -> list[tuple[str, float]]:
    """What each way to take a run up says where one rank has another seed, and after how many seconds."""
    path, told = Path(folder) / "mezo", []
    model, opt = made("mezo")
    with zokern.journal.write(opt, path):
        steps("mezo", model, opt, range(2))
    ways: dict[str, Any] = {"resume": zokern.journal.resume, "append": zokern.journal.append}
    for name, way in ways.items():
        _, opt = made("mezo")
        opt.seed += dist.get_rank() == 1
        began = time.monotonic()
        with pytest.raises((zokern.journal.JournalError, zokern.RankError)) as error, way(opt, path):
            raise AssertionError(name)
        told.append((str(error.value), time.monotonic() - began))
    return told


def not_begun(folder: str) -> tuple[str, float]:
    """What journal.write says where one rank has updates that wait, and after how many seconds."""
    _, opt = made("mezo")
    if dist.get_rank() == 1:
        opt.count_waiting = lambda: 1
    began = time.monotonic()
    with pytest.raises(zokern.journal.JournalError) as error, zokern.journal.write(opt, Path(folder) / "mezo"):
        raise AssertionError
    return str(error.value), time.monotonic() - began


def test_a_rank_that_cannot_begin_is_heard_while_shards_would_be_gathered(tmp_path: Path) -> None:
    for rank, (said, seconds) in enumerate(run(2, not_begun, str(tmp_path))):
        assert "updates of 1 steps wait" in said
        assert ("rank 1 raised" in said) == (rank == 0)
        assert seconds < 20
    assert not (tmp_path / "mezo").exists()


def test_a_rank_of_another_run_is_heard_while_shards_would_be_gathered(tmp_path: Path) -> None:
    for rank, told in enumerate(run(2, another_run, str(tmp_path))):
        for said, seconds in told:
            assert "seed is " in said
            assert ("rank 1 raised" in said) == (rank == 0)
            assert seconds < 20


def test_what_the_first_rank_cannot_write_or_read_is_refused_on_all(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"something")
    for told in run(2, refused, str(tmp_path)):
        assert "there exists; give another name" in told[0]
        assert "cannot be written" in told[1]
        assert "cannot be read" in told[2]
