"""Several graphs of one GraphedStep: batches of other shapes, micro-batches with weights, and how many are kept."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import zokern
from tests.emulated_graph import EmulatedGraph
from tests.graphs.test_graphed import batches, emulated, make
from tests.methods import METHODS
from tests.models import Net
from tests.placement.test_pipelined import same
from zokern.graphs.batch import kind_of

__all__ = ["emulated"]
NAMES = ["mezo", "hizoo", "helene", "fzoo", "es-ranked"]


def cut(batch: dict[str, Tensor], rows: int, columns: int) -> dict[str, Tensor]:
    return {"tokens": batch["tokens"][:rows, :columns], "labels": batch["labels"][:rows], "scale": batch["scale"]}


SHAPES = [(6, 5), (4, 5), (6, 3), (6, 5), (4, 5), (6, 3), (6, 5)]


@pytest.mark.filterwarnings("ignore:a loss was not finite:zokern.ZokernWarning")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("placement", ["inplace", "stream"])
def test_each_shape_is_a_graph(emulated, name: str, placement: str) -> None:
    """A kind that comes first in the middle of a run changes nothing when it is captured."""
    data = [cut(batch, *shape) for batch, shape in zip(batches(7, bad=4), SHAPES, strict=True)]
    model, opt, closure, scheduler = make(METHODS[name], placement, torch.bfloat16)
    other, theirs, closure_of, scheduler_of = make(METHODS[name], placement, torch.bfloat16)
    step = zokern.GraphedStep(opt, closure)
    assert step.captures == 0
    for i, batch in enumerate(data):
        loss = step(batch)
        assert torch.equal(loss, theirs.step(lambda batch=batch: closure_of(batch))) or i == 4
        scheduler.step()
        scheduler_of.step()
    same((model, opt, torch.ones(1)), (other, theirs, torch.ones(1)))
    assert opt.counters == theirs.counters
    structures = {"helene": 2}.get(name, 1)
    assert 3 <= step.captures <= 3 * structures
    assert step.let_go == 0


@pytest.mark.filterwarnings("ignore::zokern.ZokernWarning")
def test_the_longest_unused_graph_goes(emulated) -> None:
    data = batches(9)
    model, opt, closure, _ = make(METHODS["mezo"], "inplace", torch.float32)
    step = zokern.GraphedStep(opt, closure, cut(data[0], 6, 5), max_graphs=2)
    rows = [6, 4, 6, 3, 6, 4]
    found = []
    for batch, n in zip(data, rows, strict=False):
        step(cut(batch, n, 5))
        found.append((step.captures, step.let_go))
    # 6 was used after 4, so 3 takes the place of 4; then 4 that of 3.
    assert found == [(1, 0), (2, 0), (2, 0), (3, 1), (3, 1), (4, 2)]
    assert len(step._graphs.kept) == 2
    other, theirs, closure_of, _ = make(METHODS["mezo"], "inplace", torch.float32)
    for batch, n in zip(data, rows, strict=False):
        theirs.step(lambda batch=batch, n=n: closure_of(cut(batch, n, 5)))
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_graph_that_is_captured_again_is_told_once(emulated) -> None:
    data = batches(8)
    _, opt, closure, _ = make(METHODS["mezo"], "inplace", torch.float32)
    step = zokern.GraphedStep(opt, closure, max_graphs=1)
    step(cut(data[0], 6, 5))
    step(cut(data[1], 4, 5))
    with pytest.warns(zokern.ZokernWarning, match=r"more kinds .* than max_graphs=1: pad the batches to few lengths"):
        step(cut(data[2], 6, 5))
    step(cut(data[3], 4, 5))  # a warning would be an error here
    assert (step.captures, step.let_go) == (4, 3)


@pytest.mark.parametrize("weights", [None, [[2.0, 1.0], [1.0, 3.0], [0.0, 1.0]]], ids=["even", "weighted"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["mezo", "hizoo", "es-ranked"])
def test_micro_batches(emulated, name: str, reduction: str, weights: Any, monkeypatch) -> None:
    """Their weights are read anew by each launch."""
    data = batches(6)
    model, opt, closure, _ = make(METHODS[name], "inplace", torch.float32)
    other, theirs, closure_of, _ = make(METHODS[name], "inplace", torch.float32)
    step = zokern.GraphedStep(opt, closure, reduction=reduction)
    for i in range(3):
        pair = [cut(data[2 * i], 6, 5), cut(data[2 * i + 1], 4, 5)]
        own = None if weights is None else weights[i]
        loss = step(batches=pair, batch_weights=own)
        assert torch.equal(loss, theirs.step(closure_of, pair, batch_weights=own, reduction=reduction))
    same((model, opt, torch.ones(1)), (other, theirs, torch.ones(1)))
    assert opt.counters == theirs.counters
    assert step.captures == 1
    step(batches=[*pair, pair[0]])
    assert step.captures == 2, "another number of them is another graph"
    if reduction == "mean":
        with pytest.raises(TypeError, match=r"either batch or batches"):
            step(pair[0], batches=pair)


def test_losses_by_name(emulated) -> None:
    data, models = batches(4), []
    weights = {"a": 1.0, "b": 0.25}
    for graphed in (True, False):
        model, opt, closure, _ = make(METHODS["mezo"], "shadow", torch.float32)

        def both(batch: Any, closure: Any = closure, model: Net = model) -> dict[str, Tensor]:
            return {"a": closure(batch), "b": model.head.weight.float().square().mean()}

        step = zokern.GraphedStep(opt, both, data[0], loss_weights=weights) if graphed else None
        for batch in data:
            if step is not None:
                step(batch)
            else:
                opt.step(lambda batch=batch, both=both: both(batch), loss_weights=weights)
        models.append((model, {name: float(value) for name, value in opt.metrics.items()}))
    assert all(map(torch.equal, models[0][0].parameters(), models[1][0].parameters()))
    assert models[0][1] == models[1][1]
    assert {"loss", "loss/a", "loss/b"} < models[0][1].keys()


def test_containers_and_other_values_are_a_part_of_the_kind(emulated) -> None:
    model, opt, _, _ = make(METHODS["mezo"], "inplace", torch.float32)
    pair, seen = namedtuple("pair", ["tokens", "scale"]), []
    tokens = batches()[0]["tokens"]

    def closure(batch: Any) -> Tensor:
        seen.append(batch)
        tokens, scale = batch["a"]
        return model(tokens).sum() * scale

    step = zokern.GraphedStep(opt, closure, OrderedDict(a=(tokens, 2.0)))
    assert type(seen[-1]) is OrderedDict
    assert type(seen[-1]["a"]) is tuple
    step(OrderedDict(a=(tokens, 2.0)))
    assert step.captures == 1
    for i, other in enumerate([OrderedDict(a=(tokens, 3.0)), {"a": (tokens, 2.0)}, {"a": pair(tokens, 2.0)}]):
        step(other)
        assert step.captures == 2 + i
        assert type(seen[-1]) is type(other)
        assert type(seen[-1]["a"]) is type(other["a"])
    assert opt.counters["steps"] == 4


@pytest.mark.parametrize(
    ("given", "error", "word"),
    [
        ({}, TypeError, r"either batch or batches=\[\.\.\.\]"),
        ({"batches": []}, ValueError, "batches is empty"),
        ({"batch": {"tokens": 3}}, ValueError, "batch has no tensor in it"),
        ({"batches": [{"tokens": 3}]}, ValueError, r"batches\[0\] has no tensor in it"),
        ({"batch": {"x": np.ones(3)}}, TypeError, r"batch\['x'\] is an array of NumPy"),
        ({"batches": "two", "batch_weights": [1.0]}, ValueError, "batch_weights has 1 entries and batches has 2"),
        ({"batches": "two", "batch_weights": [1.0, -1.0]}, ValueError, r"batch_weights\[1\]"),
        ({"batches": "two", "batch_weights": [0.0, 0.0]}, ValueError, "batch_weights add up to 0"),
        ({"batch": "one", "batch_weights": [1.0]}, ValueError, "batch_weights are given and batches are not"),
    ],
)
def test_what_a_step_cannot_take(emulated, given: dict[str, Any], error: type, word: str) -> None:
    model, opt, closure, _ = make(METHODS["mezo"], "inplace", torch.float32)
    step, before = zokern.GraphedStep(opt, closure, batches()[0]), copy.deepcopy(model.state_dict())
    own = {"one": batches()[0], "two": batches()[:2]}
    given = {name: own[value] if isinstance(value, str) else value for name, value in given.items()}
    with pytest.raises(error, match=word):
        step(**given)
    assert opt.counters["steps"] == 0
    assert step.captures == 1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    step(batches()[0])


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (2.5, TypeError), (True, TypeError)])
def test_a_number_of_graphs_that_is_none(emulated, value: Any, error: type) -> None:
    _, opt, closure, _ = make(METHODS["mezo"], "inplace", torch.float32)
    with pytest.raises(error, match="max_graphs"):
        zokern.GraphedStep(opt, closure, max_graphs=value)


def test_a_capture_that_fails_leaves_the_others(emulated) -> None:
    data, broken = batches(3), [False]
    _, opt, closure, _ = make(METHODS["mezo"], "inplace", torch.float32)

    def sometimes(batch: Any) -> Tensor:
        return closure(batch) * (closure(batch).item() if broken[0] else 1.0)

    step = zokern.GraphedStep(opt, sometimes, data[0])
    broken[0] = True
    with pytest.raises(RuntimeError, match=r"test_kinds\.py:\d+ in sometimes: return closure\(batch\) \* \(closure"):
        step(cut(data[1], 4, 5))
    assert step.captures == 1
    step(data[1])
    assert opt.counters["steps"] == 1


def host_numbers(x: Tensor) -> Tensor:
    return x * torch.tensor(2.0)


def masked(x: Tensor) -> Tensor:
    return x[x > 0].sum()


class Reads(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


@pytest.mark.parametrize(
    ("read", "line"),
    [
        (host_numbers, r"in host_numbers: return x \* torch\.tensor\(2\.0\)"),
        (masked, r"in masked: return x\[x > 0\]\.sum\(\)"),
        (lambda x: Reads()(x), r"in forward: if x\.sum\(\) > 0:"),
    ],
    ids=["a tensor of host numbers", "a shape that depends on values", "in a module of the model"],
)
def test_the_line_that_breaks_a_capture_is_named(emulated, read: Any, line: str) -> None:
    _, opt, closure, _ = make(METHODS["mezo"], "inplace", torch.float32)
    with pytest.raises(
        RuntimeError, match=rf"could not be captured.*It came from .*test_kinds\.py:\d+ {line}.*optimizer\.step"
    ):
        zokern.GraphedStep(opt, lambda batch: read(closure(batch).reshape(1)).sum(), batches()[0])


@pytest.mark.parametrize("name", ["mezo", "mezo-one-sided-3", "fzoo", "gv", "es-ranked"])
@pytest.mark.parametrize("batched", [True, 2])
def test_probes_that_share_a_forward(emulated, name: str, batched: bool | int) -> None:
    """That rows do not mix is tested before the capture, which changes nothing. An eager run tests it in its first step,
    whose losses are those of probes alone: this one is eager in both."""
    data = [[batch] for batch in batches(4)]
    runs = []
    for graphed in (True, False):
        model, opt, _, _ = make(METHODS[name], "forward", torch.float32, distribution=zokern.LowRank(1))
        sign = -1.0 if METHODS[name].climbs else 1.0

        def each(batch: Any, model: Net = model, sign: float = sign) -> Tensor:
            return sign * torch.nn.functional.cross_entropy(model(batch["tokens"]), batch["labels"], reduction="none")

        opt.step(each, data[0], batched=batched)
        assert float(opt.metrics["probes_per_forward"]) == 1 or batched == 2
        step = zokern.GraphedStep(opt, each, batched=batched) if graphed else None
        losses = [step(batches=own) if step is not None else opt.step(each, own, batched=batched) for own in data]
        runs.append((model, opt, torch.stack(losses)))
        shared = float(opt.metrics["probes_per_forward"])
        assert shared == 2 if batched == 2 else shared > 1
    same(*runs)
    assert runs[0][1].counters == runs[1][1].counters


def test_the_test_of_rows_is_a_part_of_trying(emulated) -> None:
    """Without an eager step before: what is captured shares a forward, and trying it has changed nothing."""
    data = [[batch] for batch in batches(2)]
    model, opt, _, _ = make(METHODS["fzoo"], "forward", torch.float32, distribution=zokern.LowRank(1))

    def each(batch: Any) -> Tensor:
        return torch.nn.functional.cross_entropy(model(batch["tokens"]), batch["labels"], reduction="none")

    before = copy.deepcopy(model.state_dict())
    step = zokern.GraphedStep(opt, each, batched=True)
    seen = []
    capture = EmulatedGraph.capture

    def noting(graph: EmulatedGraph, work: Any) -> None:
        capture(graph, work)
        seen.append(all(torch.equal(v, before[k]) for k, v in model.state_dict().items()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EmulatedGraph, "capture", noting)
        step(batches=data[0])
    assert seen == [True]
    assert opt.counters["steps"] == 1
    assert opt.counters["forwards"] == 1
    assert float(opt.metrics["probes_per_forward"]) > 2
    with pytest.raises(ValueError, match="batched repeats the tensors of batches"):
        zokern.GraphedStep(opt, each, data[0][0], batched=True)


@pytest.mark.parametrize("shared", [False, True])
def test_an_eager_step_that_is_done_again_after_a_launch(emulated, shared: bool) -> None:
    """The factors of its directions were there, and the launch has overwritten them."""
    data = batches(2)
    model, opt, closure, _ = make(METHODS["mezo"], "forward", torch.float32, distribution=zokern.LowRank(1))

    def each(batch: Any) -> Tensor:
        return torch.nn.functional.cross_entropy(model(batch["tokens"]), batch["labels"], reduction="none")

    def eager() -> Tensor:
        return opt.step(each, data[:1], batched=True) if shared else opt.step(lambda: closure(data[0]))

    graphed = zokern.GraphedStep(opt, each if shared else closure, batched=shared)
    for _ in range(2):
        graphed(batches=data[:1]) if shared else graphed(data[0])
    state, kept = copy.deepcopy(opt.state_dict()), copy.deepcopy(model.state_dict())
    first = eager()
    graphed(batches=data[1:]) if shared else graphed(data[1])
    opt.load_state_dict(state)
    model.load_state_dict(kept)
    assert torch.equal(eager(), first)


def test_the_kind_of_a_batch() -> None:
    """What a closure can tell apart is another kind; what comes out the same when it is copied is the same."""
    image, tokens = torch.ones(2, 3, 4, 5), torch.arange(10).view(2, 5)
    last = image.to(memory_format=torch.channels_last)
    assert kind_of(image, "") != kind_of(last, "")
    assert kind_of(tokens, "") != kind_of(tokens.int(), "")
    assert kind_of(tokens[:, :3], "") == kind_of(tokens[:, :3].contiguous(), "")
    assert kind_of([tokens, True], "") != kind_of([tokens, 1], "")
    assert kind_of([tokens, 1.0], "") != kind_of([tokens, 1], "")
    assert kind_of([tokens, "a"], "") == kind_of([tokens, "a"], "")


def test_a_graph_that_goes_takes_its_memory_with_it(emulated) -> None:
    _, opt, closure, _ = make(METHODS["mezo"], "inplace", torch.float32)
    data = batches(3)
    step = zokern.GraphedStep(opt, closure, data[0], max_graphs=1)
    one = step._graphs.kept[0]
    gone = [weakref.ref(one.graph), *(weakref.ref(t) for t in one.batches[0].values())]
    del one
    gc.disable()  # by itself, not once the collector comes by
    try:
        step(cut(data[1], 4, 5))
        left = [ref() for ref in gone]
    finally:
        gc.enable()
    assert left == [None] * 4


def test_an_eager_step_with_other_copies_comes_between(emulated) -> None:
    """Another number of probes that share a forward has memory of its own; the next launch is of a graph made anew."""
    data, runs = [[batch] for batch in batches(4)], []
    for graphed in (True, False):
        model, opt, _, _ = make(METHODS["fzoo"], "forward", torch.float32, distribution=zokern.LowRank(1))

        def each(batch: Any, model: Net = model) -> Tensor:
            return torch.nn.functional.cross_entropy(model(batch["tokens"]), batch["labels"], reduction="none")

        opt.param_groups[0]["lr"] = 1e-5  # a large step is noted elsewhere by an eager step of a CPU
        for batched in (True, 2):
            opt.step(each, data[0], batched=batched)
        step = zokern.GraphedStep(opt, each, batched=True) if graphed else None
        for own, batched in zip(data, (True, 3, True, True), strict=True):
            if step is not None and batched is True:
                step(batches=own)
            else:
                opt.step(each, own, batched=batched)
        runs.append((model, opt, torch.ones(1)))
        assert step is None or step.captures == 2
    same(*runs)
