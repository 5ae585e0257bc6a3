"""Runs that are taken up with other parameters than they began with, or where the journal has more than steps."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zokern
from tests.fuzz import records
from tests.fuzz.targets import Blocks
from tests.journal.test_journal import same, weights
from zokern import journal
from zokern.journal import format as journal_format

X = torch.ones(2, 3)


def test_a_hash_from_before_a_group_came_is_of_the_weights_that_were_there(tmp_path: Path) -> None:
    """The run is killed after it; it goes on as the message advises, and is verified where the hash is."""
    path, base = tmp_path / "a.zkj", nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))

    def session(*, first: bool = False, second: str = "", changed: bool = False) -> list[torch.Tensor]:
        model = copy.deepcopy(base)
        optimizer = zokern.MeZO(list(model[0].parameters()), 1e-2)
        late = {"params": list(model[1].parameters())}
        if second == "before":
            optimizer.add_param_group(late)
        with journal.write(optimizer, path) if first else journal.resume(optimizer, path):
            optimizer.step(lambda: model(X).square().mean())
            if changed:
                model[0].bias.data.add_(1)
            if second == "inside":
                optimizer.add_param_group(late)
                optimizer.step(lambda: model(X).square().mean())
                shutil.copy(path, tmp_path / "killed.zkj")
        return weights(model)

    def replayed(until: int, names: int = 4) -> list[torch.Tensor]:
        some = {f"parameter {i}": p for i, p in enumerate(weights(base)[:names])}
        assert journal.replay(path, some, until=until).verified
        return list(some.values())

    ended = session(first=True)
    assert same(replayed(1, names=2), ended[:2])
    with pytest.raises(journal.JournalError, match="the weights after 1 steps are not those that training had"):
        replayed(1)  # nothing tells whether they belong to it
    session(second="inside")
    (tmp_path / "killed.zkj").replace(path)  # as it was when the run was killed: its last hash is of one group
    reader = journal.Reader(path)
    assert [step.number for step in reader.steps()] == [0, 1, 2]
    assert [mark.done for mark in reader.marks] == [1]
    assert same(replayed(1), ended)
    ended = session(second="before")
    assert same(replayed(4), ended)
    path.unlink()
    session(first=True, changed=True)
    with pytest.raises(journal.JournalError, match=r"the weights after 1 steps are not those that training had$"):
        replayed(1, names=2)
    with pytest.raises(journal.JournalError, match="after 1 steps are not those that training had: something else"):
        session(second="before")


class Grown(nn.Module):
    """A layer; `beside`, or `before` it in the order of the names, one parameter more, which shifts the layer's ids."""

    def __init__(self, *, before: bool = False, beside: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        with torch.no_grad():
            for p in self.layer.parameters():
                p.copy_(torch.arange(p.numel()).reshape(p.shape) / 8.0)
        if before:
            self.a = nn.Parameter(torch.zeros(3), requires_grad=False)
        if beside:
            self.scale = nn.Parameter(torch.ones(()))

    def forward(self) -> torch.Tensor:
        return (self.layer(X) * getattr(self, "scale", 1.0)).square().mean()


def test_a_tensor_that_gets_another_id_is_replayed_with_its_own_noise(tmp_path: Path) -> None:
    """Passes before and after are not one chain: the noise of a tensor is that of its id."""
    path = tmp_path / "run.zkj"
    model = Grown()
    run = zokern.MeZO(model, 1e-2)
    with journal.write(run, path):
        run.step(model)
        there = path.read_bytes()
    path.write_bytes(there)  # as it was when the run was killed: without a hash that would refuse another model
    model = Grown(before=True)
    run = zokern.MeZO(model, 1e-2)
    with journal.resume(run, path):
        run.step(model)
        there = path.read_bytes()
    path.write_bytes(there)
    again = Grown(before=True)
    with journal.resume(zokern.MeZO(again, 1e-2), path):
        assert same(weights(again), weights(model))


def test_a_model_with_more_weights_than_the_run_had_is_not_verified(tmp_path: Path) -> None:
    """It may compute something else."""
    path, model = tmp_path / "run.zkj", Grown()
    run = zokern.MeZO(model, 1e-2)
    with journal.write(run, path):
        run.step(model)
    said = "the weights after 1 steps are not those that training had"
    for do in (journal.replay, lambda path, other: journal.resume(zokern.MeZO(other, 1e-2), path).__enter__()):
        with pytest.raises(journal.JournalError, match=said):
            do(path, Grown(beside=True))


@pytest.mark.parametrize("steps", [0, 1])
def test_a_group_that_comes_before_the_first_step(steps: int, tmp_path: Path) -> None:
    """It is not in the hash of what the run started from, which is of those that were there when the journal began."""
    path, model = tmp_path / "run.zkj", nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    base = copy.deepcopy(model)

    def begin(of: nn.Sequential) -> zokern.MeZO:
        return zokern.MeZO(list(of[0].parameters()), 1e-2)

    def later(of: nn.Sequential) -> dict[str, Any]:
        return {"params": list(of[1].parameters())}

    run = begin(model)
    with journal.write(run, path):
        for _ in range(steps):
            journal.mark(run)
            run.add_param_group(later(model))
            run.step(lambda: model(X).square().mean())
    given = {f"parameter {i}": p for i, p in enumerate(weights(base) if steps else weights(base[0]))}
    assert journal.replay(path, {k: v.clone() for k, v in given.items()}, until=0).verified
    assert journal.replay(path, given).verified
    assert same(list(given.values()), weights(model)[: len(given)])
    resumed = begin(base)
    if steps:
        resumed.add_param_group(later(base))
    with journal.resume(resumed, path) as done:
        assert done == steps
    assert same(weights(base), weights(model))


def test_a_tensor_that_is_frozen_when_the_journal_begins(tmp_path: Path) -> None:
    """The hash of what the run started from has it; what is trained then has not."""
    path, model = tmp_path / "run.zkj", nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    given = {f"parameter {i}": p for i, p in enumerate(weights(model))}
    model[0].bias.requires_grad_(False)
    run = zokern.MeZO(list(model[0].parameters()), 1e-2)
    with journal.write(run, path):
        model[0].bias.requires_grad_(True)
        run.step(lambda: model(X).square().mean())
        run.add_param_group({"params": list(model[1].parameters())})
        run.step(lambda: model(X).square().mean())
    assert journal.replay(path, given).verified
    assert same(list(given.values()), weights(model))


def test_what_stands_between_the_last_step_and_a_hash_is_read_where_a_run_goes_on_there(tmp_path: Path) -> None:
    """A run is killed after the signature of a step; it is taken up, and left, there; its checkpoint goes on there."""
    path, model = tmp_path / "run.zkj", nn.Linear(3, 4)
    base = copy.deepcopy(model)

    def step(run: zokern.MeZO, of: nn.Linear) -> None:
        run.step(lambda: of(X).square().mean())

    run = zokern.MeZO(list(model.parameters()), 1e-2)
    with journal.write(run, path):
        step(run, model)
    text, bodies, version = records.take_apart(path.read_bytes())
    (signature,) = [body for body in bodies if body[0] == journal_format.SIGNATURE]
    other = json.dumps({**json.loads(signature[1:]), "groups": 3, "numbers": json.loads(signature[1:])["numbers"] + 2})
    bodies = [*bodies[:-1], signature[:1] + other.encode()]  # of a step that it did not come to
    path.write_bytes(records.build(text, bodies, version))
    model = copy.deepcopy(base)
    run = zokern.MeZO(list(model.parameters()), 1e-2)
    with journal.resume(run, path) as done:
        assert done == 1
    extra = nn.Parameter(torch.ones(2))
    with journal.append(run, path):
        step(run, model)
        run.add_param_group({"params": [extra]})
        step(run, model)
    given = {f"parameter {i}": p for i, p in enumerate([*weights(base), torch.ones(2)])}
    assert journal.replay(path, given).verified
    assert same(list(given.values()), [*weights(model), extra.detach()])


@pytest.mark.parametrize("way", ["resume", "append"])
def test_a_run_is_taken_up_while_many_directions_wait(way: str, tmp_path: Path) -> None:
    """More of a step than are ever searched for: the journal itself says which seeds they have."""
    path, base = tmp_path / "run.zkj", Blocks()

    def optimizer(model: Blocks) -> zokern.MeZO:
        many = {"distribution": "lowrank:1", "placement": "forward", "fold_every": 3, "num_samples": 70}
        return zokern.MeZO(model, 1e-3, **many)

    model = copy.deepcopy(base)
    run = optimizer(model)
    with journal.write(run, path):
        run.step(model)
        run.step(model)
        state, bare, there = copy.deepcopy(run.state_dict()), weights(model), path.read_bytes()
        for _ in range(3):
            run.step(model)
    path.write_bytes(there)  # as it was when the run was killed
    again = copy.deepcopy(base)
    other = optimizer(again)
    if way == "append":
        with torch.no_grad():
            for p, saved in zip(again.parameters(), bare, strict=True):
                p.copy_(saved)
        other.load_state_dict(state)
    with getattr(journal, way)(other, path):
        for _ in range(3):
            other.step(again)
    assert same(weights(again), weights(model))
    assert journal.replay(path, base, fold=False).verified
    assert same(weights(base), weights(model))
