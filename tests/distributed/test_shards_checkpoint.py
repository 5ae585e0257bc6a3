"""States are shards as their weights are, so that torch.distributed.checkpoint saves, loads and cuts them anew."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from tests.distributed.ranks import build_alone, run
from tests.distributed.test_shards_fsdp import full, nested, same, seeing, untied
from tests.methods import METHODS, given, play
from zokern import parts

NAMES = ["mezo", "mezo-adamezo", "hizoo", "helene"]
WAYS = {"plain": StateDictOptions(), "flat": StateDictOptions(flatten_optimizer_state_dict=True)}


def steps(name: str, opt: Any, model: nn.Module, numbers: range) -> None:
    for step in numbers:
        opt.step(seeing(model, step, given(METHODS[name], step), []))


def both(model: nn.Module, opt: Any, way: str) -> dict[str, Any]:
    return dict(zip("wo", get_state_dict(model, opt, options=WAYS[way]), strict=True))


def save(folder: str, way: str) -> list[bool]:
    found = []
    for name in NAMES:
        model = untied(torch.bfloat16)
        nested(model)
        opt = build_alone(METHODS[name], model)
        steps(name, opt, model, range(3))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint.save(both(model, opt, way), checkpoint_id=Path(folder) / name)
        found += [
            parts.is_dtensor(t) and (t.device_mesh, t.placements) == (p.device_mesh, p.placements)
            for p, states in opt.state.items() for t in states.values()
        ]  # fmt: skip
    return found


def go_on(folder: str, way: str) -> list[str]:
    found = []
    for name in NAMES:
        model, other = untied(torch.bfloat16), untied(torch.bfloat16)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        nested(model)
        opt, theirs = build_alone(METHODS[name], model, seed=99), build_alone(METHODS[name], other)
        read = both(model, opt, way)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint.load(read, checkpoint_id=Path(folder) / name)
        set_state_dict(model, opt, model_state_dict=read["w"], optim_state_dict=read["o"], options=WAYS[way])
        steps(name, opt, model, range(3, 5))
        steps(name, theirs, other, range(5))
        if not same(model, other):
            found.append(f"{name}: weights")
        for (key, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
            mine, wanted = opt.state.get(p, {}), theirs.state.get(q, {})
            if mine.keys() != wanted.keys() or not all(torch.equal(full(mine[one]), wanted[one]) for one in mine):
                found.append(f"{name}: states of {key}")
    return found


@pytest.mark.parametrize("way", list(WAYS))
def test_a_run_goes_on_with_another_number_of_ranks(way: str, tmp_path: Path) -> None:
    for found in run(2, save, str(tmp_path), way):
        assert len(found) == 14 * 3
        assert all(found)
    assert run(3, go_on, str(tmp_path), way) == [[]] * 3


def whole_states() -> list[bool]:
    """A whole run's state_dict into shards, and that of shards into a whole model."""
    case = METHODS["mezo-adam"]
    model, other, third = untied(torch.float32), untied(torch.float32), untied(torch.float32)
    nested(model)
    opt, theirs, last = build_alone(case, model), build_alone(case, other), build_alone(case, third)
    play(case, theirs, range(2))
    opt.load_state_dict(theirs.state_dict())
    play(case, opt, range(2, 3))
    last.load_state_dict(opt.state_dict())
    play(case, theirs, range(2, 3))
    pairs = [(opt.state[p], theirs.state[q], last.state[r]) for p, q, r in
             zip(model.parameters(), other.parameters(), third.parameters(), strict=True)]  # fmt: skip
    return [torch.equal(full(a[one]), b[one]) and torch.equal(b[one], c[one]) for a, b, c in pairs for one in "mv"]


def test_states_of_whole_tensors_and_of_shards_load_into_each_other() -> None:
    for found in run(2, whole_states):
        assert len(found) == 14 * 2
        assert all(found)


def wrong_states() -> list[str]:
    """On one rank alone: all refuse."""
    case = METHODS["mezo-adam"]
    model = untied(torch.float32)
    nested(model)
    opt = build_alone(case, model)
    play(case, opt, range(1))
    state = opt.state_dict()
    local = parts.local(state["state"][0]["v"])
    if torch.distributed.get_rank() == 1:
        local[0, 0] = float("nan")
    before = [parts.local(p).clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="not finite") as error:
        opt.load_state_dict(state)
    assert all(map(torch.equal, before, map(parts.local, model.parameters())))
    return [str(error.value)]


def test_what_is_wrong_on_one_rank_is_refused_on_all() -> None:
    first, second = run(2, wrong_states)
    assert first == second
    assert "v of embedding.weight" in first[0]
