"""What users change between steps, and closures within one, is noticed: nothing is used once it is stale."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests.models import Net
from zokern import backends, journal, sweep
from zokern.graphs.live import DeviceNumbers
from zokern.placement import InPlace

PLACEMENTS = pytest.mark.parametrize("placement", ["inplace", "shadow", "stream"])
TOKENS = torch.zeros(2, 5, dtype=torch.int64)


def loss_of(model: nn.Module) -> Tensor:
    return model(TOKENS).square().mean()


def fresh(**options: Any) -> tuple[Net, zokern.MeZO]:
    torch.manual_seed(3)
    model = Net()
    return model, zokern.MeZO(model, 1e-3, **options)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_whoever_drives_an_optimizer_may_call_step_once_more() -> None:
    model, opt = fresh()
    loss = opt.step(lambda: loss_of(model))
    before = copy.deepcopy(model)
    opt.step_done = True
    assert opt.step() is loss
    assert same(model, before)
    with pytest.raises(TypeError, match="step needs a closure"):
        opt.step()
    assert opt.counters["steps"] == 1


# ----------------------------------------------------------------------------------------- a closure that moves weights


def test_weights_that_a_closure_moves_are_followed() -> None:
    """.to() and back, say: the memory that they had is free, and a pass must not write there."""
    model, opt = fresh(placement="inplace")
    other, theirs = fresh(placement="inplace")
    taken: list[Tensor] = []

    def moving() -> Tensor:
        loss = loss_of(model)
        for p in model.parameters():
            p.data = p.data.clone()
        gc.collect()
        taken.extend(torch.full_like(p, 7.0) for p in model.parameters())
        return loss

    for _ in range(3):
        opt.step(moving)
        theirs.step(lambda: loss_of(other))
    assert same(model, other)
    assert all(bool((t == 7.0).all()) for t in taken)


def test_weights_that_come_back_are_found_again() -> None:
    """Away in the first forward of a step and back in the second: later steps go to where they are."""
    weight = nn.Parameter(torch.ones(50))
    home, away = weight.data, torch.ones(50)
    opt = zokern.MeZO([weight], 1e-2, one_sided=True, placement="inplace")
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls <= 2:
            weight.data = away if calls == 1 else home
        return weight.detach().square().sum()

    opt.step(closure)
    before, left = home.clone(), away.clone()
    opt.step(closure)
    assert not torch.equal(home, before)
    assert torch.equal(away, left)


@pytest.mark.parametrize("placement", ["shadow", "stream"])
def test_copies_that_a_closure_moves_are_made_again(placement: str) -> None:
    torch.manual_seed(3)
    model, first = Net(), True
    for name, p in model.named_parameters():
        p.requires_grad_(name == "head.weight")
    opt = zokern.MeZO(model, 1e-3, placement=placement)

    def closure() -> Tensor:
        nonlocal first
        loss = loss_of(model)
        if first:
            model.head.weight.data = model.head.weight.data.clone()
        first = False
        return loss

    opt.step(closure)
    for _ in range(2):
        opt.step(closure)
        assert opt.metrics["projected_gradient"] != 0.0


# ------------------------------------------------------------------------------------------------- settings that change


def test_another_backend_from_the_environment_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, opt = fresh()
    opt.step(lambda: loss_of(model))
    monkeypatch.setenv(backends.ENVIRONMENT, "nonsense")
    with pytest.raises(ValueError, match="ZOKERN_BACKEND is 'nonsense'"):
        opt.step(lambda: loss_of(model))


def test_another_floor_is_used() -> None:
    found = []
    for change in (False, True):
        torch.manual_seed(3)
        model = Net()
        opt = zokern.HELENE(model, 1e-3, floor=5.0 if change else 1.0)
        opt.step(lambda model=model: loss_of(model))
        opt.floor = 1.0
        before = copy.deepcopy(model)
        opt.step(lambda model=model: loss_of(model))
        found.append([a - b for a, b in zip(model.parameters(), before.parameters(), strict=True)])
    assert not torch.equal(found[0][0], torch.zeros_like(found[0][0]))
    assert opt.floor == 1.0
    assert {key for _, key in opt.active.rows} == {1.0}
    with pytest.raises(ValueError, match="floor is -1"):
        opt.floor = -1


def test_layers_that_are_taken_away_are_left_out_no_longer() -> None:
    torch.manual_seed(3)
    model = Net()
    opt = zokern.LeZO(model, 1e-3, num_dropped=3)
    opt.step(lambda: loss_of(model))
    few = len(opt.active.sweep)
    opt.layers = None
    opt.step(lambda: loss_of(model))
    assert len(opt.active.sweep) > few


# ---------------------------------------------------------------------------------------------------- inside of a step


@PLACEMENTS
def test_a_load_inside_a_step_is_refused(placement: str) -> None:
    model, opt = fresh(placement=placement, update="adam")
    opt.step(lambda: loss_of(model))
    saved, before = opt.state_dict(), copy.deepcopy(model)

    def closure() -> Tensor:
        opt.load_state_dict(saved)
        return loss_of(model)

    with pytest.raises(RuntimeError, match="load_state_dict was called inside a step"):
        opt.step(closure)
    if placement != "inplace":
        assert same(model, before)
    opt.step(lambda: loss_of(model))


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_a_journal_tells_of_what_a_step_moved(before: bool, pipelined: bool, tmp_path: Path) -> None:
    """A closure freezes a parameter, which the step under way moves all the same; perhaps another was frozen before it."""
    model, opt = fresh(placement="shadow", pipelined=pipelined)
    base = copy.deepcopy(model)

    def freezing() -> Tensor:
        model.head.weight.requires_grad_(False)
        return loss_of(model)

    with journal.write(opt, tmp_path / "run.zkj"):
        opt.step(lambda: loss_of(model))
        if before:
            next(model.parameters()).requires_grad_(False)
        opt.step(freezing)
        opt.step(lambda: loss_of(model))
    journal.replay(tmp_path / "run.zkj", base)
    assert same(model, base)


def step_whose_restore_fails(model: nn.Module, opt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pass works once the closure has been called."""
    original, failing = sweep.run, False

    def run(*args: Any) -> int:
        if failing:
            raise TimeoutError
        return original(*args)

    def closure() -> Tensor:
        nonlocal failing
        failing = True
        return loss_of(model)

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "run", run)
        with pytest.raises(TimeoutError):
            opt.step(closure)


@pytest.mark.parametrize("assign", [False, True])
def test_a_restore_that_fails_is_not_believed_later(assign: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads clean weights afterwards steps from these. assign: as `p.data = other`, which torch does not count."""
    model, opt = fresh(placement="inplace")
    clean = copy.deepcopy(model.state_dict())
    step_whose_restore_fails(model, opt, monkeypatch)
    if assign:
        for name, p in model.named_parameters():
            p.data = clean[name]
    else:
        model.load_state_dict(clean)
    other, theirs = fresh(placement="inplace")
    opt.step(lambda: loss_of(model))
    theirs.step(lambda: loss_of(other))
    assert same(model, other)


@pytest.mark.parametrize("assign", [False, True])
def test_one_weight_that_is_loaded_leaves_the_others_to_be_restored(
    assign: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, opt = fresh(placement="inplace", eps=0.1)
    clean = copy.deepcopy(model.state_dict())
    opt.param_groups[0]["lr"] = 0.0
    step_whose_restore_fails(model, opt, monkeypatch)
    assert all((p - clean[name]).abs().max() > 0.01 for name, p in model.named_parameters())
    if assign:
        model.head.bias.data = clean["head.bias"] + 1.0
    else:
        with torch.no_grad():
            model.head.bias.copy_(clean["head.bias"] + 1.0)
    opt.step(lambda: loss_of(model))
    clean["head.bias"] += 1.0
    for name, p in model.named_parameters():
        assert (p - clean[name]).abs().max() < 1e-6, name


# ------------------------------------------------------------------------------------------------------ what is refused


def test_a_tensor_without_memory_is_refused() -> None:
    def added(t: Tensor) -> Tensor:
        u = t.clone()
        zokern.add_noise_([u], tensor_ids=[0], seeds=[3], coefs=[1.0])
        return u

    with pytest.raises((ValueError, RuntimeError), match=r"without memory|functional"):
        torch.func.functionalize(added)(torch.zeros(5))


@pytest.mark.parametrize("cls", [zokern.MeZO, partial(zokern.LeZO, num_dropped=2), partial(zokern.MeZO, update="adam")])
@PLACEMENTS
def test_weights_that_become_float64_are_refused_by_name_until_they_are_back(cls: Any, placement: str) -> None:
    def run(between: bool) -> nn.Module:
        torch.manual_seed(3)
        model = Net()
        opt = cls(model, lr=1e-3, seed=4, placement=placement)
        opt.step(lambda: loss_of(model))
        if between:
            model.double()
            before = copy.deepcopy(model)
            with pytest.raises(TypeError, match=r"embedding\.weight is \(11, 24\) float64.*or convert them"):
                opt.step(lambda: loss_of(model))
            assert same(model, before)
            assert opt.counters["steps"] == 1
            model.float()
        opt.step(lambda: loss_of(model))
        return model

    assert same(run(between=True), run(between=False))


def test_a_placement_serves_one_optimizer() -> None:
    own = InPlace()
    _, opt = fresh(placement=own)
    with pytest.raises(ValueError, match="in use by another optimizer already; make one for each"):
        fresh(placement=own)
    assert opt.placement == "inplace"


def test_two_parameters_of_one_name_are_refused() -> None:
    pairs = [("w", nn.Parameter(torch.ones(3))), ("w", nn.Parameter(torch.ones(3)))]
    with pytest.raises(ValueError, match="two parameters are called 'w'"):
        zokern.MeZO(pairs, 1e-3)


# ---------------------------------------------------------------------------------------------------- what is held, how


def test_ones_that_a_captured_pass_reads_stay() -> None:
    """An eager step between two launches of a graph has its own, on the host."""
    _, opt = fresh(placement="shadow")
    eps = torch.ones(1, dtype=torch.float64)
    placement = opt._placement
    device = torch.device("meta")
    placement.begin(sweep.NOTHING, eps.to(device), scaled=False)
    captured = placement.still
    placement.begin(sweep.NOTHING, eps, scaled=False)
    assert placement.still is not captured
    placement.begin(sweep.NOTHING, eps.to(device), scaled=False)
    assert placement.still is captured
    assert DeviceNumbers(0, 1, 0, torch.device("cpu")).rates([(0, None)])[0].shape == (1,)


def test_pieces_of_a_sweep_do_not_pile_up() -> None:
    model, opt = fresh(placement="stream")
    step: Callable[[], object] = lambda: opt.step(lambda: loss_of(model))  # noqa: E731
    step()
    few = len(opt.active.sweep._pieces)
    for i in range(20):
        model.add_module("more", nn.Identity()) if i % 2 else delattr(model, "more") if hasattr(model, "more") else None
        step()
    assert len(opt.active.sweep._pieces) <= few
