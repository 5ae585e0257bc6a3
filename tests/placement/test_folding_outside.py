"""While updates wait: what users do to the module from outside loses none of them, and adds none twice, in silence."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import zokern
from tests.models import small, tokens
from tests.placement.test_folding import built, run, same_bits, saved, weights_of
from zokern import journal
from zokern.placement import plus
from zokern.placement.base import RefusedModule

WAITS = r"was changed .* 3 steps wait"


def test_a_loaded_run_has_folded_copies() -> None:
    model, loaded = small(), small()
    opt = built(model)
    run(model, opt, 0, 6)
    other = built(loaded)
    other.load_state_dict(saved(opt))
    loaded.load_state_dict(weights_of(model), strict=False)
    assert same_bits(dict(loaded.state_dict()), dict(model.state_dict()))


def test_a_resumed_run_has_folded_copies(tmp_path: Path) -> None:
    model, twin = small(), small()
    opt, other = built(model), built(twin)
    with journal.write(opt, tmp_path / "a"):
        run(model, opt, 0, 6)
    with journal.resume(other, tmp_path / "a"):
        assert same_bits(dict(twin.state_dict()), dict(model.state_dict()))


def test_a_state_dict_counts_nothing() -> None:
    model = small()
    opt = built(model)
    run(model, opt, 0, 3)
    counters = opt.counters
    assert opt.state_dict()["zokern"]["counters"] == counters
    model.state_dict()
    assert opt.counters == counters


@pytest.mark.parametrize("look", ["fold", "folded", "module", "optimizer"])
def test_folded_copies_put_into_the_module_are_told(look: str) -> None:
    """They have what waits, and it would be added again."""
    model = small()
    opt = built(model)
    run(model, opt, 0, 3)
    model.load_state_dict(model.state_dict())
    looks: dict[str, Callable[[], object]] = {
        "fold": opt.fold,
        "folded": lambda: opt.folded().__enter__(),
        "module": model.state_dict,
        "optimizer": opt.state_dict,
    }
    with pytest.warns(zokern.ZokernWarning, match=WAITS):
        looks[look]()


def test_a_run_is_taken_back_in_any_order() -> None:
    """Also where somebody has asked for the module's state_dict() before its weights are loaded."""
    model = small()
    opt = built(model)
    run(model, opt, 0, 6)
    state, folded = saved(opt), {name: value.clone() for name, value in model.state_dict().items()}
    first = run(model, opt, 6, 7)
    opt.load_state_dict(state)
    model.state_dict()
    assert opt.pending == 2
    model.load_state_dict(folded)
    assert same_bits(dict(model.state_dict()), folded)
    assert run(model, opt, 6, 7) == pytest.approx(first, abs=1e-6)
    assert opt.pending == 1
    model.load_state_dict({name: value + 1 for name, value in folded.items()})
    opt.load_state_dict(state)
    with pytest.raises(ValueError, match="neither"):
        opt.fold()


def test_parameters_that_are_gone_are_named() -> None:
    model = small()
    opt = built(model)
    run(model, opt, 0, 3)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    before = weights_of(model)
    with pytest.raises(
        RuntimeError, match=r"embedding\.weight is not in the module any more, and the updates of 3 steps"
    ):
        opt.fold()
    assert same_bits(before, weights_of(model))
    assert opt.pending == 3


def test_an_optimizer_that_is_gone_leaves_no_hooks_to_the_next() -> None:
    model = small()
    for _ in range(3):
        opt = built(model)
        run(model, opt, 0, 3)
        del opt
        gc.collect()
    assert {len(m._state_dict_hooks) for m in model.modules() if m._parameters} == {1}
    opt = built(model)
    run(model, opt, 0, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that one's are not lost
        model.state_dict()


def test_folded_updates_are_not_lost_with_the_optimizer() -> None:
    model = small()
    opt = built(model)
    run(model, opt, 0, 3)
    opt.fold()
    del opt
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.state_dict()


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("placement", "fold_every"), [("forward", 4), ("forward", 1), ("shadow", 1), ("inplace", 1)])
def test_numbers_of_passes_are_float32_whatever_the_default_is(
    default: torch.dtype, placement: str, fold_every: int
) -> None:
    """A pass reads them by address: of another type it would read others, and beyond their end."""
    losses, given = [], [tokens(t) for t in range(4)]
    for now in (torch.float32, default):
        model = small()
        opt = zokern.MeZO(model, lr=0.01, eps=0.03, seed=5, placement=placement, fold_every=fold_every,
                          distribution="lowrank:2", weight_decay=0.3)  # fmt: skip
        torch.set_default_dtype(now)
        try:
            losses.append([float(opt.step(lambda x=x, model=model: model(x))) for x in given])
        finally:
            torch.set_default_dtype(torch.float32)
    assert losses[0] == losses[1]


def test_a_look_that_is_refused_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    opt = built(model)
    run(model, opt, 0, 3)
    monkeypatch.setattr("zokern.placement.forward.freezing", lambda: True)
    with pytest.raises(RefusedModule), opt.folded():
        pass
    monkeypatch.undo()
    monkeypatch.setattr(plus, "TRACED", [False])  # no other test's compiler has looked at stand-ins
    assert opt._placement.proves
    assert opt._placement.fold is None
    with pytest.raises(RuntimeError, match="computed with none"):
        opt.step(lambda: torch.zeros(()) + tokens(0).sum())


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(("fold_every", "dtype"), [(1, torch.float32), (8, torch.float32), (8, torch.bfloat16)])
def test_a_check_says_what_waiting_takes(fold_every: int, samples: int, dtype: torch.dtype) -> None:
    model = nn.Sequential(*(nn.Linear(96, 64, bias=False), nn.Linear(64, 96, bias=False))).to(dtype)
    opt = built(model, fold_every, num_samples=samples)
    x = torch.ones(2, 96, dtype=dtype)
    said = zokern.check(opt, lambda: model(x).float().square().mean()).cost.memory["forward"]
    for _ in range(9):
        opt.step(lambda: model(x).float().square().mean())
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in opt._placement.memory()}
    assert said == pytest.approx(sum(kept.values()), rel=0.02)


@pytest.mark.parametrize("keep_vars", [False, True])
def test_parts_of_the_module_are_saved_inside_folded_too(keep_vars: bool) -> None:
    """What is saved there is whole, and of use afterwards."""
    model = small()
    opt = built(model)
    run(model, opt, 0, 3)
    wanted = dict(model.layers.state_dict(keep_vars=keep_vars))
    with opt.folded():
        found = dict(model.layers.state_dict(keep_vars=keep_vars))
    assert {type(value) for value in found.values()} == {nn.Parameter if keep_vars else torch.Tensor}
    assert same_bits(wanted, found)
