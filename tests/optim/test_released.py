"""Released settings give the released code's steps: every row of the pages' tables, against recurrences of its own.

The recurrences are written from the files that docs/released.py names, in float64, and know nothing of our methods: a step
takes the loss, the weights and the noise of direction k, and returns other weights. Weights start at 0, where moves of 1e-9
have all their digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import zokern
from docs.released import RECIPES, Recipe, es, fzoo, released
from tests import oracles
from tests.methods import relative_error
from tests.oracles import Theta
from zokern.contract import reference

SEED = 31
Loss = Callable[[Theta], float]
Noise = Callable[[int], Theta]  # of direction k
EACH = pytest.mark.parametrize("recipe", RECIPES, ids=[f"{one.page}-{i}" for i, one in enumerate(RECIPES)])


def plus(theta: Theta, scale: float, z: Theta) -> Theta:
    return {i: value + scale * z[i] for i, value in theta.items()}


class Code:
    """What a released trainer keeps between steps, and its step."""

    def __init__(self, code: dict[str, Any]) -> None:
        self.code, self.past, self.best, self.h = code, [], None, None
        self.lr, self.eps = code.get("LR", 0.0), code.get("EPS", 1e-3)

    def along(self, theta: Theta, loss: Loss, v: Theta) -> float:
        """The two-sided difference quotient."""
        return (loss(plus(theta, self.eps, v)) - loss(plus(theta, -self.eps, v))) / (2 * self.eps)

    def mezo(self, theta: Theta, loss: Loss, noise: Noise) -> Theta:
        z = noise(0)
        return plus(theta, -self.lr * self.along(theta, loss, z), z)

    def adamezo(self, theta: Theta, loss: Loss, noise: Noise) -> Theta:
        window, b1, b2 = (self.code[name] for name in ("HESS_WINDOW", "BETA1", "BETA2"))
        z = noise(0)
        self.past.append((self.along(theta, loss, z), z))
        if len(self.past) - 1 <= window:
            return plus(theta, -self.lr * self.past[-1][0], z)
        last = self.past[-window:]
        new = {}
        for i, value in theta.items():
            up = sum(c * b1 ** (window - 1 - at) * z[i] for at, (c, z) in enumerate(last))
            down = sum(c**2 * b2 ** (window - 1 - at) * z[i] ** 2 for at, (c, z) in enumerate(last))
            new[i] = value - self.lr * 100 * up / (np.sqrt(down) + 1e-5)
        return new

    def hizoo(self, theta: Theta, loss: Loss, noise: Noise) -> Theta:
        a = float(self.code["HESSIAN_SMOOTH_TYPE"].removeprefix("constant"))
        self.h = self.h or {i: np.ones_like(value) for i, value in theta.items()}
        z, here = noise(0), loss(theta)
        probe = {i: z[i] / np.sqrt(self.h[i]) for i in z}
        high, low = loss(plus(theta, self.eps, probe)), loss(plus(theta, -self.eps, probe))
        bend = abs(high + low - 2 * here) / (2 * self.eps**2)
        self.h = {i: (1 - a) * h + bend * h * z[i] ** 2 * a for i, h in self.h.items()}
        return plus(theta, -self.lr * (high - low) / (2 * self.eps), {i: z[i] / np.sqrt(self.h[i]) for i in z})

    def gv(self, theta: Theta, loss: Loss, noise: Noise, *, keeps: bool) -> Theta:
        tried = [noise(0), noise(1)]
        if keeps and self.best is not None:
            tried[1] = self.best
        each = [loss(plus(theta, self.eps, z)) for z in tried]
        self.best, worst = tried[int(np.argmin(each))], tried[int(np.argmax(each))]
        v = plus(self.best, -1.0, worst)
        return plus(theta, -self.lr * self.along(theta, loss, v), v)

    def greedy(self, theta: Theta, loss: Loss, noise: Noise) -> Theta:
        z = min((noise(0), noise(1)), key=lambda z: loss(plus(theta, self.eps, z)))
        return plus(theta, -self.lr * self.along(theta, loss, z), z)

    def fzoo(self, theta: Theta, loss: Loss, noise: Noise) -> Theta:
        n = self.code["FORWARD_N"]
        signs = [noise(k) for k in range(n)]
        each = [loss(plus(theta, self.eps, z)) for z in signs]
        here, spread = loss(theta), np.std(each)  # 1/N
        for value, z in zip(each, signs, strict=True):
            theta = plus(theta, -self.lr * (value - here) / (n * spread), z)
        return theta

    def es(self, theta: Theta, loss: Loss, noise: Noise) -> Theta:
        n = self.code["population_size"]
        tried = [noise(k) for k in range(n)]
        rewards = [loss(plus(theta, self.code["sigma"], z)) for z in tried]
        for r, z in zip(rewards, tried, strict=True):
            theta = plus(theta, self.code["alpha"] / n * (r - np.mean(rewards)) / (np.std(rewards) + 1e-8), z)
        return theta

    def step_of(self, recipe: Recipe) -> Callable[[Theta, Loss, Noise], Theta]:
        if recipe.page == "mezo-gv":
            keeps = "keep_best" in recipe.ours
            return lambda *given: self.gv(*given, keeps=keeps)
        name = "adamezo" if "HESS_WINDOW" in self.code else recipe.page.removeprefix("mezo-")
        step: Callable[[Theta, Loss, Noise], Theta] = getattr(self, name)
        return step


def bowl(reward: bool) -> tuple[nn.Module, Loss]:
    """Two tensors at 0, and a smooth function of them in float64: slopes of about 100."""
    model = nn.Linear(7, 5)
    for p in model.parameters():
        nn.init.zeros_(p)
    g = np.random.default_rng(2)
    root, b = g.standard_normal((40, 40)), 20 * g.standard_normal(40)

    def loss(theta: Theta) -> float:
        x = np.concatenate([theta[0].ravel(), theta[1].ravel()])
        value = float(np.sum((root @ x) ** 2) / 2 - b @ x + 3.0 * np.sin(5 * x).sum())
        return -value if reward else value

    return model, loss


def noise_of(theta: Theta, step: int, distribution: str) -> Noise:
    def of(k: int) -> Theta:
        seed = reference.derive_seed(SEED, step, k)
        return {i: oracles.noise(v.size, seed, i, distribution).reshape(v.shape) for i, v in theta.items()}

    return of


def run(recipe: Recipe, arguments: dict[str, Any], steps: int, first: int = 0) -> tuple[Theta, Theta, Theta]:
    """Ours, theirs, and where step `first` began. The steps before it are theirs, and ours only measures."""
    model, loss = bowl(reward=recipe.cls == "ES")
    opt = getattr(zokern, recipe.cls)(model, placement="shadow", seed=SEED, **arguments)
    distribution = opt.options["distribution"]
    step = Code(dict(recipe.code)).step_of(recipe)
    theta = start = oracles.theta_of(model)
    for t in range(steps):
        opt.step(lambda: loss(oracles.theta_of(model)))
        theta = step(theta, loss, noise_of(theta, t, distribution))
        if t < first:
            oracles.load(model, theta)
            start = theta = oracles.theta_of(model)
    return oracles.theta_of(model), theta, start


@EACH
def test_a_row_of_a_table_is_the_released_codes_step(recipe: Recipe) -> None:
    plain = 11 if "HESS_WINDOW" in recipe.code else 0  # steps of another kind, which only `scale` has
    ours, theirs, start = run(recipe, dict(recipe.ours), plain + 4, plain)
    assert relative_error(ours, theirs, start) < 3e-5


@pytest.mark.parametrize("recipe", [one for one in RECIPES if one.named], ids=lambda one: f"{one.page} {one.what}")
def test_a_released_setting_by_name(recipe: Recipe) -> None:
    steps = 16 if "HESS_WINDOW" in recipe.code else 4
    for count in (1, steps):
        assert relative_error(*run(recipe, dict(recipe.named), count)) < 3e-5


def test_conversions() -> None:
    """The issue's: lr eps sqrt(N / (N - 1)) and alpha sigma; thousands of times what was given."""
    assert fzoo(5e-5, 1e-4, 8)["ours"]["lr"] == pytest.approx(5e-5 * 1e-4 * math.sqrt(8 / 7))
    assert es(1e-3, 5e-4, 30)["ours"]["lr"] == pytest.approx(5e-7)
    assert "lr=5.345e-09" in released("fzoo")
    assert "lr=5e-07" in released("es")


@EACH
def test_a_row_names_a_file_and_a_commit(recipe: Recipe) -> None:
    for source in (recipe.settings, recipe.steps):
        repository, file, commit = source.split()
        assert repository.count("/") == 1
        assert file
        assert len(commit) == 7
        assert int(commit, 16)
        assert f"https://github.com/{repository}/blob/{commit}/{file}" in released(recipe.page)


@pytest.mark.parametrize(("cls", "options"), [("FZOO", {}), ("ES", {}), ("MeZO", {"update": "adamezo"})])
def test_a_state_of_before_is_the_papers(cls: str, options: dict[str, Any]) -> None:
    make = partial(getattr(zokern, cls), maximize=cls == "ES")
    saved = make(bowl(False)[0], 1e-3, **options).state_dict()
    del saved["zokern"]["options"]["scale"]
    make(bowl(False)[0], 1e-3, **options).load_state_dict(saved)
    with pytest.raises(ValueError, match="scale is 'paper' in state_dict and 'released' here"):
        make(bowl(False)[0], 1e-3, scale="released", **options).load_state_dict(saved)


def test_adamezo_without_a_second_moment_is_its_first() -> None:
    model, loss = bowl(reward=False)
    opt = zokern.MeZO(model, 1e-7, update="adamezo", scale="released", horizon=2, betas=(0.5, 0.0), seed=SEED)
    for t in range(4):
        before, theta = oracles.theta_of(model), oracles.theta_of(model)
        opt.step(lambda: loss(oracles.theta_of(model)))
        c = [float(c) for _, _, (c,) in opt.history()]
        z = [noise_of(theta, t - age, "normal")(0) for age in range(len(c))]
        want = plus(before, -1e-7 * c[0], z[0])
        if t == 3:
            want = {i: before[i] - 1e-5 * (c[0] * z[0][i] + 0.5 * c[1] * z[1][i]) for i in before}
        assert relative_error(oracles.theta_of(model), want, before) < 1e-5


@pytest.mark.parametrize("update", ["sgd", "momentum", "adam", "sign"])
def test_scale_is_for_adamezo_only(update: str) -> None:
    with pytest.raises(ValueError, match=f"scale is 'released', which is for update='adamezo'; with update='{update}'"):
        zokern.MeZO(bowl(False)[0], 1e-3, update=update, scale="released")


@pytest.mark.parametrize(
    ("dtype", "still", "moves", "share"),
    [(torch.float16, 0.1, 1.0, (0.06, 0.10)), (torch.bfloat16, 0.03, 0.1, (0.003, 0.007))],
    ids=["float16", "bfloat16"],
)
def test_hizoos_released_curvature_in_16_bit(
    dtype: torch.dtype, still: float, moves: float, share: tuple[float, float]
) -> None:
    """As docs/methods/hizoo.md says: (1 - a) h + d h z^2 a / (2 eps^2), each operation rounded, d the losses' bend."""
    z = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    h = torch.ones_like(z)

    def new(d: float) -> torch.Tensor:
        risen = torch.tensor(d, dtype=dtype) * (h * z * z) * 1e-8 / (2 * 1e-3**2)
        return (1 - 1e-8) * h + risen

    assert torch.equal(new(0.0), h)
    assert torch.equal(new(still), h)
    moved = float((new(moves) != h).double().mean())
    assert share[0] < moved < share[1]
    assert bool((new(100.0) >= h).all())
