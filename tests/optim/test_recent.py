"""recent_metrics: numbers of a recent step, for which nobody waits."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import zokern
from tests.methods import METHODS
from tests.optim.test_no_waiting import Transfers, loss_of, on_device
from zokern.optim import recent


def model_of() -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    return model, zokern.MeZO(model, 1e-2)


@pytest.mark.filterwarnings("ignore::zokern.ZokernWarning")
def test_on_a_cpu_they_are_the_last_step_s() -> None:
    model, opt = model_of()
    assert opt.recent_metrics() == {}
    for _ in range(2):
        opt.step(lambda: {"a": model.weight.sum(), "b": model.bias.sum()})
    opt.step(lambda: {"a": model.weight.sum() * float("nan"), "b": model.bias.sum()})
    opt.step(lambda: {"a": torch.tensor(2.0), "b": torch.tensor(3.0)})
    found = opt.recent_metrics()
    assert found == {
        "step": 4.0, "skipped_steps": 1.0, "flat_steps": 1.0, "large_steps": float(opt.large_steps),
        **{name: float(value) for name, value in opt.metrics.items()},
    }  # fmt: skip
    assert found["loss/a"] == 2.0
    assert found["loss"] == 5.0
    found.clear()
    assert opt.recent_metrics()["step"] == 4.0, "what a caller has is its own"


class Copies:
    """Stands for Arriving: comes when it is let."""

    begun: ClassVar[list[Copies]] = []

    def __init__(self, there: Tensor) -> None:
        self.there, self.here = there.clone(), False
        self.begun.append(self)

    def values(self) -> Any:
        return self.there.tolist() if self.here else None


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[Copies]:
    monkeypatch.setattr(Copies, "begun", [])
    monkeypatch.setattr(recent, "is_far", lambda t: True)
    monkeypatch.setattr(recent, "CPU", torch.device("meta"))  # "the host" is another device than the tensors'
    monkeypatch.setattr(recent, "Arriving", Copies)
    return Copies.begun


def test_of_a_device_they_are_of_an_earlier_call(late) -> None:
    model, opt = model_of()

    def step() -> float:
        return float(opt.step(lambda: model.weight.sum()))

    first = step()
    assert opt.recent_metrics() == {}
    step()
    assert opt.recent_metrics() == {}, "the copy is under way"
    assert len(late) == 1
    late[0].here = True
    third = step()
    found = opt.recent_metrics()
    assert (found["step"], found["loss"]) == (1.0, pytest.approx(first))
    assert len(late) == 2
    step()
    assert opt.recent_metrics() == found, "until the next has come"
    late[1].here = True
    found = opt.recent_metrics()
    assert (found["step"], found["loss"]) == (3.0, pytest.approx(third))
    assert len(late) == 3


def test_nothing_waits(monkeypatch) -> None:
    model, opt = on_device(METHODS["mezo"], "shadow", monkeypatch)
    opt.step(lambda: loss_of(model))
    opt.step(lambda: loss_of(model))
    kept: list[Tensor] = []

    class Noted:
        def __init__(self, there: Tensor) -> None:
            kept.append(there)

    monkeypatch.setattr(recent, "Arriving", Noted)
    with Transfers() as transfers:
        assert opt.recent_metrics() == {}
    assert transfers.waited == []
    assert [t.shape for t in kept] == [torch.Size([6])]
