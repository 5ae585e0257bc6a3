"""What a result says: costs, what was left out, the table; and what is refused."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import zokern
from tests import models
from tests.checking.models import inputs, norms
from tests.methods import METHODS
from zokern.checking.result import NOT_LOOKED_AT, REACTS
from zokern.checking.run import spread
from zokern.checking.table import wrapped


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("placement", ["inplace", "shadow"])
def test_costs_are_those_of_a_step(name: str, placement: str) -> None:
    case, model = METHODS[name], models.small()
    opt = case.cls(model, lr=1e-3, placement=placement, **case.settings)
    result = zokern.check(opt, lambda _: model(), [1, 2], max_tensors=1)
    cost = result.cost
    before = opt.counters
    opt.step(lambda _: model(), [1, 2])
    assert cost.forwards == opt.counters["forwards"] - before["forwards"] == 2 * case.forwards
    assert cost.passes[placement] == opt.counters["passes"] - before["passes"] == case.passes
    assert cost.states == sum(
        s.nbytes for own in opt.state.values() for s in own.values() if isinstance(s, torch.Tensor)
    )
    assert cost.memory[placement] == sum(t.nbytes for t in opt._placement.memory())
    assert cost.weights == sum(p.nbytes for p in model.parameters())
    assert cost.method == case.cls.__name__


def test_memory_of_stream_is_its_own() -> None:
    model = models.small(torch.bfloat16)
    opt = zokern.MeZO(model, lr=1e-3, placement="stream")
    opt.step(model)
    assert zokern.check(opt, model).cost.memory["stream"] == sum(t.nbytes for t in opt._placement.memory())
    assert zokern.check(norms(), lambda: norms()(inputs()).sum()).cost.memory["stream"] is None


@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([1, 2, 12, 16]))
def test_what_is_looked_at_lies_evenly(count: int, taken: int, layer: int) -> None:
    """Also among the tensors of one kind, one in each layer."""
    order = spread(count)
    assert sorted(order) == list(range(count))
    some = sorted(order[:taken])
    if taken < count:
        gaps = [b - a for a, b in itertools.pairwise([-1, *some, count])]
        assert max(gaps) <= 3 * -(-count // taken)
    kinds = [sum(i % layer == kind for i in some) for kind in range(layer)]
    if count % layer == 0 and taken >= 4 * layer:
        assert min(kinds) > 0
        assert max(kinds) < 3 * taken / layer


@pytest.mark.parametrize("limit", [{"max_tensors": 5}, {"max_seconds": 0.0}])
def test_a_limit_is_said(limit: dict[str, float]) -> None:
    model = models.toy()
    result = zokern.check(model, model, **limit)
    assert result.looked_at == (5 if "max_tensors" in limit else 1)
    assert sum(row.state == REACTS for row in result.rows) == result.looked_at
    assert sum(row.state == NOT_LOOKED_AT for row in result.rows) == result.trainable - result.looked_at
    (told,) = [one for one in result.verdicts if one.subject == "time"]
    assert f"{result.looked_at} of 23 tensors were looked at" in told.text
    assert next(iter(limit)) in told.text
    assert result.ok
    assert f"{result.looked_at} of 23 tensors perturbed" in str(result)


def test_rows_are_in_the_models_order() -> None:
    model = models.toy()
    assert [row.name for row in zokern.check(model, model).rows] == [name for name, _ in model.named_parameters()]


def test_the_first_perturbation_is_that_of_the_first_step() -> None:
    """Both losses of a MeZO step with one tensor, and of the check."""
    param, seen = nn.Parameter(torch.ones(5)), []
    opt = zokern.MeZO([param], lr=0.0, eps=1e-2, seed=7)
    closure = lambda: seen.append(param.detach().clone()) or param.square().sum()  # noqa: E731
    zokern.check(opt, closure)
    perturbed = seen[-1]
    seen.clear()
    opt.step(closure)
    assert torch.equal(perturbed, seen[0])


def test_what_a_closure_may_return() -> None:
    model, x = norms(), inputs()
    assert zokern.check(model, lambda: float(model(x).square().mean())).ok
    assert zokern.check(model, lambda: model(x).square().mean().numpy()[()]).ok  # NumPy's float32
    assert zokern.check(model, lambda: model(x).square().mean(1)).ok  # the loss of each example
    named = lambda x: {"a": model(x).square().mean(), "b": model(x).abs().mean()}  # noqa: E731
    result = zokern.check(model, named, [x, 2 * x], batch_weights=[1.0, 2.0], reduction="sum", loss_weights={"b": 0.5})
    assert result.ok
    assert result.cost.forwards == 4
    want = sum(w * (model(y).square().mean() + 0.5 * model(y).abs().mean()) for w, y in ((1, x), (2, 2 * x)))
    assert result.loss == pytest.approx(want.item(), rel=1e-6)
    for bad, error in ((lambda: model(x), TypeError), (lambda: "one", TypeError), (dict, ValueError)):
        with pytest.raises(error, match="closure"):
            zokern.check(model, bad)


def test_what_is_refused() -> None:
    model = norms()
    opt, closure = zokern.MeZO(model, lr=1e-3), lambda: model(inputs()).sum()
    for bad, words in (
        (lambda: zokern.check(opt, closure, eps=1e-2), "eps is the optimizer's own"),
        (lambda: zokern.check(opt, closure, placement="shadow"), "placement is the optimizer's own"),
        (lambda: zokern.check(torch.optim.SGD(model.parameters(), 1e-3), closure), "give an optimizer of zokern"),
        (lambda: zokern.check(model, None), "check needs a closure"),
        (lambda: zokern.check(model, closure, eps=0.0), "eps is 0.0"),
        (lambda: zokern.check(model, closure, placement="nowhere"), "placement is 'nowhere'"),
        (lambda: zokern.check(model, closure, max_seconds=-1.0), "max_seconds"),
        (lambda: zokern.check(model, closure, max_tensors=0), "max_tensors"),
        (lambda: zokern.check(model, closure, []), "batches is empty"),
        (lambda: zokern.check(model.double(), closure), "float64"),
        (lambda: zokern.check(norms().requires_grad_(False), closure), "no parameter with requires_grad=True"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            bad()


def test_inside_a_step_it_is_refused() -> None:
    model = models.small()
    opt, before = zokern.MeZO(model, lr=1e-3), models.all_bits(model)

    def closure() -> torch.Tensor:
        zokern.check(opt, model)
        return model()

    with pytest.raises(RuntimeError, match="inside a step"):
        opt.step(closure)
    opt.step(model)
    assert opt.counters["steps"] == 1
    assert not models.same_bits(before, models.all_bits(model))


def test_a_dtensor_is_refused_in_the_optimizers_words() -> None:
    from torch.testing._internal.two_tensor import TwoTensor  # a subclass with tensors in it, as DTensor is

    param = nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3)))
    with pytest.raises(TypeError) as refused:
        zokern.MeZO([param], lr=1e-3)
    with pytest.raises(TypeError) as also:
        zokern.check([param], lambda: param.sum())
    assert str(also.value) == str(refused.value)


def test_the_table() -> None:
    model = models.toy()
    model.layers[0].inner.weight.requires_grad_(False)
    model.unused = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
    text = str(zokern.check(model, model))
    assert "embedding.weight = head.weight" in text
    assert "unused.*.weight (2)" in text
    assert "no effect seen up to" in text
    assert "layers.0.inner.weight" in text
    assert "not trained: requires_grad is False" in text
    assert "nothing suspicious was seen" in text
    assert "MeZO: 2 forwards" in text
    assert max(map(len, text.splitlines())) <= 118
    bad = zokern.check(model, lambda: 1.0)
    assert not bad.ok
    assert "something is likely wrong" in str(bad)


def test_rich_prints_it_too() -> None:
    import io

    from rich.console import Console

    model = models.toy()
    console = Console(file=io.StringIO(), width=80)
    console.print(zokern.check(model, model))
    assert "nothing suspicious was seen" in console.file.getvalue()


@given(st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=6).map(".".join), st.integers(4, 20))
def test_names_go_on_after_a_dot(name: str, width: int) -> None:
    shown = wrapped(name, width)
    assert shown.replace("\n  ", "") == name
    assert all(len(line) <= width for line in shown.splitlines())
    assert all(line.endswith(".") for line in shown.splitlines()[:-1])
    assert wrapped("layers.*.weight (3)", 15) == "layers.*.weight\n  (3)"


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = models.toy()
    zokern.check(model, model)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    zokern.check(model, model)
    assert "zokern.check" in capsys.readouterr().err
    zokern.check(model, model, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("placement", ["inplace", "shadow", "stream"])
def test_on_a_gpu(placement: str) -> None:
    model = models.seeded(models.Net, torch.float16, device="cuda")
    x, before, state = torch.arange(6).reshape(2, 3).cuda(), models.all_bits(model), torch.cuda.get_rng_state()
    result = zokern.check(
        model, lambda: model(x).float().square().mean() + torch.rand((), device="cuda"), placement=placement
    )
    assert models.same_bits(before, models.all_bits(model))
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert result.noise == 0.0
    assert not result.same_twice
    assert {row.state for row in result.rows} == {REACTS}


def test_docs_show_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """All but its numbers, which are those of the page's day."""
    page = (Path(__file__).parents[2] / "docs" / "check.md").read_text()
    ((example, shown),) = re.findall(r"```python\n(.*?)```\n\nIt prints:\n\n```text\n(.*?)```", page, flags=re.DOTALL)
    exec(example, {})
    plain = [re.sub(r"\d+(\.\d+)?(e-\d+)?", "#", text) for text in (shown, capsys.readouterr().out)]
    assert plain[0] == plain[1]
