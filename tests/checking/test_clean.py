"""A check leaves all as it was: weights, buffers, random states, flags, the optimizer, also when it is broken off."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import zokern
from tests import models
from tests.models import all_bits, same_bits, seeded

PLACEMENTS = ("inplace", "shadow", "stream")


class Kept:
    """All that may not change. Draws nothing."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = self.look()

    def look(self) -> list[object]:
        numpy = np.random.get_state()
        return [
            [bits.tolist() for bits in all_bits(self.model)],
            [(name, id(b), b.tolist()) for name, b in self.model.named_buffers()],
            [(name, id(p), p.data_ptr()) for name, p in self.model.named_parameters()],
            [child.training for child in self.model.modules()],
            [len(child._forward_pre_hooks) + len(child._forward_hooks) for child in self.model.modules()],
            torch.get_rng_state().tolist(),
            random.getstate(),
            (numpy[1].tolist(), numpy[2:]),
        ]

    def check(self) -> None:
        for before, after in zip(self.before, self.look(), strict=True):
            assert before == after


class Restless(nn.Module):
    """Changes all it can: running statistics, a buffer that it replaces, flags, random states."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 6)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.2)) for _ in range(2)
        )
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(6))

    def forward(self) -> torch.Tensor:
        self.train()
        self.calls += 1
        x = self.embedding(torch.arange(5))
        for layer in self.layers:
            x = layer(x)
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        random.random()
        np.random.rand()
        return x.float().square().mean() + torch.rand(()) + 0.1 * self.calls


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_everything_is_as_it_was(placement: str, dtype: torch.dtype) -> None:
    model = seeded(Restless, dtype).eval()
    kept = Kept(model)
    result = zokern.check(model, model, placement=placement)
    kept.check()
    assert not result.same_twice
    assert result.noise == 0.0  # every evaluation begins with the same states and buffers
    (told,) = [one.text for one in result.verdicts if one.subject == "same function"]
    assert "calls" in told
    assert "random numbers" in told


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyboardInterrupt, torch.cuda.OutOfMemoryError])
def test_after_an_exception_in_any_evaluation(placement: str, error: type[BaseException]) -> None:
    model = models.small()
    kept, evaluations = Kept(model), zokern.check(model, model, placement=placement).forwards
    for at in range(evaluations):
        count = itertools.count()

        def closure(count=count, at=at) -> torch.Tensor:
            if next(count) == at:
                raise error("here")
            return model()

        # The evaluation that is looked into, at 3, is made again: not everything can be looked into.
        again = at == 3 and issubclass(error, Exception)
        with contextlib.nullcontext() if again else pytest.raises(error, match="here"):
            zokern.check(model, closure, placement=placement)
        kept.check()


@given(at=st.integers(0, 16), placement=st.sampled_from(PLACEMENTS))
@settings(max_examples=15, deadline=None)
def test_after_a_signal(at: int, placement: str) -> None:
    """Ctrl-C that arrives in an evaluation."""
    model = models.small()
    kept, count = Kept(model), itertools.count()

    def closure() -> torch.Tensor:
        if next(count) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return model()

    with pytest.raises(KeyboardInterrupt):
        zokern.check(model, closure, placement=placement)
    kept.check()


def test_a_signal_between_evaluations_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """It arrives while a tensor is being perturbed."""
    from zokern.checking import perturbed

    model = models.small()
    kept, add = Kept(model), perturbed.add_noise_
    seen: list[str] = []

    def killed(*args, **kwargs) -> None:
        if kwargs["out"] is None and not seen:
            seen.append("sent")
            os.kill(os.getpid(), signal.SIGINT)
            seen.append("held back")
        add(*args, **kwargs)

    monkeypatch.setattr(perturbed, "add_noise_", killed)
    with pytest.raises(KeyboardInterrupt):
        zokern.check(model, model)
    assert seen == ["sent", "held back"]
    kept.check()


@pytest.mark.parametrize(("placement", "pipelined"), [("inplace", False), ("shadow", True), ("stream", True)])
def test_a_run_goes_on_with_the_same_bits(placement: str, pipelined: bool, tmp_path) -> None:
    paths = iter([tmp_path / "without.zkj", tmp_path / "with.zkj"])

    def run(check: Callable[[zokern.MeZO, nn.Module], object]) -> tuple[list[torch.Tensor], dict, bytes]:
        path = next(paths)
        model = models.small(torch.bfloat16)
        opt = zokern.MeZO(model, lr=1e-2, placement=placement, pipelined=pipelined, update="adam")
        with zokern.journal.write(opt, path):
            for _ in range(3):
                opt.step(model)
                before = dict(opt.counters), dict(opt.metrics)
                check(opt, model)
                assert (dict(opt.counters), dict(opt.metrics)) == before
        return all_bits(model), opt.counters, path.read_bytes()

    (bits, counters, journal), (bits2, counters2, journal2) = run(lambda *_: None), run(zokern.check)
    assert same_bits(bits, bits2)
    assert counters["steps"] == counters2["steps"]
    assert counters["forwards"] == counters2["forwards"]
    assert journal == journal2


def test_a_placement_of_the_users_own() -> None:
    from zokern.placement import Shadow

    model, own = models.small(), Shadow()
    own.name = "mine"
    opt = zokern.MeZO(model, lr=1e-2, placement=own)
    kept = Kept(model)
    result = zokern.check(opt, model)
    kept.check()
    assert result.ok
    assert opt.counters["passes"] == opt.counters["launches"] == 0
    opt.step(model)
    assert opt.counters["passes"] == 3


@pytest.mark.parametrize("placement", ["inplace", "shadow"])
def test_autocast_keeps_no_cast_of_another_weight(placement: str) -> None:
    """Neither of the clean one when it is perturbed, nor the other way round."""
    model, x = models.linear(6, 8, 3), torch.linspace(-1, 1, 12).reshape(2, 6)
    closure = lambda: model(x).float().square().mean()  # noqa: E731
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        loss = closure()
        result = zokern.check(model, closure, placement=placement, eps=1e-1)
        assert torch.equal(closure(), loss)
    assert [row.size for row in result.rows] == [1e-1] * 4, str(result)
