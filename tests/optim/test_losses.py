"""What a closure may return, and the number that a step makes of it: micro-batches, losses by name, several processes."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import zokern
from tests.methods import scripted, weights
from tests.models import Toy, small, tokens
from zokern.optim import METHODS
from zokern.optim.losses import Losses
from zokern.sweep import Counters

SHADOW = {"placement": "shadow", "seed": 3, "eps": 0.05}


def make(cls: str = "MeZO", **options: Any) -> tuple[Toy, Any]:
    """In copies, so that a step that moves nothing leaves every bit."""
    model = small()
    given = {**SHADOW, **({"maximize": True} if cls == "ES" else {}), **options}
    return model, getattr(zokern, cls)(model, 1e-2, **given)


def same(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def one(returned: Any, **options: Any) -> Tensor:
    return Losses(lambda *_: returned, **options).evaluate(Counters())


def of(losses: Any, **options: Any) -> Losses:
    """Micro-batches that are their own losses; evaluated once."""
    made = Losses(lambda loss: loss, losses, **options)
    made.gather([made.evaluate(Counters())])
    return made


def value(losses: Any, **options: Any) -> float:
    return float(of(losses, **options).each[0])


# ----------------------------------------------------------------------------------------------------------- one number

NUMBERS = {
    "a float": (0.1, 0.1),
    "an int": (3, 3.0),
    "a float of NumPy": (np.float64(0.1), 0.1),
    "0-d": (torch.tensor(0.375), 0.375),
    "0-d float64": (torch.tensor(0.1, dtype=torch.float64), 0.1),
    "a bool": (True, 1.0),
    "a bool of NumPy": (np.bool_(True), 1.0),
    "a float32 of NumPy": (np.float32(0.375), 0.375),
    "0-d of NumPy": (np.array(0.375), 0.375),
    "one element of NumPy": (np.array([0.375]), 0.375),
    "0-d float16": (torch.tensor(0.375, dtype=torch.float16), 0.375),
    "0-d int64": (torch.tensor(7), 7.0),
    "one element": (torch.tensor([0.375]), 0.375),
    "one element in two dimensions": (torch.tensor([[0.375]]), 0.375),
    "a tensor of bool, as (prediction == label).all() is": (torch.tensor(True), 1.0),
    "needs a gradient": (torch.tensor(0.375, requires_grad=True), 0.375),
}


@pytest.mark.filterwarnings("ignore:the closure returns its loss in float16")
@pytest.mark.parametrize(("returned", "wanted"), NUMBERS.values(), ids=list(NUMBERS))
def test_one_number_becomes_float64_without_dimensions(returned: Any, wanted: float) -> None:
    loss = one(returned)
    assert torch.equal(loss, torch.tensor(wanted, dtype=torch.float64))
    assert loss.dtype == torch.float64
    assert not loss.requires_grad
    _, opt = make()
    assert torch.equal(opt.step(lambda: returned), torch.tensor(wanted, dtype=torch.float32))


def test_only_helene_takes_a_vector() -> None:
    assert {name for name, method in METHODS.items() if method.takes_vector_losses} == {"helene"}
    with pytest.raises(TypeError, match=r"take its mean$"):
        one(torch.ones(2))
    assert torch.equal(one(torch.ones(2), vectors=True), torch.ones(2, dtype=torch.float64))


def test_a_vector_counts_with_its_mean() -> None:
    losses = of([torch.tensor([1.0, 3.0]), torch.tensor([5.0])], vectors=True)
    every, ok = losses.finite()
    assert every.tolist() == [3.0]
    assert ok


def test_vectors_of_micro_batches_are_one_vector() -> None:
    """HELENE on four examples, at once and two by two."""
    found = []
    for batches in (None, [slice(0, 2), slice(2, 4)]):
        model, opt = make("HELENE", hessian_interval=1)

        def losses(which: slice = slice(0, 4), model: Toy = model) -> Tensor:
            return torch.stack([model(tokens(i)) for i in range(4)[which]])

        for _ in range(2):
            opt.step(losses, batches)
        found.append(weights(model))
    assert same(*found)


# --------------------------------------------------------------------------------------------------------- micro-batches


def test_without_weights_the_mean_has_the_bits_of_a_closure_that_takes_it() -> None:
    found = []
    for together in (False, True):
        model, opt = make(num_samples=2)
        batches = [tokens(i) for i in range(3)]
        if together:
            opt.step(lambda model=model, batches=batches: torch.stack([model(b) for b in batches]).mean())
        else:
            opt.step(model, batches)
        found.append([*weights(model), opt.metrics["loss"], opt.metrics["projected_gradient"]])
    assert same(*found)


def test_every_perturbation_sees_every_batch_in_order() -> None:
    _, opt = make()
    seen: list[int] = []

    def closure(batch: int) -> float:
        seen.append(batch)
        return 1.0

    opt.step(closure, (i for i in (3, 1, 2)))  # a generator is read once
    assert seen == [3, 1, 2, 3, 1, 2]
    assert opt.counters["forwards"] == 6
    assert opt.counters["passes"] == 3


def test_the_sum_of_micro_batches() -> None:
    assert value([1.0, 2.0, 6.0]) == 3.0
    assert value([1.0, 2.0, 6.0], reduction="sum") == 9.0
    assert value([1.0, 2.0], reduction="sum", batch_weights=[2.0, 0.25]) == 2.5


@pytest.mark.parametrize(
    "given", [[1, 3], (1.0, 3.0), torch.tensor([1, 3]), iter([1, 3])], ids=["ints", "floats", "a tensor", "an iterator"]
)
def test_the_weighted_mean_of_micro_batches(given: Any) -> None:
    assert value([2.0, 6.0], batch_weights=given) == 5.0


def test_a_batch_that_weighs_nothing_is_left_out() -> None:
    assert value([2.0, 6.0], batch_weights=[0.0, 2.0]) == 6.0


def test_weights_that_are_equal_give_the_plain_mean() -> None:
    losses = [0.1, 0.7, 1.9]
    for weight in (1.0, 3.0, 1e-3):
        assert value(losses, batch_weights=[weight] * 3) == pytest.approx(value(losses), rel=1e-15)


def test_weights_of_tokens_give_the_loss_of_one_batch() -> None:
    """Two batches with the mean loss of 2 and of 4 tokens, weighted so, and all six at once: the same step."""
    found = []
    for batches in ([range(6)], [range(2), range(2, 6)]):
        model, opt = make()

        def mean(batch: range, model: Toy = model) -> Tensor:
            each = [(model(tokens(i)) * 1024).round() / 1024 for i in batch]  # whole numbers: their sums are exact
            return torch.stack(each).sum() / len(batch)

        for _ in range(2):
            opt.step(mean, batches, batch_weights=[len(b) for b in batches])
        found.append([*weights(model), opt.metrics["projected_gradient"]])
    assert same(*found)
    assert opt.metrics["projected_gradient"] != 0.0


# ------------------------------------------------------------------------------------------------------- losses by name


def named(model: Toy, weight: float | None = None) -> Callable[[], Any]:
    def closure() -> Any:
        task, length = model(tokens(0)), model.norm.weight.double().square().sum()
        return {"task": task, "length": length} if weight is None else task + weight * length

    return closure


@pytest.mark.parametrize(("given", "weight"), [(None, 1.0), ({"length": 0.3}, 0.3), ({"task": 1, "length": -2}, -2.0)])
def test_the_step_descends_the_weighted_sum(given: Any, weight: float) -> None:
    """Those that are not listed weigh 1; a weight may be negative."""
    model, opt = make()
    opt.step(named(model), loss_weights=given)
    other, single = make()
    single.step(named(other, weight))
    assert same(weights(model), weights(other))
    assert torch.equal(opt.metrics["loss"], single.metrics["loss"])
    assert not same(weights(model), weights(small()))


def test_metrics_have_the_mean_over_the_forwards_of_each_loss() -> None:
    _, opt = make()
    script = iter([{"a": 1.0, "b": 10.0}, {"a": 3.0, "b": 30.0}])
    loss = opt.step(lambda: next(script), loss_weights={"b": 0.5})
    found = {name: float(metric) for name, metric in opt.metrics.items()}
    assert found == {"loss": 12.0, "loss/a": 2.0, "loss/b": 20.0, "projected_gradient": pytest.approx(-6.0 / 0.05)}
    assert all(metric.dtype == torch.float32 and metric.dim() == 0 for metric in opt.metrics.values())
    assert torch.equal(loss, opt.metrics["loss"])
    opt.step(lambda: 1.0)
    assert set(opt.metrics) == {"loss", "projected_gradient"}, "those of the last step"


def test_losses_by_name_go_with_micro_batches() -> None:
    batches = [{"a": 1.0, "b": 2.0}, types.MappingProxyType({"a": 3.0, "b": 6.0})]
    assert value(batches, loss_weights={"b": 0.5}) == (2.0 + 6.0) / 2
    assert value(batches, loss_weights={"b": 0.5}, reduction="sum") == 8.0
    assert value(batches, loss_weights={"b": 0.5}, batch_weights=[1, 3]) == (2.0 + 18.0) / 4


def test_a_vector_may_have_a_name_where_vectors_are_taken() -> None:
    returned = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 5.0])}
    assert one(returned, vectors=True, loss_weights={"b": 2.0}).tolist() == [7.0, 12.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_one_bad_loss_among_several_skips_the_step(bad: float, weight: float) -> None:
    model, opt = make()
    script = iter([{"a": 1.0, "b": 1.0}, {"a": 2.0, "b": bad}])
    with pytest.warns(zokern.ZokernWarning, match="not finite"):
        opt.step(lambda: next(script), loss_weights={"b": weight})
    assert opt.skipped_steps == 1
    assert same(weights(model), weights(small()))
    assert opt.metrics["loss/a"] == 1.5
    assert not torch.isfinite(opt.metrics["loss/b"]), "who was it"
    opt.step(named(model))
    assert opt.skipped_steps == 1
    assert not same(weights(model), weights(small()))


# ------------------------------------------------------------------------------------------------------------- refusals

TWO = {"batches": [1, 2]}
REFUSED: dict[str, tuple[dict[str, Any], Any, type[Exception], str]] = {
    # what step is given, what the closure returns, and what is said
    "weights without batches": ({"batch_weights": [1.0]}, 1.0, ValueError, "batch_weights.*batches.*in pairs"),
    "too few weights": ({**TWO, "batch_weights": [1]}, 1.0, ValueError, "batch_weights has 1 .*batches has 2"),
    "too many weights": ({**TWO, "batch_weights": [1] * 3}, 1.0, ValueError, "batch_weights has 3 .*batches has 2"),
    "a negative weight": ({**TWO, "batch_weights": [1, -1]}, 1.0, ValueError, r"batch_weights\[1\] is -1; it must be"),
    "weights of 0": ({**TWO, "batch_weights": [0, 0.0]}, 1.0, ValueError, "batch_weights add up to 0.0; some must"),
    "a weight that is nan": ({**TWO, "batch_weights": [math.nan, 1]}, 1.0, ValueError, r"batch_weights\[0\].*finite"),
    "an endless weight": ({**TWO, "batch_weights": [1, math.inf]}, 1.0, ValueError, r"batch_weights\[1\].*finite"),
    "a weight that is a word": ({**TWO, "batch_weights": ["a", 1]}, 1.0, TypeError, r"batch_weights\[0\] must be a n"),
    "no batch": ({"batches": []}, 1.0, ValueError, "batches is empty; leave the step out"),
    "batches that are a number": ({"batches": 5}, 1.0, TypeError, "batches must be a list, got int"),
    "weights that are a number": ({**TWO, "batch_weights": 5}, 1.0, TypeError, "batch_weights must be a list, got int"),
    "weights that have no end": ({**TWO, "batch_weights": [1e308] * 2}, 1.0, ValueError, "batch_weights add up to inf"),
    "a sum of nothing": ({"reduction": "sum"}, 1.0, ValueError, "reduction='sum' is over batches, and none are given"),
    "loss_weights that are a number": ({"loss_weights": 0.5}, {"a": 1.0}, TypeError, "loss_weights must be a dict"),
    "a complex tensor": ({}, torch.tensor(1j), TypeError, "as a real number, got a tensor of torch.complex64"),
    "a whole number too large": ({}, 10**400, ValueError, "the loss as a number that a float64 can hold; scale it down"),
    "too large a number by name": ({}, {"a": 10**400}, ValueError, "the loss 'a' as a number that a float64 can hold"),
    "a sparse tensor": ({}, torch.ones(1).to_sparse(), TypeError, r"got one of torch.sparse_coo; call to_dense"),
    "an unknown reduction": ({**TWO, "reduction": "max"}, 1.0, ValueError, "reduction is 'max'.*'mean', 'sum'"),
    "a list as reduction": ({"reduction": ["mean"]}, 1.0, ValueError, "reduction is .*'mean', 'sum'"),
    "loss_weights for one loss": ({"loss_weights": {"a": 1}}, 1.0, TypeError, "loss_weights.*'a'.*return a dict"),
    "loss_weights for others": (
        {"loss_weights": {"a": 1, "c": 2}}, {"a": 1.0, "b": 1.0}, ValueError, "has 'c', .*'a', 'b'; make the names agree",
    ),
    "a loss_weight that is nan": ({"loss_weights": {"a": math.nan}}, {"a": 1.0}, ValueError, "loss_weights.'a'.*finite"),
    "a loss_weight that is a word": ({"loss_weights": {"a": "1"}}, {"a": 1.0}, TypeError, "loss_weights.'a'.*a number"),
    "no loss by name": ({}, {}, ValueError, "an empty dict; return at least one"),
    "no loss by name, weighted": ({"loss_weights": {"a": 1}}, {}, ValueError, "an empty dict; return at least one"),
    "a word": ({}, "1.0", TypeError, "closure must return.*got str"),
    "nothing": ({}, None, TypeError, "closure must return.*got NoneType"),
    "a list": ({}, [1.0], TypeError, "closure must return.*got list"),
    "a vector": ({}, torch.ones(3), TypeError, r"closure must return one loss.*\(3,\); take its mean"),
    "no element": ({}, torch.ones(0), TypeError, r"closure must return one loss.*\(0,\)"),
    "nothing by name": ({}, {"a": 1.0, "b": None}, TypeError, "closure must return the loss 'b' .*got NoneType"),
    "a vector by name": ({}, {"a": 1.0, "b": torch.ones(2)}, TypeError, r"the loss 'b', .*\(2,\); take its mean"),
    "names in names": ({}, {"a": {"b": 1.0}}, TypeError, "closure must return.*got dict"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "returned", "error", "said"), REFUSED.values(), ids=list(REFUSED))
def test_what_does_not_go_together_is_refused_and_changes_nothing(given, returned, error, said) -> None:
    model, opt = make()
    with pytest.raises(error, match=said):
        opt.step(lambda *_: returned, **given)
    assert same(weights(model), weights(small()))
    assert opt.counters["steps"] == 0
    opt.step(named(model))
    other, fresh = make()
    fresh.step(named(other))
    assert same(weights(model), weights(other)), "the step is the one that it would have been"
    assert not same(weights(model), weights(small()))


@pytest.mark.parametrize("closure", [None, 1.0, torch.ones(())], ids=["None", "a number", "a tensor"])
def test_a_closure_that_cannot_be_called_is_refused(closure: Any) -> None:
    _, opt = make()
    with pytest.raises(TypeError, match=r"closure.*opt\.step\(lambda"):
        opt.step(closure)
    assert opt.counters["passes"] == 0


@pytest.mark.parametrize("options", [{"batch_weights": [1, 2]}, {"reduction": "sum"}])
def test_losses_of_examples_take_no_weights_of_batches(options: dict[str, Any]) -> None:
    model, opt = make("HELENE")
    with pytest.raises(ValueError, match=r"batch_weights and reduction='sum'.*return their mean or sum"):
        opt.step(lambda b: torch.ones(2), [1, 2], **options)
    assert same(weights(model), weights(small()))


# ---------------------------------------------------------------------------------------------------- several processes

ROUNDS = {
    "mezo": ("MeZO", {}, [2]),
    "mezo-3": ("MeZO", {"num_samples": 3}, [6]),
    "mezo-one-sided-3": ("MeZO", {"num_samples": 3, "one_sided": True}, [4]),
    "lezo": ("LeZO", {"num_dropped": 1}, [2]),
    "hizoo-2": ("HiZOO", {"num_samples": 2, "smoothing": 1e-2}, [5]),
    "helene-2": ("HELENE", {"num_samples": 2}, [4]),
    "gv": ("MeZOGV", {"candidates": 4}, [4, 2]),
    "gv-curved": ("MeZOGV", {"candidates": 4, "smoothing": 1e-2}, [5, 2]),
    "greedy": ("MeZOGreedy", {"candidates": 3}, [3, 1]),
    "greedy-curved": ("MeZOGreedy", {"candidates": 3, "smoothing": 1e-2}, [4, 1]),
    "fzoo": ("FZOO", {"candidates": 3}, [4]),
    "es": ("ES", {"num_directions": 4, "maximize": True}, [4]),
    "es-antithetic": ("ES", {"num_directions": 3, "antithetic": True, "maximize": True}, [6]),
}
EACH = pytest.mark.parametrize(("cls", "options", "sizes"), ROUNDS.values(), ids=list(ROUNDS))


def test_every_method_has_its_rounds_here() -> None:
    assert {getattr(zokern, cls) for cls, _, _ in ROUNDS.values()} == set(METHODS.values())


@EACH
def test_reduce_gets_the_losses_of_each_round_at_once(cls, options, sizes) -> None:
    _, opt = make(cls, **options)
    got: list[list[Tensor]] = []

    def reduce(losses: list[Tensor]) -> list[Tensor]:
        got.append(losses)
        return losses

    opt.reduce = reduce
    returned = [1.0 + i for i in range(sum(sizes))]
    opt.step(scripted(returned))
    assert [len(losses) for losses in got] == sizes
    assert [float(loss) for losses in got for loss in losses] == returned
    assert all(loss.dtype == torch.float64 for losses in got for loss in losses)


@EACH
def test_the_step_is_that_of_the_losses_that_reduce_returns(cls, options, sizes) -> None:
    """As if the closure had returned them: weights, the projected gradient and the loss."""
    generator = np.random.default_rng(5)
    mine, all_of_us = (list(1.0 + 0.1 * generator.standard_normal((3, sum(sizes)))) for _ in range(2))
    found = []
    for shared in (True, False):
        model, opt = make(cls, **options)
        for step in range(3):
            rest = iter(all_of_us[step])
            if shared:
                opt.reduce = lambda losses, rest=rest: [torch.tensor(next(rest), dtype=torch.float64) for _ in losses]
            loss = opt.step(scripted(mine[step] if shared else all_of_us[step]))
            assert float(loss) == pytest.approx(all_of_us[step].mean())
        found.append([*weights(model), opt.metrics["projected_gradient"], opt.metrics["loss"]])
    assert same(*found)


def test_twice_the_losses_are_twice_the_gradient() -> None:
    found = []
    for factor in (1.0, 2.0):
        model, opt = make(num_samples=3)
        opt.reduce = lambda losses, factor=factor: [factor * loss for loss in losses]
        opt.step(lambda model=model: model(tokens(0)))
        found.append(opt.metrics)
    assert torch.equal(2.0 * found[0]["projected_gradient"], found[1]["projected_gradient"])
    assert torch.equal(2.0 * found[0]["loss"], found[1]["loss"])
    assert found[0]["projected_gradient"] != 0.0


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("cls", ["MeZOGreedy", "MeZOGV"])
def test_an_exception_in_reduce_leaves_clean_weights(cls: str, at: int) -> None:
    model, opt = make(cls, candidates=3)
    calls: list[int] = []

    def reduce(losses: list[Tensor]) -> list[Tensor]:
        calls.append(len(losses))
        if len(calls) == at:
            raise ConnectionError("a process is gone")
        return losses

    opt.reduce = reduce
    with pytest.raises(ConnectionError, match="is gone"):
        opt.step(lambda: model(tokens(0)))
    assert same(weights(model), weights(small()))
    assert opt.counters["steps"] == 0
    opt.step(lambda: model(tokens(0)))
    other, fresh = make(cls, candidates=3)
    fresh.step(lambda: other(tokens(0)))
    assert same(weights(model), weights(other))


def test_reduce_does_not_hear_of_a_round_that_broke_off() -> None:
    _, opt = make(num_samples=2)
    opt.reduce = lambda losses: pytest.fail("the round has no end")
    script = iter([1.0, 2.0, None])
    with pytest.raises(TypeError, match="got NoneType"):
        opt.step(lambda: next(script))


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        ("ES", {"num_directions": 3, "shaping": "ranked"}),
        ("MeZOGV", {"candidates": 3}),
        ("MeZOGreedy", {"candidates": 3}),
    ],
)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_an_infinite_loss_skips_the_step_though_ranks_would_hide_it(
    cls: str, options: dict[str, Any], bad: float
) -> None:
    model, opt = make(cls, **options)
    with pytest.warns(zokern.ZokernWarning, match="not finite"):
        opt.step(scripted([1.0, 1.5, bad, 1.75, 2.0]))
    assert opt.skipped_steps == 1
    assert same(weights(model), weights(small()))


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda losses: losses[:-1], "a list of 4 tensors"),
        (lambda losses: None, "a list of 4 tensors"),
        (lambda losses: [1.0] * 4, "a list of 4 tensors"),
    ],
)
def test_what_reduce_may_not_return(returned: Any, said: str) -> None:
    model, opt = make(num_samples=2)
    opt.reduce = returned
    with pytest.raises(TypeError, match=said):
        opt.step(lambda: 1.0)
    assert same(weights(model), weights(small()))


def test_an_infinite_loss_that_others_have_mended_is_no_reason_to_skip() -> None:
    _, opt = make()
    opt.reduce = lambda losses: [torch.tensor(1.0 + i, dtype=torch.float64) for i in range(len(losses))]
    opt.step(lambda: math.inf)
    assert opt.skipped_steps == 0


def test_other_names_for_another_batch_are_refused() -> None:
    _, opt = make()
    for other in ({"b": 1.0}, 1.0):
        answers = iter([{"a": 1.0}, other])
        with pytest.raises(ValueError, match="other names for one batch than for another"):
            opt.step(lambda _, answers=answers: next(answers), [0, 1])


def test_vectors_and_numbers_do_not_mix() -> None:
    model, opt = make("HELENE")
    for given, returned, said in (
        ([0, 1], [torch.ones(2), 1.0], "one loss for some batches and a vector for others"),
        (None, [{"a": torch.ones(2), "b": 1.0}], r"several shapes: 'a' \(2,\), 'b' \(\)"),
    ):
        answers = iter(returned)
        with pytest.raises(TypeError, match=said):
            opt.step(lambda *_, answers=answers: next(answers), given)
    assert same(weights(model), weights(small()))


def test_named_losses_are_put_together_as_the_loss_is() -> None:
    for options, wanted in (({}, 3.0), ({"batch_weights": [3, 1]}, 2.0), ({"reduction": "sum"}, 6.0)):
        _, opt = make()
        opt.step(lambda b: {"a": float(b), "b": 0.0}, [1, 5], **options)
        assert float(opt.metrics["loss/a"]) == float(opt.metrics["loss"]) == wanted


def test_numbers_of_numpy_are_numbers() -> None:
    for number in (np.float32(0.5), np.int64(2), np.float16(0.25)):
        assert float(one(number)) == float(number)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        ("MeZO", {"num_samples": 2}),
        ("HiZOO", {}),
        ("FZOO", {"candidates": 3}),
        ("ES", {"num_directions": 3}),
        ("ES", {"num_directions": 3, "shaping": "ranked"}),
        ("MeZOGV", {"candidates": 3}),
        ("MeZOGreedy", {"candidates": 3}),
    ],
)
def test_an_infinite_loss_of_another_process_skips_the_step_here_too(cls: str, options: dict[str, Any]) -> None:
    """The other one skips its step; weights would part."""
    model, opt = make(cls, **options)
    opt.reduce = lambda losses: [*losses[:-1], losses[-1] + (math.inf if len(losses) > 2 else 0.0)]
    script = iter([1.0, 1.5, 1.25, 1.75, 2.0])
    with pytest.warns(zokern.ZokernWarning, match="not finite"):
        opt.step(lambda: next(script))
    assert opt.skipped_steps == 1
    assert same(weights(model), weights(small()))
