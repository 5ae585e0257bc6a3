"""placement="stream": whatever happens, no weight is left dirty."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests import methods
from tests.methods import METHODS
from tests.models import BLOCKS, Toy, seeded, toy
from tests.pairs import pairs
from tests.placement.streaming import DTYPES, Recurrent, State, same


class Stop(Exception):
    pass


PLACES = ["pre-hook", "inner pre-hook", "forward", "inner hook", "hook", "hook of the root", "closure"]


@pytest.mark.parametrize(
    ("place", "number", "error", "call"),
    pairs(PLACES, [0, 2, BLOCKS - 1], [Stop, KeyboardInterrupt, SystemExit], [0, 3]),
)
def test_an_exception_anywhere_leaves_clean_weights(place, number, error, call):
    model, left = toy(torch.bfloat16), [call]
    layer, armed = model.layers[number], [True]

    def fail(*_: Any) -> None:
        if armed and left[0] == 0:
            raise error("from the test")
        left[0] -= 1

    original = layer.forward

    def forward(x: Tensor) -> Tensor:
        y = original(x)
        fail()
        return y

    {
        "pre-hook": lambda: layer.register_forward_pre_hook(fail),
        "inner pre-hook": lambda: layer.inner.register_forward_pre_hook(fail),
        "forward": lambda: setattr(layer, "forward", forward),
        "inner hook": lambda: layer.inner.register_forward_hook(fail),
        "hook": lambda: layer.register_forward_hook(fail),
        "hook of the root": lambda: model.register_forward_hook(fail),
        "closure": lambda: None,
    }[place]()
    state = State(model)
    opt = methods.build(METHODS["mezo"], model, placement="stream", seed=7)
    with pytest.raises(error, match="from the test"):
        opt.step(lambda: (model(), fail() if place == "closure" else None)[0])
    state.clean()
    armed.clear()
    twin = toy(torch.bfloat16)
    fresh = methods.build(METHODS["mezo"], twin, placement="shadow", seed=7)
    for o, m in ((opt, model), (fresh, twin)):  # and the next step is as if nothing had been
        o.step(m)
    assert same(model, twin)


TRACED = tuple(str(Path(zokern.__file__).parent / name) for name in ("optim", "placement", "sweep.py"))


def step_with_signal_at(line: int, model: nn.Module, opt: Any) -> int:
    """One step with Ctrl-C as zokern starts its line number `line`, the hooks' lines included; the lines there were."""
    count, last = 0, ("", 0)

    def tracer(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count, last
        if not frame.f_code.co_filename.startswith(TRACED):
            return None
        here = (frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and here != last:
            count += 1
            last = here
            if count == line:
                signal.raise_signal(signal.SIGINT)
        return tracer

    sys.settrace(tracer)
    try:
        opt.step(model)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return count


def test_ctrl_c_at_many_lines_of_a_step():
    """Every eleventh, the hooks included, which run while Ctrl-C is let through."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    model = toy(torch.bfloat16)
    state = State(model)

    def made() -> Any:
        return zokern.MeZO(model, 1e-2, placement="stream", weight_decay=0.1)

    total = step_with_signal_at(-1, model, made())
    after = State(model).values
    assert total > 500
    outcomes = set()
    for line in range(1, total + 1, 11):
        for (_, _, p), value in zip(state.entries, state.values, strict=True):
            p.data.copy_(value)
        opt = made()
        step_with_signal_at(line, model, opt)
        state.in_place()
        now = State(model).values
        done = all(torch.equal(a, b) for a, b in zip(now, after, strict=True))
        outcomes.add(done)
        assert opt.counters["steps"] == done, line
        if not done:
            state.clean()
    signal.signal(signal.SIGINT, old)
    assert outcomes == {True, False}


@pytest.mark.parametrize("inside", [False, True], ids=["in the closure", "in a block"])
def test_state_dict_inside_the_closure_is_of_the_weights(inside):
    model = toy(torch.bfloat16)
    clean = {k: v.clone() for k, v in model.state_dict().items()}
    files = []

    def save(*_: Any) -> None:
        state = model.state_dict()
        assert list(state) == list(clean)
        assert all(torch.equal(state[k], clean[k]) for k in clean)
        wrapped = nn.ModuleDict({"inner": model}).state_dict()
        assert all(torch.equal(wrapped[f"inner.{k}"], clean[k]) for k in clean)
        assert model.state_dict(keep_vars=True)["head.weight"] is parameter
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        files.append(file)

    parameter = model.head.weight
    if inside:
        model.layers[1].register_forward_hook(save)

    def closure() -> Tensor:
        first = model()
        if not inside:
            save()
        second = model()
        assert torch.equal(first, second)
        assert not torch.equal(first, base)
        return second

    with torch.no_grad():
        base = model()
    files.clear()
    zokern.MeZO(model, 0.0, eps=1e-2, placement="stream").step(closure)
    assert len(files) == (4 if inside else 2)
    for file in files:
        file.seek(0)
        loaded = torch.load(file)
        assert all(torch.equal(loaded[k], clean[k]) for k in clean)


@pytest.mark.parametrize("name", ["shadow", "stream"])
def test_a_failed_state_dict_that_the_closure_swallows_is_an_error(name):
    """The module would show clean weights to the rest of the closure."""
    model = toy()
    state = State(model)

    def broken(*_: Any) -> None:
        raise Stop("from a hook")

    handle = model.norm.register_state_dict_post_hook(broken)

    def closure() -> Tensor:
        try:
            model.state_dict()
        except Stop:
            return model()
        raise AssertionError

    with pytest.raises(RuntimeError, match=r"state_dict\(\) asked for inside the closure failed"):
        zokern.MeZO(model, 1e-2, placement=name).step(closure)
    handle.remove()
    state.clean()


def test_a_copy_of_the_module_inside_the_closure_is_refused():
    model = toy()
    state = State(model)
    with pytest.raises(RuntimeError, match=r"layers\.0\.gain was used outside"):
        zokern.MeZO(model, 1e-2, placement="stream").step(lambda: copy.deepcopy(model)())
    state.clean()


def test_nothing_is_left_behind():
    """After steps the module is its own: entries, storages, hooks; it can be copied and pickled."""
    model = seeded(lambda: Toy(Recurrent), torch.float32)
    state = State(model)
    opt = methods.build(METHODS["hizoo"], model, placement="stream")
    for _ in range(3):
        opt.step(model)
        state.in_place()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(model, other)
        with torch.no_grad():
            assert torch.equal(model(), other())


def test_an_earlier_failure_kept_alive_does_not_look_like_a_view():
    """A traceback holds the frames of a block's forward and what they computed from its weights."""
    model, kept = toy(), []
    layer = model.layers[1]
    original = layer.forward

    def forward(x: Tensor) -> Tensor:
        view = layer.inner.weight.t()
        raise Stop(view)

    layer.forward = forward
    opt = zokern.MeZO(model, 1e-2, placement="stream")
    for attempt in range(2):
        try:
            opt.step(model)
        except Stop as error:
            kept.append(error)
        assert len(kept) == attempt + 1
    layer.forward = original
    opt.step(model)
    assert opt.counters["steps"] == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_100_steps_with_lr_zero_change_no_bit(dtype):
    """test_shadow.py has those in copies."""
    model = toy(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.flatten()[0] = -0.0
    state = State(model)
    opt = zokern.MeZO(model, 0.0, placement="stream", weight_decay=0.1)

    values = itertools.count()

    def closure() -> float:
        model()
        return 1.0 + next(values) % 3

    for _ in range(100):
        opt.step(closure)
    state.clean()
