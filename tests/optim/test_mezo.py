"""MeZO against its float64 oracle, in 16 bit to the last bit, and with settings that change between steps."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zokern
from tests import devices, oracles
from tests.methods import PLACEMENTS, relative_error, scripted
from tests.models import all_bits, bits, linear, same_bits, sentences, transformer
from tests.optim.scripts import SAMPLES, SIXTEEN, assert_equal_to_rounding, script
from zokern.contract import reference

ON_DEVICE = [
    (name, str(devices.DEVICE[name])) for name in ("cpu", "reference", "cuda") if devices.missing(name) is None
]
BACKENDS = pytest.mark.parametrize(("backend", "device"), ON_DEVICE, ids=[b for b, _ in ON_DEVICE])
NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def two_groups(model: nn.Module) -> tuple[list[dict[str, Any]], list[oracles.Group]]:
    """Matrices decay; vectors do not and have their own lr and eps."""
    every = list(model.parameters())
    matrices = [i for i, p in enumerate(every) if p.dim() > 1]
    vectors = [i for i, p in enumerate(every) if p.dim() == 1]
    ours = [
        {"params": [every[i] for i in matrices], "lr": 2e-3, "eps": 1e-3, "weight_decay": 0.5},
        {"params": [every[i] for i in vectors], "lr": 7e-3, "eps": 3e-3, "weight_decay": 0.0},
    ]
    return ours, [oracles.Group(matrices, 2e-3, 1e-3, 0.5), oracles.Group(vectors, 7e-3, 3e-3, 0.0)]


# -------------------------------------------------------------------------------------------------- against the oracle


@BACKENDS
@PLACEMENTS
@SAMPLES
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_five_steps_with_given_losses(backend, device, placement, num_samples, distribution):
    if backend == "reference" and (distribution == "rademacher") == (num_samples == 1):
        pytest.skip("slow; two of four are enough")
    model = transformer(device=device)
    start = oracles.theta_of(model)
    groups, expected_groups = two_groups(model)
    opt = zokern.MeZO(
        model, 1.0, num_samples=num_samples, distribution=distribution, seed=12, placement=placement, backend=backend
    )
    opt.param_groups = groups
    expected = oracles.MeZO(start, expected_groups, distribution, 12, num_samples=num_samples)
    losses = script(5, num_samples)
    closure, oracle_closure = scripted(losses), scripted(losses)
    for _ in range(5):
        loss = opt.step(closure)
        assert loss.item() == pytest.approx(expected.step(oracle_closure), rel=1e-6)
        plus, minus = np.reshape(expected.losses, (-1, 2)).T
        projected = np.mean(plus - minus) / (2.0 * expected_groups[0].eps)
        assert opt.metrics["projected_gradient"].item() == pytest.approx(projected, rel=1e-5)
    assert_equal_to_rounding(model, expected.theta, start, 5 * (2 * num_samples + 1))


@BACKENDS
@PLACEMENTS
@SAMPLES
def test_five_steps_with_real_losses(backend, device, placement, num_samples):
    if backend == "reference" and num_samples == 3:
        pytest.skip("slow; covered with given losses")
    model, exact = transformer(device=device), transformer(torch.float64)
    start = oracles.theta_of(model)
    groups, expected_groups = two_groups(model)
    opt = zokern.MeZO(model, 1.0, num_samples=num_samples, seed=3, placement=placement, backend=backend)
    opt.param_groups = groups
    expected = oracles.MeZO(start, expected_groups, seed=3, num_samples=num_samples)
    oracles.load(exact, start)

    def exact_loss(theta: oracles.Theta) -> float:
        oracles.load(exact, theta)
        with torch.no_grad():
            return float(exact(batch))

    for t in range(5):
        batch = sentences(t)
        there = batch.to(device)
        loss = opt.step(lambda there=there: model(there))
        assert loss.item() == pytest.approx(expected.step(exact_loss), rel=1e-5)
    # The forwards are float32: their rounding, over 2 eps, is the error of c, about 1e-3 of it here.
    assert relative_error(oracles.theta_of(model), expected.theta, start) < 5e-3


def run_16_bit(dtype, device, backend, placement, num_samples, rounding, closure_for):
    """Two steps of MeZO on 16-bit weights; yields before and after each."""
    model = transformer(dtype, device)
    opt = zokern.MeZO(
        model,
        3e-3,
        eps=2e-3,
        weight_decay=0.1,
        num_samples=num_samples,
        seed=5,
        rounding=rounding,
        placement=placement,
        backend=backend,
    )
    losses = script(2, num_samples)
    for t in range(2):
        before = all_bits(model)
        mine = losses[t * 2 * num_samples : (t + 1) * 2 * num_samples]
        opt.step(closure_for(model, t, before, mine))
        yield t, before, all_bits(model), mine


def expected_bits(before: list[Tensor], dtype, seeds, coefs, decay=1.0, rounding_seed=None) -> list[Tensor]:
    out = []
    for i, b in enumerate(before):
        new = reference.add_noise(
            b.numpy().reshape(-1).view(np.uint16),
            dtype=NAMES[dtype],
            tensor_id=i,
            seeds=seeds,
            coefs=coefs,
            decay=decay,
            rounding="nearest" if rounding_seed is None else "stochastic",
            rounding_seed=rounding_seed or 0,
        )
        out.append(torch.from_numpy(new.view(np.int16).reshape(b.shape).copy()))
    return out


def update_of(losses: list[float], num_samples: int, step: int) -> tuple[list[int], list[float]]:
    """Seeds, and -lr c_k / n."""
    seeds = [reference.derive_seed(5, step, k) for k in range(num_samples)]
    c = [(losses[2 * k] - losses[2 * k + 1]) / (2 * 2e-3) for k in range(num_samples)]
    return seeds, [-3e-3 * x / num_samples for x in c]


@BACKENDS
@SAMPLES
@pytest.mark.parametrize(("dtype", "rounding"), [(d, r) for d in SIXTEEN for r in ("nearest", "stochastic")], ids=str)
def test_shadow_in_16_bit_is_one_rounding_of_the_equation(backend, device, num_samples, dtype, rounding):
    """What the closure sees is round(theta +- eps z), and the update is round((1 - lr wd) theta - lr c z), bit for bit."""

    def closure_for(model, t, before, losses):
        seen = iter([(k, sign) for k in range(num_samples) for sign in (1.0, -1.0)])
        values = scripted(losses)

        def closure() -> Tensor:
            k, sign = next(seen)
            want = expected_bits(before, dtype, [reference.derive_seed(5, t, k)], [sign * 2e-3])
            assert same_bits(all_bits(model), want)
            return values()

        return closure

    moved = 0
    for t, before, after, losses in run_16_bit(dtype, device, backend, "shadow", num_samples, rounding, closure_for):
        seeds, coefs = update_of(losses, num_samples, t)
        rounding_seed = None if rounding == "nearest" else reference.derive_seed(5, t, 1 << 32)
        want = expected_bits(before, dtype, seeds, coefs, 1.0 - 3e-3 * 0.1, rounding_seed)
        assert same_bits(after, want)
        moved += sum(int((a != b).sum()) for a, b in zip(before, after, strict=True))
    assert moved > 500


@BACKENDS
@SAMPLES
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_inplace_in_16_bit_is_its_documented_chain_of_passes(backend, device, num_samples, dtype):
    """+eps z_0, then -2 eps z_k, then +eps z_k + eps z_(k+1) ..., then the restore and the update in one pass."""
    eps = 2e-3

    def closure_for(model, t, before, losses):
        return scripted(losses)

    for t, before, after, losses in run_16_bit(dtype, device, backend, "inplace", num_samples, "nearest", closure_for):
        seeds, coefs = update_of(losses, num_samples, t)
        w = expected_bits(before, dtype, seeds[:1], [eps])
        for k in range(num_samples):
            w = expected_bits(w, dtype, [seeds[k]], [-2 * eps])
            if k + 1 < num_samples:
                w = expected_bits(w, dtype, seeds[k : k + 2], [eps, eps])
        decay = 1.0 - 3e-3 * 0.1
        coefs[-1] += decay * eps
        assert same_bits(after, expected_bits(w, dtype, seeds, coefs, decay))


def test_auto_rounding_and_placement():
    """auto: stochastic and shadow in 16 bit, nearest and in place in float32 (whose weights move during the closure)."""
    for dtype, rounding, moves in ((torch.bfloat16, "stochastic", False), (torch.float32, "nearest", True)):
        results = []
        for options in ({}, {"rounding": rounding}):
            model = linear(9, 7, 3, dtype=dtype)
            storage, clean = [p.data for p in model.parameters()], all_bits(model)
            moved = []

            def closure(storage=storage, clean=clean, moved=moved) -> float:
                moved.append(not same_bits([bits(s) for s in storage], clean))
                return 1.0 + 0.01 * len(moved)

            zokern.MeZO(model, 1e-2, seed=1, **options).step(closure)
            assert moved == [moves, moves]
            results.append(all_bits(model))
        assert same_bits(*results)


@pytest.mark.filterwarnings("ignore:the losses of 5 steps")
def test_stochastic_rounding_lets_small_updates_through():
    """Updates of a hundredth of a bf16 ulp: lost to nearest, right in the mean when rounded stochastically."""
    moved = {}
    for rounding in ("nearest", "stochastic"):
        model = nn.Linear(100, 100, bias=False).bfloat16()
        with torch.no_grad():
            model.weight.fill_(1.0)
        opt = zokern.MeZO(
            model, 1.0, eps=1e-3, weight_decay=4e-5, rounding=rounding, placement="shadow", distribution="rademacher"
        )
        for _ in range(100):
            opt.step(lambda: 1.0)
        moved[rounding] = 1.0 - model.weight.double().mean().item()
    assert moved["nearest"] == 0.0
    # 100 decays of 4e-5, drawn in units of 2^-8 by 10^4 elements: standard deviation 2^-8 sqrt(100 * 0.01 / 10^4).
    assert moved["stochastic"] == pytest.approx(1 - (1 - 4e-5) ** 100, abs=5 * 2**-8 * 0.01)


# ----------------------------------------------------------------------------------------------------- hyper-parameters


@PLACEMENTS
def test_lr_schedulers_reach_the_update(placement):
    model = linear(6, 5, 2)
    start, losses = oracles.theta_of(model), script(4, 1)
    opt = zokern.MeZO(model, 2e-2, seed=2, weight_decay=0.3, placement=placement)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where a scheduler steps before the optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1.0 / (1 + t))
        expected = oracles.MeZO(start, [oracles.Group(range(4), 2e-2, weight_decay=0.3)], seed=2)
        closure, oracle_closure = scripted(losses), scripted(losses)
        for t in range(4):
            expected.groups[0].lr = 2e-2 / (1 + t)
            opt.step(closure)
            expected.step(oracle_closure)
            schedule.step()
    assert_equal_to_rounding(model, expected.theta, start, 4 * 3)


def test_lr_as_tensor_and_its_scheduler():
    """A tensor lr, filled in place, is read at each step."""
    results = []
    for lr in (2.0**-6, torch.tensor(2.0**-6), torch.tensor([2.0**-6], dtype=torch.float64).reshape(())):
        model = linear(6, 5, 2)
        opt = zokern.MeZO(model, lr, seed=2, weight_decay=0.5)
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 0.5**t)
        closure = scripted(script(3, 1))
        for _ in range(3):
            opt.step(closure)
            schedule.step()
        assert float(opt.param_groups[0]["lr"]) == 2.0**-9
        results.append(all_bits(model))
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


@PLACEMENTS
def test_eps_and_weight_decay_are_read_at_each_step(placement):
    model = linear(6, 5, 2)
    start, losses = oracles.theta_of(model), script(3, 1)
    opt = zokern.MeZO(model, 1e-2, seed=2, placement=placement)
    group = oracles.Group(range(4), 1e-2)
    expected = oracles.MeZO(start, [group], seed=2)
    closure, oracle_closure = scripted(losses), scripted(losses)
    for eps, decay in ((1e-3, 0.0), (5e-3, 2.0), (2e-4, 0.1)):
        group.eps, group.weight_decay = eps, decay
        opt.param_groups[0].update(eps=eps, weight_decay=decay)
        opt.step(closure)
        expected.step(oracle_closure)
    assert_equal_to_rounding(model, expected.theta, start, 3 * 3)


def test_groups_given_to_the_constructor():
    """Ids follow the order given, over groups; a group's missing options are the defaults."""
    model = linear(6, 5, 4, 2)
    start, losses = oracles.theta_of(model), script(3, 2)
    every = list(model.parameters())
    opt = zokern.MeZO(
        [
            {"params": every[:2], "lr": 3e-2, "weight_decay": 1.0},
            {"params": iter(every[2:5]), "eps": 4e-3},
            {"params": every[5]},
        ],
        1e-2,
        num_samples=2,
        seed=2,
    )
    groups = [
        oracles.Group([0, 1], 3e-2, weight_decay=1.0),
        oracles.Group([2, 3, 4], 1e-2, eps=4e-3),
        oracles.Group([5], 1e-2),
    ]
    expected = oracles.MeZO(start, groups, seed=2, num_samples=2)
    closure, oracle_closure = scripted(losses), scripted(losses)
    for _ in range(3):
        opt.step(closure)
        expected.step(oracle_closure)
    assert_equal_to_rounding(model, expected.theta, start, 3 * 5)
