"""What MeZO saves, and what of it another run takes or refuses."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import zokern
from tests.methods import saved, scripted
from tests.models import all_bits, linear, same_bits, sentences, transformer
from tests.optim.scripts import script


def make(model: nn.Module, tensor_lr: bool = False, **options: Any):
    lr = torch.tensor(3e-3) if tensor_lr else 3e-3
    opt = zokern.MeZO(model, lr, weight_decay=0.1, num_samples=2, **{"seed": 21, **options})
    return opt, torch.optim.lr_scheduler.CosineAnnealingLR(opt, 7)


@pytest.mark.parametrize(
    ("placement", "dtype", "tensor_lr"),
    [("inplace", torch.float32, False), ("shadow", torch.float32, True), ("shadow", torch.bfloat16, False)],
    ids=str,
)
def test_continue_equals_the_uninterrupted_run(placement, dtype, tensor_lr):
    def train(model, opt, schedule, steps):
        for t in steps:
            batch = sentences(t)
            opt.step(lambda batch=batch: model(batch))
            schedule.step()

    whole = transformer(dtype)
    opt, schedule = make(whole, tensor_lr, placement=placement)
    train(whole, opt, schedule, range(4))

    half = transformer(dtype)
    opt2, schedule2 = make(half, tensor_lr, placement=placement)
    train(half, opt2, schedule2, range(2))
    state = saved({"model": half.state_dict(), "opt": opt2.state_dict(), "schedule": schedule2.state_dict()})

    again = transformer(dtype, seed=9)  # other weights, another seed, other hyper-parameters: all come from the state
    again.load_state_dict(state["model"])
    opt3, schedule3 = make(again, tensor_lr, placement=placement, seed=0)
    opt3.param_groups[0]["weight_decay"] = 7.0
    opt3.load_state_dict(state["opt"])
    schedule3.load_state_dict(state["schedule"])
    train(again, opt3, schedule3, range(2, 4))
    assert same_bits(all_bits(whole), all_bits(again))
    assert opt3.counters == opt.counters
    assert opt3.seed == 21
    assert saved(opt3.state_dict()).keys() == saved(opt.state_dict()).keys()


def test_state_has_ids_names_and_no_arrays():
    model = transformer()
    model.norm.requires_grad_(False)
    opt = zokern.MeZO(model, 1e-3)
    opt.step(lambda: 1.0)
    own = opt.state_dict()["zokern"]
    names = [n for n, _ in model.named_parameters()]
    trainable = [i for i, n in enumerate(names) if n not in ("norm.weight", "norm.bias")]
    assert own["tensor_ids"] == [trainable]
    assert own["names"] == [[names[i] for i in trainable]]
    assert own["contract"] == "zk1"
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    assert len(buffer.getvalue()) < 20_000


def test_ids_travel_in_the_state():
    """A state of a module's optimizer continues with the same noise in one that was made from a plain list."""
    whole, part = transformer(), transformer()
    for model in (whole, part):
        model.embedding.requires_grad_(False)
    a = zokern.MeZO(whole, 1e-2, seed=1)
    b = zokern.MeZO([p for p in part.parameters() if p.requires_grad], 1e-2, seed=1)
    b.load_state_dict(a.state_dict())
    losses = script(2, 1)
    for opt in (a, b):
        closure = scripted(losses)
        for _ in range(2):
            opt.step(closure)
    assert same_bits(all_bits(whole), all_bits(part))


def test_ids_stay_unique_after_loading():
    """A parameter added after a state was loaded must not share the noise of one that is there."""
    model = transformer()
    model.embedding.requires_grad_(False)
    state = zokern.MeZO(model, 1e-2).state_dict()
    opt = zokern.MeZO([p for p in model.parameters() if p.requires_grad], 1e-2)
    opt.load_state_dict(state)
    opt.add_param_group({"params": [nn.Parameter(torch.zeros(17))]})
    ids = [i for group in opt.state_dict()["zokern"]["tensor_ids"] for i in group]
    assert len(set(ids)) == len(ids)


def test_unusable_states_are_refused_and_change_nothing():
    def small(**options):
        return zokern.MeZO(linear(4, 3, 2), 1e-3, **{"seed": 5, **options})

    opt = small()
    opt.step(scripted([1.0, 2.0]))
    good = opt.state_dict()

    def changed(**own):
        return {**good, "zokern": {**good["zokern"], **own}}

    plain = torch.optim.SGD(linear(4, 3, 2).parameters(), 1e-3).state_dict()
    three = zokern.MeZO(list(linear(4, 3, 2).parameters())[:3], 1e-3).state_dict()
    lezo = zokern.LeZO(transformer(), 1e-3, num_dropped=1).state_dict()
    cases = [
        (small(), plain, "zokern"),
        (small(), changed(contract="zk2"), "contract"),
        (small(), changed(format=99), "format"),
        (small(), changed(method="HiZOO"), "HiZOO"),
        (small(num_samples=2), good, "num_samples"),
        (small(distribution="rademacher"), good, "distribution"),
        (small(rounding="stochastic"), good, "rounding"),
        (small(), three, "parameters"),
        (zokern.MeZO(transformer(), 1e-3, seed=5), lezo, "LeZO"),
    ]
    for target, state, word in cases:
        hyper = [{k: v for k, v in g.items() if k != "params"} for g in target.param_groups]
        with pytest.raises(ValueError, match=word):
            target.load_state_dict(state)
        assert target.seed == 5
        assert target.counters["steps"] == 0
        assert [{k: v for k, v in g.items() if k != "params"} for g in target.param_groups] == hyper
    target = small(seed=6)
    target.load_state_dict(good)
    assert (target.seed, target.counters["steps"]) == (5, 1)


def test_a_state_of_other_layers_is_refused():
    """Which blocks a step leaves out is part of the method: continuing with another number is another run."""
    state = zokern.MeZO(transformer(), 1e-3, layers=zokern.RandomBlocks(1)).state_dict()
    for layers in (None, zokern.RandomBlocks(2)):
        with pytest.raises(ValueError, match=r"layers|num_dropped"):
            zokern.MeZO(transformer(), 1e-3, layers=layers).load_state_dict(state)


def test_skips_are_saved():
    model = linear(4, 3)
    opt = zokern.MeZO(model, 1e-3)
    with pytest.warns(zokern.ZokernWarning):
        opt.step(lambda: math.nan)
    other = zokern.MeZO(model, 1e-3)
    other.load_state_dict(saved(opt.state_dict()))
    assert other.skipped_steps == 1


def test_a_state_of_other_parameters_is_refused():
    state = zokern.MeZO(nn.ModuleDict({"a": nn.Linear(3, 3)}), 1e-3).state_dict()
    with pytest.raises(ValueError, match=r"'a\.weight' where this module has 'b\.weight'"):
        zokern.MeZO(nn.ModuleDict({"b": nn.Linear(3, 3)}), 1e-3).load_state_dict(state)


def test_copying_the_optimizer_whole_is_refused():
    opt = zokern.MeZO(linear(4, 3), 1e-3)
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"state_dict\(\)"):
            attempt(opt)
