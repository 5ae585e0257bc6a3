"""eps and lr that overflow are refused before any pass, wherever they come from; what is large and good is taken."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import zokern
from tests.methods import METHODS, build, equal, weights
from tests.models import small
from tests.optim.whole import PLACES
from zokern.optim.drivers import Rounds
from zokern.optim.update import Estimate

BAD = [("eps", 1e308), ("eps", 1e37), ("eps", 1e-40), ("lr", 1e39), ("lr", 1e308), ("weight_decay", 1e39)]
DTYPES = [torch.float32, torch.bfloat16]


def never() -> float:
    raise AssertionError("nothing is evaluated")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("name", "value"), BAD)
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_a_group_that_was_changed_later(place: str, name: str, value: float, tensor: bool) -> None:
    if tensor and "pipelined" in place and name == "eps":
        pytest.skip("it takes no tensor for eps")
    model = small()
    opt = build(METHODS["mezo"], model, **PLACES[place])
    opt.step(lambda: model())
    good, before = opt.param_groups[0][name], weights(model)
    opt.param_groups[0][name] = torch.tensor(value, dtype=torch.float64) if tensor else value
    with pytest.raises(ValueError, match=f"^{name}"):
        opt.step(never)
    assert equal(before, weights(model))
    assert opt.counters["steps"] == 1
    opt.param_groups[0][name] = good
    opt.step(lambda: model())


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_constructor(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        zokern.MeZO(small(), **{"lr": 1e-3, name: value})


def test_lr_times_weight_decay() -> None:
    opt = zokern.MeZO(small(), 1e20, weight_decay=1e10)
    opt.param_groups[0]["weight_decay"] = 1e20
    with pytest.raises(ValueError, match=r"^lr \* weight_decay is 1e\+40"):
        opt.step(never)


def test_eps_for_float16_in_any_group() -> None:
    """The largest float16 is 65504, and eps a 64th of that."""
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3).half())
    groups: list[dict[str, Any]] = [{"params": [a]}, {"params": [b]}]
    opt = zokern.MeZO(groups, 1e-3, eps=1000.0)
    opt.step(lambda: 1.0)
    assert torch.isfinite(b).all()
    opt.param_groups[0]["eps"] = 1e30
    opt.param_groups[1]["eps"] = 1024.0
    with pytest.raises(ValueError, match=r"^eps of group 1 is 1024; for float16 weights"):
        opt.step(never)


def test_weights_that_become_float16_later() -> None:
    """The numbers have not changed since they were looked at."""
    p = nn.Parameter(torch.ones(3))
    opt = zokern.MeZO([p], 1e-3, eps=5000.0)
    opt.step(lambda: 1.0)
    p.data = p.data.half()
    with pytest.raises(ValueError, match=r"^eps is 5000; for float16"):
        opt.step(never)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["mezo", "gv", "es-antithetic", "fzoo"])
def test_the_largest_eps_that_is_taken_overflows_nowhere(dtype: torch.dtype, method: str) -> None:
    model = small(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()  # nothing that the way back could lose
    opt = build(METHODS[method], model, placement="inplace", eps=float(torch.finfo(dtype).max) / 64)
    seen: list[bool] = []

    def closure() -> float:
        seen.append(all(bool(torch.isfinite(p).all()) for p in model.parameters()))
        return 1.0

    opt.step(closure)
    assert all(seen)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


class Far(zokern.MeZO):
    """A method of somebody's, whose probe is far away."""

    far = 1e300

    def rounds(self) -> Rounds:
        seed = self.numbers.seed(0)
        (loss,) = yield [{seed: self.far}]
        return Estimate({seed: loss}, loss)


@pytest.mark.parametrize("place", ["inplace", "shadow"])
def test_a_probe_that_goes_too_far(place: str) -> None:
    model = small()
    before, opt = weights(model), Far(model, 1e-3, placement=place)
    with pytest.raises(ValueError, match=r"a probe goes 1e\+300 times eps = 0.001 away"):
        opt.step(never)
    assert equal(before, weights(model))
    opt.far = 100.0
    opt.step(lambda: 1.0)


def test_a_group_that_is_refused_is_not_there() -> None:
    model, other = small(), nn.Parameter(torch.ones(3))
    opt = zokern.MeZO(model, 1e-3)
    before = opt.state_dict()["zokern"]["names"]
    for bad in (
        {"params": [other], "eps": 1e308}, {"params": [other], "lr": -1.0}, {"params": [torch.ones(3, dtype=torch.int64)]},
        {"params": [other, nn.Parameter(torch.ones(4, 3).T)]},
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError)):
            opt.add_param_group(bad)
        assert opt.state_dict()["zokern"]["names"] == before
        opt.step(lambda: 1.0)
    opt.add_param_group({"params": [other]})
    assert opt.state_dict()["zokern"]["names"][1] == [f"parameter {len(before[0])}"]


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 1e7), (torch.bfloat16, 100.0), (torch.float16, 900.0)])
@pytest.mark.parametrize("later", [False, True])
def test_in_place_an_eps_that_leaves_nothing_of_the_weights_is_refused(
    dtype: torch.dtype, eps: float, later: bool
) -> None:
    """Taking eps z away again rounds to the spacing of numbers like eps z: here as large as the weights."""
    model = nn.Linear(64, 1, bias=False, dtype=dtype)
    p = nn.init.constant_(model.weight, 0.5)
    opt = zokern.MeZO(model, 0.0, eps=1e-3 if later else eps, placement="inplace")
    if later:
        opt.step(lambda: p.float().square().mean())
        opt.param_groups[0]["eps"] = eps
    before = p.detach().clone()
    for _ in range(2):
        with pytest.raises(ValueError, match=re.escape(f"eps is {eps:g}, and the weights' rms is 0.5")):
            opt.step(never)
    assert torch.equal(p, before)
    opt.param_groups[0]["eps"] = 0.1  # the remedies: a part of the rms,
    opt.step(lambda: p.float().square().mean())
    torch.testing.assert_close(p.detach(), before, atol=0.01, rtol=0.0)
    before = p.detach().clone()
    zokern.MeZO(model, 0.0, eps=eps, placement="shadow").step(lambda: 1.0)  # or shadow
    assert torch.equal(p, before)
