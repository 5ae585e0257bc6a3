"""A run that goes through torch.distributed.checkpoint goes on with the bits of one that did not."""

from __future__ import annotations

import base64
import json
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import zokern
from tests.methods import CASES, METHODS, Case, assert_same_states, build, equal, saved, states, weights
from tests.models import small, tokens
from zokern.optim import carried

PLAIN = StateDictOptions()
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
OFFLOADED = StateDictOptions(cpu_offload=True)
FULL = StateDictOptions(full_state_dict=True)
WAYS = pytest.mark.parametrize("way", [PLAIN, FLAT, OFFLOADED], ids=["plain", "flat", "offloaded"])


def run(model: nn.Module, opt: Any, start: int, stop: int) -> None:
    for step in range(start, stop):
        opt.step(lambda step=step: model(tokens(step)))


def pair(case: Case, **options: Any) -> tuple[nn.Module, Any]:
    model = small()
    return model, build(case, model, **options)


def assert_goes_on(case: Case, model: nn.Module, opt: Any, **options: Any) -> None:
    """As a run of five steps, after the three of which this was made."""
    run(model, opt, 3, 5)
    undisturbed, theirs = pair(case, **options)
    run(undisturbed, theirs, 0, 5)
    assert equal(weights(model), weights(undisturbed))
    assert_same_states(states(opt, model), states(theirs, undisturbed))
    assert opt.counters == theirs.counters
    assert (opt.seed, opt.skipped_steps, opt.flat_steps) == (theirs.seed, theirs.skipped_steps, theirs.flat_steps)
    assert opt.state_dict()["zokern"].keys() == theirs.state_dict()["zokern"].keys()


@CASES
@WAYS
def test_a_run_goes_on(case, way):
    model, opt = pair(case)
    run(model, opt, 0, 3)
    weights_now, state = get_state_dict(model, opt, options=way)
    fresh, other = pair(case, seed=99)
    set_state_dict(fresh, other, model_state_dict=weights_now, optim_state_dict=saved(state), options=way)
    assert_goes_on(case, fresh, other)
    assert_goes_on(case, model, opt)  # whose states were asked for


@CASES
def test_a_run_goes_on_from_files(case, tmp_path):
    model, opt = pair(case)
    run(model, opt, 0, 3)
    save(tmp_path, model, opt, PLAIN)
    fresh, other = pair(case, seed=99)
    restore(tmp_path, fresh, other, PLAIN)
    assert_goes_on(case, fresh, other)


@pytest.mark.parametrize("name", ["mezo", "mezo-adam", "gv-kept"])
def test_a_run_goes_on_from_flattened_files(name, tmp_path):
    model, opt = pair(METHODS[name])
    run(model, opt, 0, 3)
    save(tmp_path, model, opt, FLAT)
    fresh, other = pair(METHODS[name], seed=99)
    restore(tmp_path, fresh, other, FLAT)
    assert_goes_on(METHODS[name], fresh, other)


def save(path: Path, model: nn.Module, opt: Any, way: StateDictOptions) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: one process
        checkpoint.save(dict(zip("wo", get_state_dict(model, opt, options=way), strict=True)), checkpoint_id=path)


def restore(path: Path, model: nn.Module, opt: Any, way: StateDictOptions) -> None:
    """As torch's pages do it: files are read into the state_dicts of a new model and optimizer."""
    both = dict(zip("wo", get_state_dict(model, opt, options=way), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.load(both, checkpoint_id=path)
    set_state_dict(model, opt, model_state_dict=both["w"], optim_state_dict=both["o"], options=way)


@pytest.mark.parametrize("name", [name for name, case in METHODS.items() if case.states])
def test_full_state_dicts_of_methods_with_states(name):
    model, opt = pair(METHODS[name])
    run(model, opt, 0, 3)
    whole = get_optimizer_state_dict(model, opt, options=FULL)
    fresh, other = pair(METHODS[name], seed=99)
    fresh.load_state_dict(model.state_dict())
    set_optimizer_state_dict(fresh, other, whole, options=FULL)
    assert_goes_on(METHODS[name], fresh, other)


def test_full_state_dicts_of_methods_without_go_past_torch_s_functions():
    """torch's own assertion, which SGD meets too. The docs' way out: the dict has no shards, and loads itself."""
    model, opt = pair(METHODS["mezo"])
    run(model, opt, 0, 3)
    whole = get_optimizer_state_dict(model, opt, options=FULL)
    fresh, other = pair(METHODS["mezo"], seed=99)
    fresh.load_state_dict(model.state_dict())
    with pytest.raises(AssertionError, match="device"):
        set_optimizer_state_dict(fresh, other, whole, options=FULL)
    other.load_state_dict(whole)
    assert_goes_on(METHODS["mezo"], fresh, other)


@pytest.mark.parametrize("name", ["mezo", "mezo-adam", "mezo-adamezo", "hizoo"])
@pytest.mark.parametrize("way", [PLAIN, FLAT], ids=["plain", "flat"])
def test_with_layers_left_out(name, way):
    """States that no step has made yet: torch asks for strict=False."""
    options = {"layers": zokern.RandomBlocks(1)}
    model, opt = pair(METHODS[name], **options)
    run(model, opt, 0, 1)
    weights_now, state = get_state_dict(model, opt, options=way)
    fresh, other = pair(METHODS[name], seed=99, **options)
    loose = StateDictOptions(strict=False, flatten_optimizer_state_dict=way is FLAT)
    set_state_dict(fresh, other, model_state_dict=weights_now, optim_state_dict=saved(state), options=loose)
    run(fresh, other, 1, 3)
    assert_goes_on(METHODS[name], fresh, other, **options)


def test_groups():
    def grouped() -> tuple[nn.Module, Any]:
        model = small()
        every = list(model.named_parameters())
        groups = [{"params": every[:5], "lr": 1e-2}, {"params": every[5:], "eps": 1e-2}]
        return model, zokern.MeZO(groups, 1e-3, module=model, update="adam", seed=4)

    model, opt = grouped()
    run(model, opt, 0, 3)
    for way in (PLAIN, FLAT):
        weights_now, state = get_state_dict(model, opt, options=way)
        fresh, other = grouped()
        set_state_dict(fresh, other, model_state_dict=weights_now, optim_state_dict=state, options=way)
        run(fresh, other, 3, 5)
        undisturbed, theirs = grouped()
        run(undisturbed, theirs, 0, 5)
        assert equal(weights(fresh), weights(undisturbed))
        assert [group["lr"] for group in other.param_groups] == [1e-2, 1e-3]


def test_what_is_carried_is_the_entry():
    model, opt = pair(METHODS["mezo-adamezo"])
    run(model, opt, 0, 2)
    state = opt.state_dict()
    entry = carried.entry({"param_groups": state["param_groups"]})
    assert carried.packed(entry) == carried.packed(state["zokern"]) == state["param_groups"][0]["zokern"]
    assert all(group["zokern"] is None for group in opt.param_groups)
    opt.load_state_dict(state)
    assert all(group["zokern"] is None for group in opt.param_groups)


def test_states_of_earlier_versions_have_nothing_there():
    model, opt = pair(METHODS["mezo-adam"])
    run(model, opt, 0, 3)
    state = opt.state_dict()
    del state["param_groups"][0]["zokern"]
    fresh, other = pair(METHODS["mezo-adam"], seed=99)
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(state)
    get_state_dict(fresh, other, options=FLAT)
    assert_goes_on(METHODS["mezo-adam"], fresh, other)


def text(value: Any) -> str:
    return base64.b64encode(zlib.compress(json.dumps(value).encode())).decode()


@pytest.mark.parametrize(
    "hostile",
    [
        7,
        "",
        "no base64",
        base64.b64encode(b"no zlib").decode(),
        text({"seed": 3})[:-8],
        text([1]),
        text({"dtype": "save", "values": 3}),
        text({"dtype": "float64", "values": ["x"]}),
        text({"dtype": "int8", "values": 1 << 70}),
        base64.b64encode(zlib.compress(b"[" * 100_000)).decode(),
        base64.b64encode(zlib.compress(b" " * (carried.LARGEST + 1))).decode(),
        base64.b64encode(zlib.compress(b"{}") + b"more").decode(),
        text({"format": {"dtype": "int64", "values": [2, 2]}}),
    ],
    ids=range(13),
)
def test_what_is_carried_may_come_from_anywhere(hostile):
    model, opt = pair(METHODS["mezo"])
    run(model, opt, 0, 1)
    state, before = opt.state_dict(), weights(model)
    del state["zokern"]
    state["param_groups"][0]["zokern"] = hostile
    with pytest.raises(ValueError, match=r"state_dict: 'zokern'|state_dict has format"):
        opt.load_state_dict(state)
    assert equal(weights(model), before)
    assert opt.counters["steps"] == 1


def test_bytes_behind_what_is_carried_are_refused():
    _, opt = pair(METHODS["mezo"])
    state = opt.state_dict()
    whole = base64.b64decode(state["param_groups"][0]["zokern"])
    del state["zokern"]
    state["param_groups"][0]["zokern"] = base64.b64encode(whole + b"more").decode()
    with pytest.raises(ValueError, match="cannot be read"):
        opt.load_state_dict(state)
    state["param_groups"][0]["zokern"] = base64.b64encode(whole).decode()
    opt.load_state_dict(state)


def test_what_was_dropped_is_told_and_how_to_keep_it():
    model, opt = pair(METHODS["mezo"])
    run(model, opt, 0, 3)
    state = opt.state_dict()
    cut = {"state": state["state"], "param_groups": [{**state["param_groups"][0], "zokern": None}]}
    fresh, other = pair(METHODS["mezo"], seed=99)
    fresh.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=r"save state_dict\(\) as it is"):
        other.load_state_dict(cut)
    other.load_state_dict(saved(state))
    assert_goes_on(METHODS["mezo"], fresh, other)


def test_inside_a_journal(tmp_path):
    """What torch does to ask for states is no step, and the states it has may be set again."""
    model, opt = pair(METHODS["mezo-adam"])
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    get_state_dict(model, opt)  # makes states, all at their first value
    with zokern.journal.write(opt, tmp_path / "run.zkj"):
        get_state_dict(model, opt)
        run(model, opt, 0, 2)
        weights_now, state = get_state_dict(model, opt)
        set_state_dict(model, opt, model_state_dict=weights_now, optim_state_dict=state)
        run(model, opt, 2, 3)
        with pytest.raises(zokern.journal.JournalError):
            set_optimizer_state_dict(model, opt, state)
    again = small()
    with torch.no_grad():
        for name, p in again.named_parameters():
            p.copy_(base[name])
    zokern.journal.replay(tmp_path / "run.zkj", again)
    assert equal(weights(again), weights(model))
