"""torch.compile and placement="stream" or "shadow"."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests.models import Toy, toy
from tests.pairs import pairs
from tests.placement.streaming import State, compiled_inside, compiled_whole, same
from zokern.placement.shadow import Shadow


def compiled_method(model: Toy) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_block(model: Toy) -> nn.Module:
    model.layers[1] = torch.compile(model.layers[1], backend="eager")
    return model


@pytest.mark.parametrize("how", [compiled_whole, compiled_method, compiled_block, compiled_inside])
def test_a_compiled_module_is_refused(how):
    name = {"compiled_inside": r"layers\.2\.inner", "compiled_block": r"layers\.1|no nn\.ModuleList"}
    with pytest.raises(ValueError, match=name.get(how.__name__, "the module, compiled by torch.compile")):
        zokern.MeZO(how(toy()), 1e-3, placement="stream")
    assert isinstance(zokern.MeZO(how(toy(torch.bfloat16)), 1e-3)._placement, Shadow)


@pytest.mark.parametrize("method", [zokern.MeZO, zokern.HiZOO])
def test_an_export_inside_the_closure_is_refused(method):
    """It runs the module, with its hooks, while a compiler looks on."""
    model = toy()
    state, opt = State(model), method(model, 1e-3, placement="stream")
    with pytest.raises(RuntimeError, match=r"cannot run under torch\.compile; use placement='shadow'"):
        opt.step(lambda: torch.export.export(model, ()).module()())
    state.clean()
    assert torch.isfinite(opt.step(model))


def test_a_module_compiled_after_the_optimizer_was_made_is_refused():
    model = toy()
    opt = zokern.MeZO(model, 1e-3, placement="stream")
    model.layers[1].compile(backend="eager")
    state = State(model)
    with pytest.raises(ValueError, match=r"layers\.1, compiled"):
        opt.step(model)
    state.clean()


@pytest.mark.parametrize(
    ("how", "name", "warm"), pairs(["wrapper", "function", "forwards of blocks"], ["shadow", "stream"], [False, True])
)
def test_compiled_around_a_plain_module(name, how, warm):
    """The optimizer has the plain module and the closure calls something compiled: the forward sees the copies."""
    model, twin = toy(), toy()
    torch._dynamo.reset()
    if how == "wrapper":
        called: Callable[[], Tensor] = torch.compile(model, backend="eager")
    elif how == "function":
        called = torch.compile(lambda: model(), backend="eager")
    else:
        for layer in model.layers:
            layer.forward = torch.compile(layer.forward, backend="eager")
        called = model
    with torch.no_grad():
        if warm:
            called()
        seen: list[list[float]] = [[], []]
        runs = ((model, called, name), (twin, twin, "shadow"))
        for (m, f, which), losses in zip(runs, seen, strict=True):
            opt = zokern.MeZO(m, 1e-2, eps=1e-2, placement=which)
            for _ in range(2):
                opt.step(lambda f=f, losses=losses: (losses.append(float(out := f())), out)[1])
    assert seen[0] == seen[1]
    assert same(model, twin)
    torch._dynamo.reset()


@pytest.mark.parametrize("how", [compiled_whole, compiled_method, compiled_block, compiled_inside])
def test_shadow_is_seen_by_a_compiled_module(how):
    torch._dynamo.reset()
    model, twin = how(toy()), toy()
    with torch.no_grad():
        model()  # compiled before the copies are there
    seen: list[list[float]] = [[], []]
    for m, losses in zip((model, twin), seen, strict=True):
        opt = zokern.MeZO(m, 1e-2, eps=1e-2, placement="shadow")
        for _ in range(2):
            opt.step(lambda m=m, losses=losses: (losses.append(float(out := m())), out)[1])
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 4
    torch._dynamo.reset()
