"""MeZO's estimate: unbiased, the directional derivative, and good enough to learn from text."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests.models import sentences, transformer
from zokern.contract import reference


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("num_samples", [1, 4])
def test_estimator_is_unbiased_on_a_quadratic(distribution, num_samples):
    """L = x'Ax/2 - b'x: c z = z z' grad exactly, of mean grad and of a variance known for both distributions."""
    d, steps = 16, 1200 // num_samples
    g = torch.Generator().manual_seed(4)
    root = torch.randn(d, d, generator=g, dtype=torch.float64) / math.sqrt(d)
    a, b = root @ root.T, torch.randn(d, generator=g, dtype=torch.float64)
    x0 = torch.randn(d, generator=g)
    gradient = a @ x0.double() - b
    x = nn.Parameter(x0.clone())
    opt = zokern.MeZO(
        [x], 1.0, eps=1e-2, num_samples=num_samples, distribution=distribution, seed=77, placement="inplace"
    )
    estimates = torch.empty(steps, d, dtype=torch.float64)
    for i in range(steps):
        opt.step(lambda: x.double() @ a @ x.double() / 2 - b @ x.double())
        estimates[i] = x0.double() - x.detach().double()
        x.data.copy_(x0)
    square = gradient @ gradient
    variance = (square + gradient**2 if distribution == "normal" else square - gradient**2) / num_samples
    z = (estimates.mean(0) - gradient) / (variance / steps).sqrt()
    assert z.abs().max() < 4.0  # 16 of them: P(fail) 0.1 % if the seed were free
    assert 0.3 < z.square().mean() < 2.2
    # 4th moments are large for products of normals: the variance is tested to 10 % in the mean over coordinates.
    assert (estimates.var(0) / variance).mean() == pytest.approx(1.0, rel=0.1)


def test_estimate_is_the_directional_derivative_of_the_contract():
    """Against autograd: c = z . grad to O(eps^2), with the seed of (run seed, step, 0) and the module's tensor ids."""
    model = transformer(torch.float32)
    opt = zokern.MeZO(model, 0.0, seed=9, eps=1e-3)
    batch = sentences(0)
    loss = model(batch)
    loss.backward()
    for t in range(4):
        opt.step(lambda: model(batch))
        z = [reference.noise(p.numel(), reference.derive_seed(9, t, 0), i) for i, p in enumerate(model.parameters())]
        slope = sum(
            float(torch.from_numpy(n).double() @ p.grad.double().flatten())
            for n, p in zip(z, model.parameters(), strict=True)
        )
        assert opt.metrics["projected_gradient"].item() == pytest.approx(slope, rel=2e-2, abs=5e-3)


TEXT = """Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, and nothing
particular to interest me on shore, I thought I would sail about a little and see the watery part of the world. It is a way
I have of driving off the spleen and regulating the circulation. Whenever I find myself growing grim about the mouth,
whenever it is a damp, drizzly November in my soul, whenever I find myself involuntarily pausing before coffin warehouses,
and bringing up the rear of every funeral I meet, and especially whenever my hypos get such an upper hand of me that it
requires a strong moral principle to prevent me from deliberately stepping into the street, and methodically knocking
people's hats off, then I account it high time to get to sea as soon as I can."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_learns_real_text(dtype):
    """Vowel, consonant or gap: the next character's class from this one's letter, better than its frequencies can say."""
    letters = [c if c.isalpha() else " " for c in TEXT.lower()]
    x = torch.tensor([0 if c == " " else ord(c) - 96 for c in letters])
    y = torch.tensor([0 if c == " " else 1 + (c in "aeiou") for c in letters])
    share = torch.bincount(y[1:]).double() / (len(y) - 1)
    unigram = -(share * share.log()).sum().item()
    model = nn.Embedding(27, 3).to(dtype)
    nn.init.zeros_(model.weight)
    opt = zokern.MeZO(model, 2.0, num_samples=2, eps=1e-2, seed=0)

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(x[:-1]).float(), y[1:])

    start = loss().item()
    for _ in range(100):
        opt.step(loss)
    assert start > unigram
    assert loss().item() < unigram - 0.15
