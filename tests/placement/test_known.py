"""What the host knows of a step it does not ask torch: a step that is ok by the host's own numbers has the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.methods import CASES, METHODS, Case, build, equal, given, scripted, weights
from tests.models import small
from zokern.optim.numbers import HostNumbers
from zokern.passes.update import is_known
from zokern.placement import inplace, shadow
from zokern.placement.shadow import ON

PLACES = pytest.mark.parametrize("place", ["inplace", "shadow"])


def after(case: Case, place: str, losses: list[list[float]]) -> tuple[list[Tensor], int]:
    model = small()
    opt = build(case, model, placement=place, weight_decay=0.1)
    states: list[Tensor] = []
    for values in losses:
        opt.step(scripted(values))
    for p in model.parameters():
        states += opt.state[p].values()
    return [*weights(model), *states], opt.skipped_steps


@PLACES
@CASES
@pytest.mark.filterwarnings("ignore:a loss was not finite")
def test_the_bits_are_those_of_a_step_that_asks_torch(case: Case, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a step that is skipped in between, whose numbers nobody may take."""
    losses = [given(case, t) for t in range(4)]
    losses[2] = [float("nan"), *losses[2][1:]]
    known, skipped = after(case, place, losses)
    for module in (inplace, shadow):
        monkeypatch.setattr(module, "is_known", lambda ok, gate: False)
    asked, also = after(case, place, losses)
    assert equal(known, asked)
    assert skipped == also == 1


class Closed(HostNumbers):
    gate = torch.zeros(1, dtype=torch.int32)


@PLACES
@CASES
def test_a_gate_on_the_host_is_not_looked_at(case: Case, place: str) -> None:
    """Of a captured step, which may be launched with it closed: its passes look, and nothing moves or is remembered."""
    model = small()
    opt = build(case, model, placement=place, weight_decay=0.1)
    opt.step(scripted(given(case, 0)))
    before = [t.clone() for own in opt.state.values() for t in own.values()], weights(model)
    opt.step_with(Closed(opt.param_groups, opt.seed, 1, opt.schedule), scripted(given(case, 1)))
    assert equal([t for own in opt.state.values() for t in own.values()], before[0])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(weights(model), before[1], strict=True))
    assert not is_known(torch.tensor(True), Closed.gate)


def test_a_pass_that_moves_nothing_is_found_by_its_rounded_numbers() -> None:
    """A coefficient that is 0 in float32 moves nothing, and -0.0 stays."""
    model = small()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(-0.0)
    opt = build(METHODS["mezo"], model, placement="shadow", weight_decay=1e-30)
    opt.param_groups[0]["lr"] = 1e-60
    opt.step(scripted(given(METHODS["mezo"], 0)))
    assert all(bool(torch.signbit(p).all()) for p in model.parameters())
    opt.param_groups[0]["lr"] = 1e-3
    opt.step(scripted(given(METHODS["mezo"], 0)))
    assert not any(bool(torch.signbit(p).all()) for p in model.parameters())
    assert ON.tolist() == [1]
