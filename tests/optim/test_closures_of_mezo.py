"""What a step of MeZO counts, returns and takes from a closure; micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests.methods import PLACEMENTS, scripted
from tests.models import all_bits, linear, same_bits, sentences, transformer
from tests.optim.scripts import SAMPLES, in_turn

# ----------------------------------------------------------------------------------------------------------- counting


@PLACEMENTS
@SAMPLES
def test_forwards_and_passes_are_counted(placement, num_samples, monkeypatch):
    """2n forwards and 2n+1 passes in every step, counted by the optimizer and, apart from it, by the backend."""
    model = transformer()
    n = sum(p.numel() for p in model.parameters())
    opt = zokern.MeZO(model, 1e-3, num_samples=num_samples, placement=placement, backend="cpu")
    calls, forwards = [], []
    original = zokern.backends.cpu.run
    monkeypatch.setattr(zokern.backends.cpu, "run", lambda *a: (calls.append(a[0].numel), original(*a)))

    def closure() -> float:
        forwards.append(1)
        return 1.0

    for t in range(1, 4):
        opt.step(closure)
        assert len(forwards) == 2 * num_samples * t
        assert calls == [n] * ((2 * num_samples + 1) * t)
        assert opt.counters == {
            "steps": t,
            "forwards": 2 * num_samples * t,
            "passes": (2 * num_samples + 1) * t,
            "launches": (2 * num_samples + 1) * t,
            "elements_moved": 2 * n * (2 * num_samples + 1) * t,
        }


def test_mixed_dtypes_are_one_pass_and_a_launch_each():
    model = nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.LayerNorm(4), nn.Linear(4, 4).half())
    opt = zokern.MeZO(model, 1e-3)
    opt.step(lambda: 1.0)
    assert opt.counters["passes"] == 3
    assert opt.counters["launches"] == 9
    assert opt.counters["elements_moved"] == 3 * 2 * (20 + 8 + 20)


def test_step_returns_the_mean_loss_and_metrics():
    model = linear(4, 3)
    opt = zokern.MeZO(model, 1e-3, num_samples=2, eps=0.5)
    losses = [1.0, 2.0, 5.0, 1.0]
    loss = opt.step(scripted(losses))
    assert isinstance(loss, Tensor)
    assert loss.shape == ()
    assert not loss.requires_grad
    assert loss.item() == 2.25
    assert set(opt.metrics) >= {"loss", "projected_gradient"}
    assert opt.metrics["loss"].item() == 2.25
    assert opt.metrics["projected_gradient"].item() == pytest.approx(((1 - 2) + (5 - 1)) / 2 / (2 * 0.5))
    assert opt.skipped_steps == 0


@pytest.mark.filterwarnings("ignore:the closure returns its loss in")
@pytest.mark.parametrize("kind", [float, int, torch.float16, torch.bfloat16, torch.float32, torch.float64, "[1]"])
def test_closure_may_return_any_number(kind):
    values = [3, 1]
    model = linear(4, 3)
    expected = linear(4, 3)
    zokern.MeZO(expected, 1e-3, seed=1).step(scripted([3.0, 1.0]))
    if isinstance(kind, torch.dtype):
        results: list[Any] = [torch.tensor(v, dtype=kind) for v in values]
    elif kind == "[1]":
        results = [torch.tensor([float(v)]) for v in values]
    else:
        results = [kind(v) for v in values]
    zokern.MeZO(model, 1e-3, seed=1).step(in_turn(results))
    assert same_bits(all_bits(model), all_bits(expected))


def test_losses_given_as_numbers_keep_their_precision():
    """c is a small difference over a small number: a Python float must not be rounded to float32 on the way."""
    opt = zokern.MeZO(linear(4, 3), 1e-3, eps=1e-3)
    opt.step(in_turn([1.0 + 1e-9, 1.0]))
    assert opt.metrics["projected_gradient"].item() == pytest.approx(1e-9 / 2e-3, rel=1e-5)


# ------------------------------------------------------------------------------------------------------- accumulation


@PLACEMENTS
def test_accumulation_equals_the_closure_that_averages(placement):
    """One perturbation for all micro-batches: the passes do not grow, and the weights are those of the mean loss."""
    a, b = transformer(), transformer()
    batches = [sentences(i) for i in range(3)]
    one = zokern.MeZO(a, 1e-2, num_samples=2, seed=4, placement=placement)
    two = zokern.MeZO(b, 1e-2, num_samples=2, seed=4, placement=placement)
    for _ in range(2):
        first = one.step(lambda batch: a(batch), (x for x in batches))  # an iterator: read once, used 2n times
        second = two.step(lambda: torch.stack([b(x) for x in batches]).mean())
        assert first.item() == second.item()
    assert same_bits(all_bits(a), all_bits(b))
    assert one.counters["forwards"] == 2 * 4 * 3
    assert one.counters["passes"] == two.counters["passes"] == 2 * 5


def test_accumulation_of_no_batches_is_refused():
    model = linear(3, 2)
    before = all_bits(model)
    with pytest.raises(ValueError, match="batches"):
        zokern.MeZO(model, 1e-2).step(lambda b: 1.0, [])
    assert same_bits(before, all_bits(model))
