"""Updates that wait: forwards see them, one pass adds them, and nothing that is saved or loaded has them twice."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests.models import Toy, small, tokens
from tests.optim.test_batched import batch, each, reader
from zokern import journal
from zokern.contract.streams import ROUNDING_STREAM, derive_seed
from zokern.journal import format as records
from zokern.journal import tools
from zokern.placement import pending
from zokern.placement.plus import PlusLowRank

EPS, LR, SEED = 0.03, 0.01, 5
HALVES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def built(model: nn.Module, fold_every: int = 4, **options: Any) -> zokern.MeZO:
    given = {"distribution": "lowrank:2", "weight_decay": 0.3, "num_samples": 2, **options}
    return zokern.MeZO(model, lr=LR, eps=EPS, seed=SEED, placement="forward", fold_every=fold_every, **given)


def run(model: nn.Module, opt: Any, first: int, last: int) -> list[float]:
    return [float(opt.step(lambda t=t: model(tokens(t)))) for t in range(first, last)]


def given_losses(model: nn.Module, opt: Any, step: int, change: float = 1.0) -> None:
    """A step whose probes have losses that do not depend on the weights; the forwards are run all the same. change: NaN
    makes it one that is skipped."""
    losses = iter([change * math.sin(3 * step + k) for k in range(opt.forwards())])

    def closure() -> Tensor:
        model(tokens(step))
        return torch.tensor(next(losses), dtype=torch.float64)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a loss was not finite")
        opt.step(closure)


def coefs_of(step: int, change: float = 1.0) -> list[float]:
    """-lr c_k of each sample of such a step, in float64."""
    losses = [change * math.sin(3 * step + k) for k in range(4)]
    return [-LR * (losses[2 * k] - losses[2 * k + 1]) / 2 / EPS / 2 for k in range(2)]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def saved(opt: Any) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def terms(steps: range) -> tuple[list[int], Tensor, float]:
    """Seeds, coefficients and decay of a window, from the formula."""
    decay = float(torch.tensor(1.0 - LR * 0.3, dtype=torch.float64).float())
    seeds = [derive_seed(SEED, t, k) for t in steps for k in range(2)]
    each = [float(torch.tensor(c).float()) * decay ** (steps[-1] - t) for t in steps for c in coefs_of(t)]
    return seeds, torch.tensor(each, dtype=torch.float64), decay ** len(steps)


def added(model: nn.Module, steps: range, opt: Any, rounding: str) -> None:
    """What waits after these steps, by the public pass."""
    seeds, coefs, decay = terms(steps)
    params = list(model.parameters())
    with torch.no_grad():
        zokern.add_noise_(
            params, tensor_ids=opt.state_dict()["zokern"]["tensor_ids"][0], seeds=seeds, coefs=coefs.float(),
            decay=decay, distribution="lowrank:2", rounding=rounding,
            rounding_seed=derive_seed(SEED, steps[-1], ROUNDING_STREAM) if rounding == "stochastic" else None,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- one fold


@HALVES
def test_a_window_is_one_pass_with_its_own_bits(dtype: torch.dtype) -> None:
    model, by_hand = small(dtype), small(dtype)
    opt = built(model)
    rounding = "nearest" if dtype == torch.float32 else "stochastic"
    for window in (range(4), range(4, 8)):
        for t in window:
            before, passes = weights_of(model), opt.counters["passes"]
            given_losses(model, opt, t)
            assert opt.pending == (t + 1) % 4
            if opt.pending:
                assert same_bits(before, weights_of(model))
                assert opt.counters["passes"] == passes
        assert opt.counters["passes"] == passes + 1
        added(by_hand, window, opt, rounding)
        assert same_bits(weights_of(model), weights_of(by_hand))


def test_a_window_is_the_sum_of_its_steps() -> None:
    model, start = small(), small()
    opt = built(model)
    for t in range(4):
        given_losses(model, opt, t)
    seeds, coefs, decay = terms(range(4))
    ids = opt.state_dict()["zokern"]["tensor_ids"][0]
    for p, w, tensor_id in zip(model.parameters(), start.parameters(), ids, strict=True):
        total = decay * w.detach().double()
        for seed, c in zip(seeds, coefs, strict=True):
            z = torch.zeros_like(w)
            zokern.add_noise_([z], tensor_ids=[tensor_id], seeds=[seed], coefs=[1.0], distribution="lowrank:2")
            total += c * z.double()
        assert torch.allclose(p.double(), total, rtol=0, atol=1e-6)


@pytest.mark.parametrize("wd", [0.0, 0.3])
@HALVES
def test_forwards_see_what_waits(dtype: torch.dtype, wd: float) -> None:
    """Also at the weights themselves, where a one-sided probe looks."""
    model = small(dtype)
    opt, seen = built(model, weight_decay=wd, one_sided=True), []
    for t in range(3):
        given_losses(model, opt, t)
    whole = small(dtype)
    whole.load_state_dict(model.state_dict())
    opt.step(lambda: seen.append(model(tokens(9)).item()) or model(tokens(9)))
    close = 1e-6 if dtype == torch.float32 else 3e-2
    assert abs(seen[0] - whole(tokens(9)).item()) < close
    assert abs(seen[0] - model(tokens(9)).item()) > 3 * close


def test_directions_keep_their_places() -> None:
    """Of one sample, what a probe has filled in is not filled in again for the steps that follow."""
    filled: list[int] = []
    model = small()
    opt = built(model, num_samples=1)
    run(model, opt, 0, 1)
    (places,) = opt._placement.factors.values()
    fill = places.fill
    places.fill = lambda seeds, first=0: (filled.append(len(seeds)), fill(seeds, first))[1]
    run(model, opt, 1, 4)
    assert filled == [1, 1, 1]
    assert len(places.held) == 4


def test_every_plain_method_waits() -> None:
    for cls, options in (
        (zokern.FZOO, {"candidates": 3}), (zokern.ES, {"num_directions": 3, "antithetic": True, "maximize": False}),
        (zokern.MeZOGV, {"candidates": 3, "keep_best": True}), (zokern.MeZOGreedy, {"candidates": 3}),
    ):  # fmt: skip
        waits, plain = small(), small()
        given = {"lr": 1e-3, "eps": EPS, "distribution": "lowrank:1", "placement": "forward", **options}
        opt, other = cls(waits, fold_every=3, **given), cls(plain, **given)
        run(waits, opt, 0, 3)
        run(plain, other, 0, 3)
        for p, q in zip(waits.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=0, atol=2e-5), cls


def test_groups_have_their_own_rows() -> None:
    models = [small(), small()]
    opts = []
    for model, fold_every in zip(models, (2, 1), strict=True):
        *rest, last = model.parameters()
        groups = [{"params": rest}, {"params": [last], "lr": 0.02, "weight_decay": 0.5}]
        opts.append(zokern.MeZO(groups, lr=LR, eps=EPS, distribution="lowrank:1", placement="forward",
                                module=model, fold_every=fold_every))  # fmt: skip
    for t in range(2):
        for model, opt in zip(models, opts, strict=True):
            given_losses(model, opt, t)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- skips and errors


def test_skipped_steps_count_and_add_nothing() -> None:
    model, other = small(), small()
    opt = built(model)
    for t in range(4):
        given_losses(model, opt, t, math.nan if t in (1, 3) else 1.0)
    assert opt.counters["passes"] == 1
    assert opt.pending == 0
    assert opt.skipped_steps == 2
    decay = float(torch.tensor(1.0 - LR * 0.3, dtype=torch.float64).float())
    coefs = [float(torch.tensor(c).float()) for c in coefs_of(0)], [float(torch.tensor(c).float()) for c in coefs_of(2)]
    seeds = [derive_seed(SEED, t, k) for t in range(4) for k in range(2)]
    every = [*(c * decay for c in coefs[0]), 0.0, 0.0, *coefs[1], 0.0, 0.0]
    ids = opt.state_dict()["zokern"]["tensor_ids"][0]
    with torch.no_grad():
        zokern.add_noise_(list(other.parameters()), tensor_ids=ids, seeds=seeds, coefs=every, decay=decay**2,
                          distribution="lowrank:2")  # fmt: skip
    assert same_bits(weights_of(model), weights_of(other))


def test_a_window_of_skipped_steps_moves_nothing() -> None:
    model = small()
    opt, before = built(model, 2), weights_of(model)
    for t in range(2):
        given_losses(model, opt, t, math.nan)
    assert same_bits(before, weights_of(model))
    assert opt.pending == 0


def test_a_step_that_breaks_off_leaves_what_waits() -> None:
    model = small()
    opt = built(model)
    run(model, opt, 0, 2)
    before = opt._placement.pending
    calls = iter(range(9))

    def closure() -> Tensor:
        if next(calls) == 2:
            raise KeyError("of the closure")
        return model(tokens(2))

    with pytest.raises(KeyError):
        opt.step(closure)
    assert opt._placement.pending is before
    assert opt.counters["steps"] == 2
    twin = small()
    other = built(twin)
    run(twin, other, 0, 4)
    run(model, opt, 2, 4)
    assert same_bits(weights_of(model), weights_of(twin))


def test_a_fold_that_breaks_off_is_done_or_was_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    opt = built(model)
    run(model, opt, 0, 3)
    before, waits = weights_of(model), opt._placement.pending
    monkeypatch.setattr(opt._passes, "run", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        opt.fold()
    with pytest.raises(MemoryError):
        run(model, opt, 3, 4)
    assert same_bits(before, weights_of(model))
    assert opt._placement.pending is waits
    assert opt.counters["steps"] == 3


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"placement": "shadow"}, "placement='shadow' shows no updates that wait"),
        ({"placement": "auto"}, "placement='inplace' shows no"),
        ({"update": "momentum"}, "update='sgd'"),
        ({"update": "sign"}, "cannot wait"),
        ({"layers": zokern.RandomBlocks(1)}, "layers moves other blocks"),
        ({"fold_every": -1}, "fold_every is -1"),
    ],
)
def test_what_cannot_wait_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        zokern.MeZO(small(), lr=LR, **{"distribution": "lowrank:1", "placement": "forward", "fold_every": 4, **options})


def test_other_parameters_are_refused_while_updates_wait() -> None:
    model = small()
    opt = built(model)
    run(model, opt, 0, 2)
    model.norm.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"call opt\.fold\(\) before"):
        run(model, opt, 2, 3)
    assert opt.fold() == 2
    run(model, opt, 2, 3)


def test_a_graphed_step_says_why_not() -> None:
    assert "fold_every=4" in str(built(small()).why_not_graphed())


# ---------------------------------------------------------------------------------------------------------- fold by hand


@HALVES
def test_fold_by_hand(dtype: torch.dtype) -> None:
    model, by_hand = small(dtype), small(dtype)
    opt = built(model, 0)
    for t in range(5):
        given_losses(model, opt, t)
    assert opt.counters["passes"] == 0
    copies = copy.deepcopy(model.state_dict())
    assert opt.fold() == 5
    added(by_hand, range(5), opt, "nearest" if dtype == torch.float32 else "stochastic")
    assert same_bits(weights_of(model), weights_of(by_hand))
    assert same_bits(copies, model.state_dict())
    assert opt.fold() == 0
    assert opt.counters["passes"] == 1
    assert opt.pending == 0


def test_folding_inside_a_step_is_refused() -> None:
    model = small()
    opt = built(model)
    run(model, opt, 0, 1)
    with pytest.raises(RuntimeError, match="fold was called inside a step"):
        opt.step(lambda: opt.fold() or model(tokens(1)))
    with pytest.raises(RuntimeError, match=r"check was called inside folded\(\)"), opt.folded():
        zokern.check(opt, lambda: model(tokens(1)))
    with pytest.raises(RuntimeError, match="step was called inside a folded"), opt.folded():
        run(model, opt, 1, 2)
    assert opt.pending == 1


def test_fold_every_1_never_waits() -> None:
    model = small()
    opt = built(model, 1)
    run(model, opt, 0, 1)
    assert opt.pending == 0
    assert opt.fold() == 0
    assert "pending" not in opt.state_dict()["zokern"]
    with opt.folded():
        assert isinstance(model.head.weight, nn.Parameter)
        assert type(model.head.weight) is nn.Parameter


# ------------------------------------------------------------------------------------------------------- looking at them


@HALVES
def test_folded_shows_the_weights_and_changes_nothing(dtype: torch.dtype) -> None:
    model = small(dtype)
    opt = built(model)
    run(model, opt, 0, 3)
    before, state, plain = weights_of(model), model.state_dict(), model(tokens(9)).item()
    whole = small(dtype)
    whole.load_state_dict(state)
    with opt.folded():
        inside = model(tokens(9)).item()
        values = {name: p.data.clone() for name, p in model.named_parameters()}
        again = model.state_dict()
    close = 1e-6 if dtype == torch.float32 else 3e-2
    assert abs(inside - whole(tokens(9)).item()) < close < abs(inside - plain)
    assert same_bits(values, {name: state[name] for name in values})
    assert same_bits(again, state)
    assert same_bits(before, weights_of(model))
    assert model(tokens(9)).item() == plain
    assert opt.pending == 3
    assert opt._placement.copied == {}  # a look makes no copies of later steps
    twin = small(dtype)
    other = built(twin)
    assert run(twin, other, 0, 6)[3:] == run(model, opt, 3, 6)


def test_state_dict_changes_nothing_and_ties_stay() -> None:
    model, twin = small(), small()
    opt, other = built(model), built(twin)
    run(model, opt, 0, 3)
    before = weights_of(model)
    state = model.state_dict()
    assert state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr() != model.head.weight.data_ptr()
    assert same_bits(model.layers.state_dict(prefix="layers."), {k: v for k, v in state.items() if k[:6] == "layers"})
    assert same_bits(before, weights_of(model))
    run(twin, other, 0, 5)
    run(model, opt, 3, 5)
    assert same_bits(weights_of(model), weights_of(twin))
    opt.fold()
    assert model.state_dict(keep_vars=True)["norm.weight"] is model.norm.weight


def test_modules_are_copied_and_pickled_without_what_waits() -> None:
    model = small()
    opt = built(model)
    run(model, opt, 0, 3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(weights_of(other), weights_of(model))
        assert torch.equal(other.state_dict()["norm.weight"], model.norm.weight)
        assert not torch.equal(model.state_dict()["norm.weight"], model.norm.weight)
    del opt
    gc.collect()
    with pytest.warns(zokern.ZokernWarning, match=r"lacks the updates of 3 steps.*embedding\.weight"):
        assert model.state_dict(keep_vars=True)["norm.weight"] is model.norm.weight
    model.state_dict()  # told once


def test_a_changed_weight_is_told_once() -> None:
    model = small()
    opt = built(model)
    run(model, opt, 0, 2)
    with torch.no_grad():
        model.layers[1].inner.weight.mul_(1.5)
    with pytest.warns(zokern.ZokernWarning, match=r"layers\.1\.inner\.weight was changed .* 2 steps wait"):
        run(model, opt, 2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, opt, 3, 6)


# -------------------------------------------------------------------------------------------------------- taken up again


@HALVES
@pytest.mark.parametrize("through", ["dict", "text"])
def test_a_run_goes_on_in_the_middle_of_a_window(dtype: torch.dtype, through: str) -> None:
    model, twin = small(dtype), small(dtype)
    opt, other = built(model), built(twin)
    run(model, opt, 0, 6)
    state, weights = saved(opt), weights_of(model)
    assert state["zokern"]["format"] == 3  # so that who does not know of it refuses it
    if through == "text":  # as torch.distributed.checkpoint leaves it
        del state["zokern"]
    other.load_state_dict(state)
    twin.load_state_dict(weights, strict=False)
    assert other.pending == 2
    assert run(twin, other, 6, 9) == run(model, opt, 6, 9)
    assert same_bits(weights_of(model), weights_of(twin))


@HALVES
def test_folded_weights_get_nothing_twice(dtype: torch.dtype) -> None:
    model, twin = small(dtype), small(dtype)
    opt, other = built(model), built(twin)
    run(model, opt, 0, 6)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(saved(opt))
    opt.fold()
    assert run(model, opt, 6, 9) == run(twin, other, 6, 9)
    assert same_bits(weights_of(model), weights_of(twin))
    assert opt.pending == other.pending == 1


def test_other_weights_are_refused_until_they_fit() -> None:
    model, twin = small(), small()
    opt, other = built(model), built(twin)
    run(model, opt, 0, 6)
    other.load_state_dict(saved(opt))
    before = weights_of(twin)
    with pytest.raises(ValueError, match="2 steps that wait, and the weights are neither"):
        run(twin, other, 6, 7)
    with pytest.raises(ValueError, match="neither"):
        other.fold()
    assert same_bits(before, weights_of(twin))
    assert torch.equal(twin.state_dict()["norm.weight"], twin.norm.weight)
    assert saved(other)["zokern"]["pending"]["seeds"] == saved(opt)["zokern"]["pending"]["seeds"]
    twin.load_state_dict(weights_of(model), strict=False)
    assert run(twin, other, 6, 8) == run(model, opt, 6, 8)


def damaged(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    model = small()
    opt = built(model)
    run(model, opt, 0, 2)
    state = opt.state_dict()
    change(state["zokern"]["pending"])
    return state


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda p: p.pop("coefs"), "pending has no 'coefs'"),
        (lambda p: p["seeds"].append(-1), r"seeds\[4\]"),
        (lambda p: p["seeds"].append(7), "coefs has shape"),
        (lambda p: p.update(coefs=p["coefs"].float()), "finite float64"),
        (lambda p: p["decay"].fill_(math.nan), "finite float64"),
        (lambda p: p.update(weights="x"), "no hash"),
        (lambda p: p["members"].append([3]), "no pair"),
        (lambda p: p.update(steps=0), "steps is 0"),
    ],
)
def test_a_damaged_state_is_refused(change: Callable[[dict[str, Any]], Any], match: str) -> None:
    opt = built(small())
    with pytest.raises((ValueError, TypeError), match=match):
        opt.load_state_dict(damaged(change))
    assert opt.pending == 0


def test_other_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="fold_every is 4 in state_dict and 1 here"):
        built(small(), 1).load_state_dict(damaged(lambda p: None))


# --------------------------------------------------------------------------------------------------------------- journals


@HALVES
def test_a_journal_is_replayed_and_taken_up(dtype: torch.dtype, tmp_path: Path) -> None:
    path, model = tmp_path / "run.zkj", small(dtype)
    opt = built(model)
    with journal.write(opt, path):
        for t in range(6):
            given_losses(model, opt, t, math.nan if t == 5 else 1.0)
        journal.mark(opt)
        here = journal.hash_of(model.named_parameters())
        assert opt.fold() == 2
        for t in range(6, 11):
            given_losses(model, opt, t)
    assert opt.pending == 3
    reader = journal.Reader(path)
    assert reader.header["features"] == ["lowrank", "fold"]
    for until in (6, None):
        base = small(dtype)
        assert journal.replay(path, base, until=until, fold=False).verified
        assert journal.hash_of(base.named_parameters()) == (here if until else reader_hash(path))
    twin = small(dtype)
    other = built(twin)
    with journal.resume(other, path) as done:
        assert (done, other.pending) == (11, 3)
        assert run(model, opt, 11, 14) == run(twin, other, 11, 14)
    assert same_bits(weights_of(model), weights_of(twin))
    with pytest.warns(zokern.ZokernWarning, match=r"the last 2 of 14 steps\) are not"):  # neither was asked for
        journal.replay(path, small(dtype))
    tuned = small(dtype)
    assert journal.replay(path, tuned, fold=True).verified
    assert opt.pending == 2
    opt.fold()
    assert same_bits(weights_of(tuned), weights_of(model))
    assert tools.summary(path)["folds"] == 1


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("folded", [True, False])
@HALVES
def test_a_journal_is_written_on_from_a_checkpoint(
    dtype: torch.dtype, folded: bool, marked: bool, tmp_path: Path
) -> None:
    """In the middle of a window, of a run that was folded by hand afterwards. From folded copies: with a fold there, once;
    from the weights without what waits: bit for bit."""
    path, model = tmp_path / "run.zkj", small(dtype)
    opt = built(model)
    with journal.write(opt, path):
        run(model, opt, 0, 6)
        if marked:
            journal.mark(opt)
        state, weights = saved(opt), copy.deepcopy(dict(model.state_dict() if folded else model.named_parameters()))
        opt.fold()
    whole, twin = small(dtype), small(dtype)
    run(whole, built(whole), 0, 9)
    other = built(twin)
    other.load_state_dict(state)
    twin.load_state_dict(weights, strict=False)
    with journal.append(other, path):
        run(twin, other, 6, 9)
    assert other.arrived() is None
    base = small(dtype)
    assert journal.replay(path, base, fold=False).verified
    assert same_bits(weights_of(base), weights_of(twin))
    assert tools.summary(path)["folds"] == int(folded)
    assert folded or same_bits(weights_of(twin), weights_of(whole))
    with journal.append(other, path):  # from here, and the fold is not told again
        run(twin, other, 9, 10)
    assert tools.summary(path)["folds"] == int(folded)


@pytest.mark.parametrize("folded", [True, False])
def test_a_journal_is_not_written_on_from_others(folded: bool, tmp_path: Path) -> None:
    """Folded copies of another run, and the same weights to which other updates wait to be added."""
    path, model, twin = tmp_path / "run.zkj", small(), small()
    opt, other = built(model), built(twin)
    with journal.write(opt, path):
        run(model, opt, 0, 6)
    run(twin, other, 0, 5)
    given_losses(twin, other, 5)
    third = small()
    again = built(third)
    again.load_state_dict(saved(other))
    third.load_state_dict(twin.state_dict() if folded else weights_of(twin), strict=False)
    before = path.read_bytes()
    with pytest.raises(journal.JournalError, match="not those that the run had after 6"), journal.append(again, path):
        pass
    assert path.read_bytes() == before


def reader_hash(path: Path) -> str:
    reader = journal.Reader(path)
    list(reader.steps())
    return reader.marks[-1].hash


def test_a_journal_begins_and_loads_with_nothing_waiting(tmp_path: Path) -> None:
    model = small()
    opt = built(model)
    run(model, opt, 0, 2)
    with pytest.raises(journal.JournalError, match=r"call opt\.fold\(\) first"), journal.write(opt, tmp_path / "a"):
        pass
    opt.fold()
    with journal.write(opt, tmp_path / "b"):
        run(model, opt, 2, 3)
        state = opt.state_dict()
        opt.load_state_dict(state)
        state["zokern"]["pending"]["coefs"][0, 0] += 1
        with pytest.raises(journal.JournalError, match="while a journal is written"):
            opt.load_state_dict(state)


def test_a_fold_needs_the_feature(tmp_path: Path) -> None:
    """A reader of before refuses such a journal by the feature's name; one without it has no such records."""
    path = tmp_path / "run.zkj"
    with journal.write(zokern.MeZO(small(), lr=LR), path):
        pass
    with path.open("r+b") as file:
        file.seek(0, 2)
        reader = journal.Reader(path)
        list(reader.steps())
        writer = records.Writer(file, reader.crc)
        signature = {"passes": [{"rule": "axpy", "seeds": [], "rows": 1, "deferred": True}], "memory": 0, "groups": 1,
                     "numbers": 3}  # fmt: skip
        writer.append_json(records.SIGNATURE, signature)
    with pytest.raises(journal.JournalError, match="lacks the feature"):
        list(journal.Reader(path).steps())


# ------------------------------------------------------------------------------------------------------------------ sizes


def test_never_folding_grows_by_powers() -> None:
    model = small()
    opt = built(model, 0, num_samples=1)
    run(model, opt, 0, 6)
    (places,) = opt._placement.factors.values()
    assert opt.pending == 6
    assert len(places.held) == 6
    assert isinstance(places, pending.Places)


def test_a_deeper_model_of_other_modules() -> None:
    """Tied words, norms, biases: one model of the suite with all of them, folded and never folded alike."""
    models = [Toy(depth=3), Toy(depth=3)]
    models[1].load_state_dict(models[0].state_dict())
    opts = [built(models[0], 5), built(models[1], 0)]
    a, b = (run(model, opt, 0, 5) for model, opt in zip(models, opts, strict=True))
    opts[1].fold()
    assert a == b
    assert same_bits(weights_of(models[0]), weights_of(models[1]))


# ------------------------------------------------------------------------------------------------------- in one forward


@HALVES
@pytest.mark.parametrize("fold_every", [0, 2])
@pytest.mark.parametrize(("rank", "autocast"), [(1, False), (2, False), (1, True)])
@pytest.mark.parametrize("before", [True, False])
def test_probes_of_one_forward_see_what_waits(
    dtype: torch.dtype, fold_every: int, rank: int, autocast: bool, before: bool
) -> None:
    """Losses of all directions in one forward are those of one after another, to rounding, with the same updates waiting,
    of steps that were done in one forward or not."""
    found = []
    for last in (True, False):
        model, seen = reader(dtype), []
        own = each(model)

        def closure(given: object, own: Callable[..., Tensor] = own, seen: list[Tensor] = seen) -> Tensor:
            seen.append(own(given))
            return seen[-1]

        opt = zokern.FZOO(model, 1e-3, candidates=5, eps=1e-2, seed=3, placement="forward", weight_decay=0.5,
                          distribution=zokern.LowRank(rank), fold_every=fold_every)  # fmt: skip
        with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            warnings.simplefilter("error")
            for step in range(4):
                waiting, number = opt.pending, len(seen)
                opt.step(closure, [batch(step)], batched=(last if step == 3 else before) or 1)
        assert waiting == (3 if fold_every == 0 else 1)
        assert any(one.matrices for one in opt._placement.together.values()) == (last or before)
        together = [losses for losses in seen[number:] if len(losses) > 2]  # behind the first: of changed directions
        found.append(together[0].float() if last else torch.cat(seen[number:]).float())
    bound = 0.02 if dtype == torch.bfloat16 or autocast else 4e-6
    assert found[0].shape == found[1].shape
    assert torch.allclose(found[0], found[1], rtol=bound, atol=bound)


def test_blocks_see_the_weights_again_after_a_fold() -> None:
    model = reader()
    opt = zokern.FZOO(model, 1e-3, candidates=5, eps=1e-2, placement="forward", distribution="lowrank:1", fold_every=2)
    kinds = []
    for step in range(4):
        opt.step(each(model), [batch(step)], batched=True)
        shared = opt._placement.together[max(opt._placement.together)]
        kinds.append({type(one.base) is PlusLowRank for one in shared.matrices})
    assert kinds == [{False}, {True}, {False}, {True}]
