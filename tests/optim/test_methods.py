"""Every method against its float64 oracle (oracles.py), and what holds for all: placements, backends, saving, layers."""

from __future__ import annotations

import copy
import io
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zokern
from tests import devices, oracles
from tests.methods import (
    CASES,
    EPS,
    METHODS,
    SEED,
    VARIANTS,
    Case,
    assert_close,
    assert_close_states,
    assert_same_states,
    build,
    dropped_tensors,
    equal,
    expected_of,
    given,
    params_of,
    play,
    relative_error,
    scripted,
    state_of,
    states,
    weights,
)
from tests.models import Toy, filled, small, tokens
from tests.oracles import Group, Theta
from zokern.contract import reference

pytestmark = pytest.mark.usefixtures("one_thread")

ON_DEVICE = ["cpu"] + ["cuda"] * torch.cuda.is_available()
PLACEMENTS = pytest.mark.parametrize("placement", ["inplace", "shadow"])


# --------------------------------------------------------------------------------------------------- the oracles themselves


def bowl() -> tuple[Theta, list[Group], Callable[[Theta], float]]:
    """A smooth function of two tensors in groups with settings of their own."""
    g = np.random.default_rng(3)
    root, b = g.standard_normal((27, 27)), g.standard_normal(27)
    a = root @ root.T / 27

    def loss(theta: Theta) -> float:
        x = np.concatenate([theta[0].ravel(), theta[1]])
        return float(x @ a @ x / 2 - b @ x + 0.1 * np.sin(x).sum())

    groups = [Group([0], 0.02, 0.05, 0.3), Group([1], 0.03, 0.1, 0.0)]
    return {0: g.standard_normal((4, 5)), 1: g.standard_normal(7)}, groups, loss


@pytest.mark.parametrize("num_samples", [1, 3])
def test_oracles_that_should_coincide_with_mezo_do(num_samples):
    theta, groups, loss = bowl()
    options: dict[str, Any] = {"seed": SEED, "num_samples": num_samples}
    mezo = oracles.MeZO(theta, groups, **options)
    others = [
        oracles.MeZO(theta, groups, update="momentum", betas=(0.0, 0.0), **options),
        oracles.HiZOO(theta, groups, smoothing=0.0, **options),
        oracles.HELENE(theta, groups, betas=(0.0, 0.0), anneal_steps=1e15, delta=0.0, floor=lambda i: 1e6, **options),
    ]
    others[-1].gamma = 1e-6
    for _ in range(4):
        for o in (mezo, *others):
            o.step(loss)
    for o in others:
        assert all(np.allclose(o.theta[i], mezo.theta[i], rtol=0, atol=1e-12) for i in theta)


def test_oracle_of_adam_is_torch_adamw_on_the_estimate():
    theta, groups, loss = bowl()
    adam = oracles.MeZO(theta, groups, seed=SEED, num_samples=2, update="adam")
    estimate = oracles.MeZO(theta, [Group([0], 1.0, 0.05), Group([1], 1.0, 0.1)], seed=SEED, num_samples=2)
    ours = {i: nn.Parameter(torch.from_numpy(t.copy())) for i, t in theta.items()}
    settings = [{"params": [ours[g.ids[0]]], "lr": g.lr, "weight_decay": g.weight_decay} for g in groups]
    adamw = torch.optim.AdamW(settings, betas=(0.9, 0.999), eps=1e-8)
    for _ in range(4):
        estimate.theta = before = adam.theta
        estimate.step(loss)
        for i, p in ours.items():
            p.grad = torch.from_numpy(before[i] - estimate.theta[i])
        adamw.step()
        adam.step(loss)
    for i, p in ours.items():
        assert np.allclose(p.detach().numpy(), adam.theta[i], rtol=0, atol=1e-10)


def test_oracle_of_adamezo_is_adam_without_correction_while_its_horizon_lasts():
    """And delta is under the root. Beyond the horizon they part."""
    theta, groups, loss = bowl()
    adamezo = oracles.MeZO(theta, groups, seed=SEED, update="adamezo", horizon=4)
    estimate = oracles.MeZO(theta, [Group([0], 1.0, 0.05), Group([1], 1.0, 0.1)], seed=SEED)
    m, v = ({i: np.zeros_like(t) for i, t in theta.items()} for _ in range(2))
    for t in range(6):
        estimate.theta = before = adamezo.theta
        estimate.step(loss)
        adamezo.step(loss)
        for group in groups:
            i = group.ids[0]
            g = before[i] - estimate.theta[i]
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g**2
            want = (1 - group.lr * group.weight_decay) * before[i] - group.lr * m[i] / np.sqrt(v[i] + 1e-8)
            assert np.allclose(adamezo.theta[i], want, rtol=0, atol=1e-10) == (t < 4)


# --------------------------------------------------------------------------------------------------- against the oracle


@CASES
@PLACEMENTS
@pytest.mark.parametrize("device", ON_DEVICE)
def test_five_steps_with_given_losses(case, placement, device):
    model = small(device=device)
    start = oracles.theta_of(model)
    opt = build(case, model, placement=placement, weight_decay=0.2)
    expected = expected_of(case, start, [Group(list(start), case.lr, EPS, 0.2)])
    for t in range(5):
        loss = opt.step(scripted(given(case, t)))
        want = expected.step(scripted(given(case, t)))
        assert loss.item() == pytest.approx(want, rel=1e-6)
        assert opt.metrics["loss"].item() == pytest.approx(want, rel=1e-6)
        assert math.isfinite(opt.metrics["projected_gradient"].item())
    assert_close(model, expected.theta, start, 5 * case.passes)
    assert_close_states(case, opt, model, expected)


@CASES
@PLACEMENTS
def test_five_steps_with_real_losses(case, placement):
    model, exact = small(), small(torch.float64)
    start = oracles.theta_of(model)
    opt = build(case, model, placement=placement)
    expected = expected_of(case, start)
    sign = -1.0 if case.climbs else 1.0

    def exact_loss(theta: Theta) -> float:
        oracles.load(exact, theta)
        with torch.no_grad():
            return sign * float(exact(batch))

    for t in range(5):
        batch = tokens(t)
        loss = opt.step(lambda batch=batch: sign * model(batch))
        assert loss.item() == pytest.approx(expected.step(exact_loss), rel=1e-5)
    # The forwards are float32, so a loss is off by some 3e-7. At eps 0.05 that is 1e-5 of the projected gradients and of
    # the spread of the candidates, and 1e-4 of the curvatures, which differ from their old values by a hundredth.
    assert relative_error(oracles.theta_of(model), expected.theta, start) < 2e-3
    for i, p in enumerate(model.parameters()):
        for name, value in expected.state.get(i, {}).items():
            if name == "step":  # the optimizer counts by block
                continue
            mine = state_of(opt, p)[name].double().numpy()
            assert np.linalg.norm(mine - value) <= 2e-3 * np.linalg.norm(value), f"{name} of tensor {i}"


@CASES
@PLACEMENTS
def test_groups_have_their_own_settings(case, placement):
    """lr, eps and weight decay of each group, in the probes and in the update."""
    model = small()
    every, start = params_of(model), oracles.theta_of(model)
    split = [list(range(5)), list(range(5, len(every)))]
    groups = [Group(split[0], case.lr, EPS, 0.5), Group(split[1], 3 * case.lr, 2 * EPS, 0.0)]
    ours = [
        {"params": [every[i] for i in g.ids], "lr": g.lr, "eps": g.eps, "weight_decay": g.weight_decay} for g in groups
    ]
    if placement == "inplace":
        opt = build(case, ours, placement=placement)
    else:  # which needs the module
        opt = build(case, model, placement=placement)
        opt.param_groups = ours
    expected = expected_of(case, start, groups)
    for t in range(4):
        seen: list[Theta] = []
        wanted: list[Theta] = []
        mine, theirs = scripted(given(case, t)), scripted(given(case, t))
        opt.step(lambda seen=seen, mine=mine: (seen.append(oracles.theta_of(model)), mine())[1])
        expected.step(lambda theta, wanted=wanted, theirs=theirs: (wanted.append(theta), theirs())[1])
        assert len(seen) == len(wanted) == case.forwards
        for got, want in zip(seen, wanted, strict=True):  # each forward sees the perturbed weights it should
            assert all(np.allclose(got[i], want[i], rtol=2e-5, atol=2e-5) for i in want)
    assert_close(model, expected.theta, start, 4 * case.passes, 2 * EPS)


@CASES
def test_schedulers_reach_the_update(case):
    model = small()
    start = oracles.theta_of(model)
    opt = build(case, model, weight_decay=0.3)
    group = Group(list(start), case.lr, EPS, 0.3)
    expected = expected_of(case, start, [group])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where a scheduler steps before the optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1.0 / (1 + t))
        for t in range(4):
            group.lr = case.lr / (1 + t)
            opt.step(scripted(given(case, t)))
            expected.step(scripted(given(case, t)))
            schedule.step()
    assert_close(model, expected.theta, start, 4 * case.passes)


# ------------------------------------------------------------------------------------------------------------- counting


def test_every_method_has_a_case() -> None:
    assert {case.method for case in METHODS.values()} | set(VARIANTS) == set(zokern.optim.METHODS)
    assert all(issubclass(zokern.optim.METHODS[one], zokern.optim.METHODS[other]) for one, other in VARIANTS.items())


@CASES
@PLACEMENTS
def test_forwards_and_passes_are_counted(case, placement):
    model = small()
    opt = build(case, model, placement=placement)
    calls = []
    for t in range(1, 4):
        values = scripted(given(case, t))
        opt.step(lambda values=values: (calls.append(1), values())[1])
        assert len(calls) == case.forwards * t
        assert opt.counters["steps"] == t
        assert opt.counters["forwards"] == case.forwards * t
        assert opt.counters["passes"] == case.passes * t


@pytest.mark.parametrize(
    ("cls", "forwards", "passes"),
    [
        ("MeZO", 2, 3),
        ("HiZOO", 3, 3),
        ("HELENE", 2, 3),
        ("MeZOGV", 6, 7),
        ("MeZOGreedy", 5, 6),
        ("FZOO", 9, 9),
        ("ES", 30, 31),
    ],
)
def test_default_options_cost_what_the_table_says(cls, forwards, passes):
    """The default numbers of samples, candidates and directions, which most cases above shorten."""
    opt = getattr(zokern, cls)(small(), 1e-3)
    values = itertools.count(1)
    opt.step(lambda: 1.0 + 1e-3 * next(values))
    assert (opt.counters["forwards"], opt.counters["passes"]) == (forwards, passes)


# ---------------------------------------------------------------------------------------------------- save and continue


def saved(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@CASES
@pytest.mark.parametrize(
    ("placement", "dtype"),
    [("inplace", torch.float32), ("shadow", torch.float32), ("shadow", torch.bfloat16)],
    ids=["inplace-float32", "shadow-float32", "shadow-bfloat16"],
)
def test_continue_equals_the_uninterrupted_run(case, placement, dtype):
    whole = small(dtype)
    opt = build(case, whole, placement=placement, weight_decay=0.2)
    play(case, opt, range(6))

    half = small(dtype)
    first = build(case, half, placement=placement, weight_decay=0.2)
    play(case, first, range(3))
    kept = saved({"model": half.state_dict(), "opt": first.state_dict()})

    again = small(dtype, seed=9)  # other weights, another seed, other hyper-parameters: all come from the state
    again.load_state_dict(kept["model"])
    second = build(case, again, placement=placement, weight_decay=7.0, seed=0, eps=1.0)
    second.load_state_dict(kept["opt"])
    assert_same_states(states(second, again), states(first, half))
    for state in states(second, again):
        # torch itself would cast states to the parameters' type
        assert all(value.dtype == torch.float32 for value in state.values())
    play(case, second, range(3, 6))
    assert equal(weights(again), weights(whole))
    assert not equal(weights(again), weights(half))
    assert_same_states(states(second, again), states(opt, whole))
    assert second.counters == opt.counters


@CASES
def test_continue_with_layers(case):
    """States of blocks that were never active, and the draw of the blocks, survive."""

    def make(seed: int) -> tuple[nn.Module, Any]:
        model = small()
        return model, build(case, model, layers=zokern.RandomBlocks(1), seed=seed)

    whole, opt = make(SEED)
    play(case, opt, range(4))
    half, first = make(SEED)
    play(case, first, range(1))
    kept = saved({"model": half.state_dict(), "opt": first.state_dict()})
    again, second = make(0)
    again.load_state_dict(kept["model"])
    second.load_state_dict(kept["opt"])
    play(case, second, range(1, 4))
    assert equal(weights(again), weights(whole))
    assert_same_states(states(second, again), states(opt, whole))


def test_adamezo_continues_with_its_history():
    """The update after loading is that of the whole past, and far from that of a run which forgot it."""
    case = METHODS["mezo-adamezo"]
    model = small()
    start = oracles.theta_of(model)
    opt, expected = build(case, model), expected_of(case, start)
    play(case, opt, range(4))
    for t in range(4):
        expected.step(scripted(given(case, t)))
    again = small()
    again.load_state_dict(model.state_dict())
    fresh = build(case, again)
    fresh.load_state_dict(saved(opt.state_dict()))
    forgetful = copy.deepcopy(expected)
    forgetful.history = []
    before = expected.theta
    play(case, fresh, [4])
    for o in (expected, forgetful):
        o.step(scripted(given(case, 4)))
    assert_close(again, expected.theta, start, 5 * case.passes)
    assert relative_error(expected.theta, forgetful.theta, before) > 0.1


# --------------------------------------------------------------------------------------------------------------- layers


@CASES
@PLACEMENTS
def test_dropped_blocks_keep_their_weights_and_states(case, placement):
    model = small()
    with torch.no_grad():
        for p in model.parameters():
            p.flatten()[0] = -0.0  # whose sign any arithmetic would lose
    start, every = oracles.theta_of(model), params_of(model)
    dropped = dropped_tensors(model, 1)
    opt = build(case, model, placement=placement, layers=zokern.RandomBlocks(1), weight_decay=0.4)
    expected = expected_of(case, start, [Group(list(start), case.lr, EPS, 0.4)], dropped=dropped)
    ever = set()
    for t in range(5):
        before, states_before = weights(model), states(opt, model)
        opt.step(scripted(given(case, t)))
        expected.step(scripted(given(case, t)))
        after, states_after = weights(model), states(opt, model)
        out = dropped(t)
        assert len(out) == 5
        for i in out:
            assert torch.equal(before[i].view(torch.int32), after[i].view(torch.int32))
            assert_same_states([states_before[i]], [states_after[i]])
        assert not any(torch.equal(before[i], after[i]) for i in range(len(every)) if i not in out)
        ever |= out
    assert len(ever) == 10  # each of the blocks was left out in some step
    assert_close(model, expected.theta, start, 5 * case.passes)
    assert_close_states(case, opt, model, expected)
    assert opt.counters["passes"] == 5 * case.passes


def test_lezo_takes_the_options_of_mezo():
    case = METHODS["mezo-adam-one-sided"]
    one, two = small(), small()
    a = zokern.LeZO(one, case.lr, num_dropped=1, eps=EPS, seed=SEED, **case.options)
    b = build(case, two, layers=zokern.RandomBlocks(1))
    for opt in (a, b):
        play(case, opt, range(3))
    assert equal(weights(one), weights(two))
    assert_same_states(states(a, one), states(b, two))


# ------------------------------------------------------------------------------------------------------------- backends


def of_dtype(dtype: torch.dtype | str, device: torch.device = devices.CPU) -> Toy:
    if isinstance(dtype, torch.dtype):
        return small(dtype, device)
    model = small(device=device)
    model.embedding.bfloat16()
    model.layers[0].half()
    return model


def run_on(
    case: Case, backend: str, placement: str, dtype: torch.dtype | str, steps: int, **options: Any
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    model = of_dtype(dtype, devices.device_of(backend))
    opt = build(case, model, placement=placement, backend=backend, weight_decay=0.2, **options)
    play(case, opt, range(steps))
    return weights(model), states(opt, model)


@CASES
@pytest.mark.parametrize("backend", ["reference", "cuda"])
@pytest.mark.parametrize(
    ("placement", "dtype"),
    [("inplace", torch.float32), ("shadow", torch.bfloat16), ("shadow", torch.float16), ("shadow", "mixed")],
    ids=["inplace-float32", "shadow-bfloat16", "shadow-float16", "shadow-mixed"],
)
def test_backends_agree_bit_for_bit(case, backend, placement, dtype):
    mine, my_states = run_on(case, backend, placement, dtype, 3)
    theirs, their_states = run_on(case, "cpu", placement, dtype, 3)
    assert equal(mine, theirs)
    assert_same_states(my_states, their_states)
    assert not equal(mine, weights(of_dtype(dtype)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "placement", "dtype"),
    [(case, "shadow", "mixed") for case in METHODS.values()]
    + [(case, "inplace", torch.float32) for case in METHODS.values() if case.states],
    ids=[f"shadow-mixed-{name}" for name in METHODS]
    + [f"inplace-float32-{name}" for name, case in METHODS.items() if case.states],
)
def test_triton_agrees_bit_for_bit(case, placement, dtype):
    """Two steps, because its interpreter is slow: the second one starts from states that are not uniform."""
    mine, my_states = run_on(case, "triton", placement, dtype, 2)
    theirs, their_states = run_on(case, "cpu", placement, dtype, 2)
    assert equal(mine, theirs)
    assert_same_states(my_states, their_states)


CURVED = pytest.mark.parametrize("name", ["hizoo", "gv-curved", "greedy-curved"])


@CURVED
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
def test_backends_agree_on_a_bf16_curvature(name, backend):
    options = {"smoothing": 0.1, "curvature_dtype": torch.bfloat16}
    case = METHODS[name]
    mine, my_states = run_on(case, backend, "shadow", torch.bfloat16, 2, **options)
    theirs, their_states = run_on(case, "cpu", "shadow", torch.bfloat16, 2, **options)
    assert equal(mine, theirs)
    assert_same_states(my_states, their_states)
    assert all(state["h"].dtype == torch.bfloat16 for state in my_states)


# --------------------------------------------------------------------------------------------------- losses not finite


@CASES
@PLACEMENTS
def test_a_loss_that_is_not_finite_skips_the_step(case, placement):
    """Any loss, also that of a candidate which would not have been chosen; the step after it is as if nothing had been."""
    for position in range(case.forwards):
        model = small()
        start = oracles.theta_of(model)
        opt = build(case, model, placement=placement, weight_decay=0.2)
        expected = expected_of(case, start, [Group(list(start), case.lr, EPS, 0.2)])
        play(case, opt, [0])
        expected.step(scripted(given(case, 0)))
        before, states_before = weights(model), states(opt, model)

        values = given(case, 1)
        values[position] = (math.nan, math.inf, -math.inf)[position % 3]
        with pytest.warns(zokern.ZokernWarning, match="not finite"):
            loss = opt.step(scripted(values))
        assert not math.isfinite(loss.item())
        expected.step(scripted(values))
        after = weights(model)
        if placement == "shadow":
            assert equal(before, after)
        else:  # restored: each pass rounds
            assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(before, after, strict=True))
        assert_same_states(states_before, states(opt, model))
        assert opt.skipped_steps == 1
        assert opt.counters["steps"] == 2

        play(case, opt, [2])
        expected.step(scripted(given(case, 2)))
        assert opt.skipped_steps == 1
        assert_close(model, expected.theta, start, 3 * case.passes)
        assert_close_states(case, opt, model, expected)


@CASES
def test_a_first_step_that_is_skipped(case):
    """States need not exist afterwards; where they do, they are the initial ones."""
    model = small()
    start = oracles.theta_of(model)
    opt = build(case, model, placement="shadow", weight_decay=0.2)
    expected = expected_of(case, start, [Group(list(start), case.lr, EPS, 0.2)])
    before = weights(model)
    with pytest.warns(zokern.ZokernWarning, match="not finite"):
        opt.step(scripted([math.nan] * case.forwards))
    expected.step(scripted([math.nan] * case.forwards))
    assert equal(before, weights(model))
    for state in states(opt, model):
        for name, value in state.items():
            initial = 1.0 if name == "h" and case.method != "helene" else 0.0
            assert bool((value == initial).all()), name
    for t in (1, 2):
        opt.step(scripted(given(case, t)))
        expected.step(scripted(given(case, t)))
    assert_close(model, expected.theta, start, 2 * case.passes)
    assert_close_states(case, opt, model, expected)


def test_a_vector_with_one_bad_example_skips_the_step():
    model = small()
    before = weights(model)
    opt = zokern.HELENE(model, 1e-2, placement="shadow")
    values = scripted([[1.0, 2.0, 3.0], [1.0, math.inf, 3.0]])
    with pytest.warns(zokern.ZokernWarning, match="not finite"):
        opt.step(values)
    assert equal(before, weights(model))
    assert opt.skipped_steps == 1


# ------------------------------------------------------------------------------------------- what else holds for them all


@CASES
@PLACEMENTS
def test_an_exception_in_the_closure_changes_nothing(case, placement):
    for position in (0, case.forwards // 2, case.forwards - 1):
        model = small()
        opt = build(case, model, placement=placement)
        play(case, opt, [0])
        before, states_before = weights(model), states(opt, model)
        values = iter(given(case, 1)[:position])
        with pytest.raises(ZeroDivisionError):
            opt.step(lambda values=values: next(values, None) or 1 / 0)
        after = weights(model)
        if placement == "shadow":
            assert equal(before, after)
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(before, after, strict=True))
        assert_same_states(states_before, states(opt, model))
        assert opt.counters["steps"] == 1


@CASES
def test_without_a_learning_rate_states_move_and_weights_keep_their_values(case):
    """As during the first step of a warm-up. Rules with states may turn a negative zero into a positive one."""
    model = small()
    with torch.no_grad():
        for p in model.parameters():
            p.flatten()[0] = -0.0
    before, start = weights(model), oracles.theta_of(model)
    opt = build(case, model, placement="shadow", weight_decay=0.2)
    opt.param_groups[0]["lr"] = 0.0
    expected = expected_of(case, start, [Group(list(start), 0.0, EPS, 0.2)])
    for t in range(2):
        opt.step(scripted(given(case, t)))
        expected.step(scripted(given(case, t)))
    assert equal(before, weights(model))
    assert_close_states(case, opt, model, expected)


@CASES
def test_accumulation_is_the_mean_of_the_micro_batches(case):
    """One perturbation for all of them: forwards grow and passes do not."""
    one, two = small(), small()
    start = oracles.theta_of(one)
    a, b = build(case, one), build(case, two)
    for t in range(2):
        values = iter([x + shift for x in given(case, t) for shift in (-0.25, 0.0, 0.25)])
        a.step(lambda batch, values=values: torch.tensor(next(values), dtype=torch.float64), [0, 1, 2])
        play(case, b, [t])
    assert_close(one, oracles.theta_of(two), start, 2 * case.passes)
    assert a.counters["forwards"] == 3 * b.counters["forwards"]
    assert a.counters["passes"] == b.counters["passes"]


@CASES
@PLACEMENTS
def test_frozen_and_empty_parameters_are_left_alone(case, placement):
    model = nn.ParameterList([filled(7), nn.Parameter(torch.zeros(0, 3)), filled(5), filled(9)])
    model[2].requires_grad_(False)
    opt = build(case, model, placement=placement)
    play(case, opt, range(2))
    assert bool((model[2] == 0.5).all())
    assert bool((model[0] != 0.5).any())
    assert bool((model[3] != 0.5).any())
    assert [set(state_of(opt, p)) for p in model] == [set(case.states), set(), set(), set(case.states)]


# -------------------------------------------------------------------------------------------------------- the estimator


def quadratic(d: int) -> tuple[Tensor, Callable[[Tensor], Tensor], Tensor]:
    """A point, x'Ax/2 - b'x, and the gradient there."""
    g = torch.Generator().manual_seed(4)
    root = torch.randn(d, d, generator=g, dtype=torch.float64) / math.sqrt(d)
    a, b = root @ root.T, torch.randn(d, generator=g, dtype=torch.float64)
    x0 = torch.randn(d, generator=g)

    def loss(x: Tensor) -> Tensor:
        return x.double() @ a @ x.double() / 2 - b @ x.double()

    return x0, loss, a @ x0.double() - b


UNBIASED: dict[str, tuple[str, dict[str, Any]]] = {
    # Left out, because they are biased by design: the other updates of MeZO (they are not linear in the estimate),
    # MeZO-GV and MeZO-Greedy (they choose directions by the loss), FZOO and ES (they divide by the spread, or rank).
    "one-sided": ("MeZO", {"one_sided": True}),
    "one-sided-signs": ("MeZO", {"one_sided": True, "distribution": "rademacher"}),
    "one-sided-4": ("MeZO", {"one_sided": True, "num_samples": 4}),
    "two-sided": ("MeZO", {}),
    "momentum": ("MeZO", {"update": "momentum", "betas": (0.0, 0.999)}),
    "hizoo": ("HiZOO", {"smoothing": 0.0}),
    "hizoo-2": ("HiZOO", {"smoothing": 0.0, "num_samples": 2}),
    "helene": ("HELENE", {"betas": (0.0, 0.0), "anneal_steps": 1e12, "floor": 1e9, "gamma": 1e-9, "delta": 0.0}),
}


@pytest.mark.parametrize("name", UNBIASED)
def test_estimator_is_unbiased_on_a_quadratic(name):
    """The mean update is the gradient; with HiZOO's h, which is set by hand here, the gradient over h."""
    cls, options = UNBIASED[name]
    d, steps = 16, 1200 // options.get("num_samples", 1)
    x0, loss, gradient = quadratic(d)
    x = nn.Parameter(x0.clone())
    opt = getattr(zokern, cls)([x], 1.0, eps=1e-2, seed=77, placement="inplace", **options)
    want = gradient
    if cls == "HiZOO":
        opt.step(lambda: loss(x))  # makes h
        h = torch.linspace(0.5, 3.0, d)
        opt.state[x]["h"].copy_(h)
        x.data.copy_(x0)
        want = gradient / h.double()
    estimates = torch.empty(steps, d, dtype=torch.float64)
    for i in range(steps):
        opt.step(lambda: loss(x))
        estimates[i] = x0.double() - x.detach().double()
        x.data.copy_(x0)
    z = (estimates.mean(0) - want) / (estimates.var(0) / steps).sqrt()
    assert z.abs().max() < 4.0  # 16 of them: P(fail) 0.1 % if the seed were free
    assert 0.3 < z.square().mean() < 2.2


@CASES
def test_learns_least_squares(case):
    """Each method, with its own lr, gets most of the way to the optimum from where it is known to start."""
    g = torch.Generator().manual_seed(5)
    inputs = torch.randn(24, 5, generator=g)
    targets = inputs @ torch.randn(5, 1, generator=g) + 1.0 + 0.1 * torch.randn(24, 1, generator=g)
    model = nn.Linear(5, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    ones = torch.cat([inputs, torch.ones(24, 1)], 1)
    best = (ones @ torch.linalg.lstsq(ones, targets).solution - targets).square().mean().item()

    def loss() -> Tensor:
        return (model(inputs) - targets).double().square().mean()

    start = loss().item()
    opt = build(case, model)
    opt.param_groups[0]["lr"] = case.rate
    for _ in range(150):
        opt.step((lambda: -loss()) if case.climbs else loss)
    assert loss().item() - best < 0.2 * (start - best)


# ---------------------------------------------------------------------------------------------------------------- HiZOO


def curvature_losses(kappa: float, eps: float, c: float = 1.0) -> list[float]:
    """L0, L+ and L- of this curvature and this projected gradient."""
    return [1.0, 1.0 + kappa * eps**2 + c * eps, 1.0 + kappa * eps**2 - c * eps]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kappa", [1000.0, -1000.0])
def test_curvature_moves_at_the_published_smoothing(dtype, kappa):
    """a = 1e-8 in the weights' own type would leave h at 1 for ever, in float32 as well for kappa near 1."""
    model = nn.ParameterList([filled(200, dtype)])
    opt = zokern.HiZOO(model, 1e-3, eps=0.1, seed=SEED, smoothing=1e-8)
    want = np.ones(200)
    for t in range(3):
        z = reference.noise(200, reference.derive_seed(SEED, t, 0), 0).astype(np.float64)
        opt.step(scripted(curvature_losses(kappa, 0.1)))
        want *= 1.0 - 1e-8 + 1e-8 * abs(kappa) * z**2
    h = opt.state[model[0]]["h"]
    assert h.dtype == torch.float32
    moved = h.double().numpy() - 1.0
    assert np.median(moved) > 50 * 2.0**-23
    assert abs(moved - (want - 1.0)).max() < 3 * 1.5 * 2.0**-23 + 1e-5 * (want - 1.0).max()


def test_no_smoothing_leaves_the_curvature_and_is_mezo():
    one, two = small(), small()
    a = zokern.HiZOO(one, 1e-2, eps=EPS, seed=SEED, smoothing=0.0)
    b = zokern.MeZO(two, 1e-2, eps=EPS, seed=SEED)
    start = oracles.theta_of(one)
    for t in range(3):
        values = given(METHODS["hizoo"], t)
        a.step(scripted(values))
        b.step(scripted(values[1:]))
    assert all(bool((state["h"] == 1.0).all()) for state in states(a, one))
    assert_close(one, oracles.theta_of(two), start, 9)


def test_update_uses_the_new_curvature_and_the_probe_the_old():
    """One step from a known h: both are visible, in the weights during the forwards and after the step."""
    model = nn.ParameterList([filled(50)])
    opt = zokern.HiZOO(model, 0.1, eps=0.1, seed=SEED, smoothing=0.5, placement="shadow")
    opt.step(scripted([1.0, 1.0, 1.0]))
    opt.state[model[0]]["h"].copy_(torch.linspace(0.25, 9.0, 50))
    before, h = model[0].detach().double().clone(), torch.linspace(0.25, 9.0, 50).double()
    seen = []
    values = scripted(curvature_losses(4.0, 0.1, 2.0))
    opt.step(lambda: (seen.append(model[0].detach().double().clone()), values())[1])
    z = torch.from_numpy(reference.noise(50, reference.derive_seed(SEED, 1, 0), 0)).double()
    new = 0.5 * h + 0.5 * h * 4.0 * z**2
    assert torch.allclose(seen[0], before, rtol=0, atol=0)
    assert torch.allclose(seen[1], before + 0.1 * z / h.sqrt(), atol=1e-6)
    assert torch.allclose(seen[2], before - 0.1 * z / h.sqrt(), atol=1e-6)
    assert torch.allclose(opt.state[model[0]]["h"].double(), new, rtol=1e-5)
    assert torch.allclose(model[0].detach().double(), before - 0.1 * 2.0 * z / new.sqrt(), atol=1e-6)


@pytest.mark.parametrize(("start", "kappa", "limit"), [(2.0**63, 1e6, 2.0**64), (2.0**-64, 0.0, 2.0**-64)])
def test_curvature_stays_within_its_limits(start, kappa, limit):
    model = nn.ParameterList([filled(50)])
    opt = zokern.HiZOO(model, 1e-3, eps=1.0, seed=SEED, smoothing=0.5, distribution="rademacher", placement="shadow")
    opt.step(scripted([1.0, 1.0, 1.0]))
    opt.state[model[0]]["h"].fill_(start)
    opt.step(scripted(curvature_losses(kappa, 1.0)))
    assert bool((opt.state[model[0]]["h"] == limit).all())
    assert bool(model[0].isfinite().all())


def test_curvature_in_bf16_moves_by_the_right_amount_on_average():
    """Steps of a hundredth of a bf16 ulp: lost when rounded to nearest, right in the mean when rounded stochastically."""
    n, steps, rate = 8192, 50, 1e-4
    model = nn.ParameterList([filled(n)])
    opt = zokern.HiZOO(
        model,
        1e-3,
        eps=0.1,
        seed=SEED,
        smoothing=1e-3,
        distribution="rademacher",  # z^2 is 1: every element is expected to grow alike
        curvature_dtype=torch.bfloat16,
    )
    for _ in range(steps):
        opt.step(scripted(curvature_losses(1.0 + rate / 1e-3, 0.1)))
    h = opt.state[model[0]]["h"]
    assert h.dtype == torch.bfloat16
    ulp = 2.0**-7
    deviation = math.sqrt(steps * rate * ulp)  # of an element: `steps` draws of one ulp, each with P = rate / ulp
    assert h.double().mean().item() == pytest.approx((1 + rate) ** steps, abs=4 * deviation / math.sqrt(n))
    assert set(h.double().unique().tolist()) <= {1.0 + k * ulp for k in range(9)}


@CURVED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bf16_curvature_survives_saving(name, dtype):
    """torch would cast it to the weights' type; the rounding of h goes on with the same bits."""
    case = METHODS[name]
    options = {"curvature_dtype": torch.bfloat16, "smoothing": 0.1, "placement": "shadow"}
    whole, half = small(dtype), small(dtype)
    opt, first = build(case, whole, **options), build(case, half, **options)
    play(case, opt, range(4))
    play(case, first, range(2))
    second = build(case, half, **options)
    second.load_state_dict(saved(first.state_dict()))
    assert_same_states(states(second, half), states(first, half))
    play(case, second, range(2, 4))
    assert equal(weights(half), weights(whole))
    assert_same_states(states(second, half), states(opt, whole))
    assert all(state["h"].dtype == torch.bfloat16 for state in states(second, half))


# --------------------------------------------------------------------------------------------------------------- HELENE


def per_example(step: int, examples: int) -> list[list[float]]:
    return (1.0 + 0.1 * np.random.default_rng([8, step]).standard_normal((4, examples))).tolist()


@PLACEMENTS
def test_helene_takes_losses_of_examples(placement):
    """s is the mean of the squares, which is not the square of the mean."""
    options = {"num_samples": 2, "betas": (0.9, 0.8), "hessian_interval": 2}
    model = small()
    start = oracles.theta_of(model)
    opt = zokern.HELENE(model, 1e-2, eps=EPS, seed=SEED, floor=0.1, placement=placement, **options)
    expected = oracles.HELENE(start, [Group(list(start), 1e-2, EPS)], seed=SEED, floor=lambda i: 0.1, **options)
    for t in range(5):
        values = per_example(t, 6)
        loss = opt.step(scripted(values))
        want = expected.step(scripted(values))
        assert loss.shape == ()
        assert loss.item() == pytest.approx(want, rel=1e-6)
    assert_close(model, expected.theta, start, 25)
    assert_close_states(METHODS["helene"], opt, model, expected)
    assert opt.counters["forwards"] == 20


def test_helene_with_one_example_or_equal_ones_is_the_scalar_form():
    results = []
    for form in ("scalar", "one", "equal"):
        model = small()
        opt = zokern.HELENE(model, 1e-2, eps=EPS, seed=SEED, floor=0.1, hessian_interval=1)
        for t in range(3):
            values = given(METHODS["helene"], t)
            opt.step(scripted(values if form == "scalar" else [[v] * (1 if form == "one" else 4) for v in values]))
        results.append(weights(model))
    for other in results[1:]:
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(results[0], other, strict=True))


def test_helene_curvature_moves_on_its_steps_only():
    model = small()
    opt = zokern.HELENE(model, 1e-2, eps=EPS, seed=SEED, hessian_interval=3)
    case = METHODS["helene"]
    play(case, opt, [0])
    assert all(bool((state["h"] > 0).any()) for state in states(opt, model))
    for t in range(1, 8):
        before = states(opt, model)
        play(case, opt, [t])
        after = states(opt, model)
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old["h"], new["h"]) == (t % 3 != 0)
            assert not torch.equal(old["m"], new["m"])


def test_helene_floors_one_for_each_parameter():
    """A list follows the order of the parameter groups, without those that do not train."""
    model = small()
    model.layers[0].norm.requires_grad_(False)
    start = oracles.theta_of(model)
    ids = [i for i, p in enumerate(model.parameters()) if p.requires_grad]
    floors = [0.05 * (k + 1) for k in range(len(ids))]
    by_id = dict(zip(ids, floors, strict=True))
    opt = zokern.HELENE(model, 5e-3, eps=EPS, seed=SEED, betas=(0.9, 0.8), hessian_interval=1, floor=floors)
    expected = oracles.HELENE(
        start, [Group(ids, 5e-3, EPS)], seed=SEED, betas=(0.9, 0.8), hessian_interval=1, floor=by_id.__getitem__
    )
    for t in range(3):
        opt.step(scripted(given(METHODS["helene"], t)))
        expected.step(scripted(given(METHODS["helene"], t)))
    assert_close(model, expected.theta, start, 9)
    assert any((expected.state[i]["h"] > by_id[i]).any() for i in ids)  # some curvatures are above their floor
    assert any((expected.state[i]["h"] < by_id[i]).any() for i in ids)  # and some below

    one, two = small(), small()
    results = []
    for m, floor in ((one, 0.2), (two, [0.2] * len(params_of(two)))):
        opt = zokern.HELENE(m, 5e-3, eps=EPS, seed=SEED, floor=floor)
        play(METHODS["helene"], opt, range(2))
        results.append(weights(m))
    assert equal(*results)


def test_helene_floor_by_layer_falls_with_the_size():
    one, two = small(), small()
    sizes = [p.numel() for p in one.parameters()]
    results = []
    for model, floor in ((one, zokern.ByLayer(0.7)), (two, [0.7 / math.sqrt(n) for n in sizes])):
        opt = zokern.HELENE(model, 5e-3, eps=EPS, seed=SEED, floor=floor)
        play(METHODS["helene"], opt, range(2))
        results.append(weights(model))
    assert equal(*results)


# ---------------------------------------------------------------------------------------- candidates, rewards and spread


def test_gv_is_not_noise_that_was_never_evaluated():
    """v is the mean of the best minus the mean of the rest, of the very directions whose losses were taken."""
    model = small()
    start = oracles.theta_of(model)
    opt = zokern.MeZOGV(model, 1.0, eps=EPS, seed=SEED, candidates=4, placement="shadow")
    seen: list[Theta] = []
    values = iter([3.0, 1.0, 4.0, 2.0, 1.0, 1.0])
    opt.step(lambda: (seen.append(oracles.theta_of(model)), next(values))[1])
    for i, w in start.items():
        z = [(seen[j][i] - w) / EPS for j in range(4)]
        v = (z[1] + z[3]) / 2 - (z[0] + z[2]) / 2
        assert np.allclose(seen[4][i], w + EPS * v, atol=2e-6)
        assert np.allclose(seen[5][i], w - EPS * v, atol=2e-6)


@pytest.mark.parametrize(("name", "equal_losses"), [("gv", [1.0, 0.5, 0.5, 1.0]), ("greedy", [1.0, 0.5, 0.5, 0.5])])
def test_candidates_of_equal_loss_keep_their_order(name, equal_losses):
    case = METHODS[name]
    model = small()
    start = oracles.theta_of(model)
    opt, expected = build(case, model), expected_of(case, start)
    for values in ([*equal_losses, 1.0, 0.9], [2.0, 2.0, 2.0, 2.0, 1.0, 0.9]):
        opt.step(scripted(values))
        expected.step(scripted(values))
    assert_close(model, expected.theta, start, 2 * case.passes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("candidates", [3, 6, 7])
@pytest.mark.parametrize("value", [1.0, 0.1, 1e-3])
def test_fzoo_with_no_spread_only_decays(candidates, value, dtype):
    """The mean of three times 0.1 is not 0.1: a spread of 1e-17 is none, or the weights are gone."""
    model = small(dtype)
    before = weights(model)
    opt = zokern.FZOO(model, 0.1, eps=EPS, seed=SEED, candidates=candidates, placement="shadow", rounding="nearest")
    opt.step(scripted([0.3] + [value] * candidates))
    assert equal(weights(model), before)
    opt.param_groups[0]["weight_decay"] = 2.5
    opt.step(scripted([0.3] + [value] * candidates))
    for a, b in zip(weights(model), before, strict=True):
        assert torch.allclose(a.float(), 0.75 * b.float(), rtol=1e-6 if dtype == torch.float32 else 2.0**-8)
    assert opt.skipped_steps == 0


@pytest.mark.parametrize("shaping", ["standardised", "ranked"])
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("value", [1.0, 0.1])
def test_es_with_equal_rewards_only_decays(shaping, antithetic, value):
    model = small()
    before = weights(model)
    opt = zokern.ES(
        model, 0.1, eps=EPS, seed=SEED, num_directions=3, shaping=shaping, antithetic=antithetic, placement="shadow"
    )
    opt.step(lambda: value)
    assert equal(weights(model), before)
    opt.param_groups[0]["weight_decay"] = 2.5
    opt.step(lambda: value)
    assert all(torch.allclose(a, 0.75 * b, rtol=1e-6) for a, b in zip(weights(model), before, strict=True))
    assert opt.skipped_steps == 0


@pytest.mark.parametrize(
    ("antithetic", "rewards", "shaped"),
    [
        (False, [5.0, 1.0, 5.0, 2.0], [2.5 / 3 - 0.5, -0.5, 2.5 / 3 - 0.5, 1 / 3 - 0.5]),
        (False, [-1e9, 7.0, 7.0, 7.0], [-0.5, 2 / 3 - 0.5, 2 / 3 - 0.5, 2 / 3 - 0.5]),
        (True, [1.0, 3.0, 3.0, 3.0, 0.0, 9.0], [0.2 - 0.6, 0.0, 0.0 - 1.0]),
    ],
)
def test_es_ranks_with_ties(antithetic, rewards, shaped):
    """Equal rewards get the mean of their ranks; by hand, not by the oracle."""
    n = len(shaped)
    model = nn.ParameterList([filled(60)])
    opt = zokern.ES(
        model, 0.01, eps=EPS, seed=SEED, num_directions=n, shaping="ranked", antithetic=antithetic, placement="shadow"
    )
    opt.step(scripted(rewards))
    z = [reference.noise(60, reference.derive_seed(SEED, 0, k), 0).astype(np.float64) for k in range(n)]
    scale = 0.01 / (2 * n * EPS) if antithetic else 0.01 / (n * EPS)
    want = 0.5 + scale * sum(r * d for r, d in zip(shaped, z, strict=True))
    assert np.allclose(model[0].detach().double().numpy(), want, atol=5e-7)
    assert opt.metrics["loss"].item() == pytest.approx(np.mean(rewards), rel=1e-6)


@CASES
def test_shifted_losses_give_the_same_step(case):
    """Only differences count, in whatever way a method uses them."""
    results = []
    for shift in (0.0, 64.0):
        model = small()
        opt = build(case, model)
        for t in range(2):
            opt.step(scripted([x + shift for x in given(case, t)]))
        results.append(weights(model))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*results, strict=True))


# ------------------------------------------------------------------------------------------------------------ bad input


class Strange:
    """No number, no string, no list."""

    def __repr__(self) -> str:
        return "Strange"


BAD: list[tuple[str, dict[str, Any], type[Exception] | tuple[type[Exception], ...], str]] = [
    *[
        (cls, {"candidates": n}, ValueError, "candidates")
        for cls in ("MeZOGV", "MeZOGreedy", "FZOO")
        for n in (1, 0, -2)
    ],
    *[(cls, {"candidates": 2.5}, TypeError, "candidates") for cls in ("MeZOGV", "MeZOGreedy", "FZOO")],
    ("MeZOGV", {"elite": 0.2}, ValueError, "elite"),
    ("MeZOGV", {"elite": 1.0}, ValueError, "elite"),
    ("MeZOGV", {"elite": 0.0}, ValueError, "elite"),
    ("MeZOGV", {"elite": -0.5}, ValueError, "elite"),
    ("MeZOGV", {"elite": 1.5}, ValueError, "elite"),
    ("MeZOGV", {"elite": math.nan}, ValueError, "elite"),
    ("MeZOGV", {"elite": "half"}, TypeError, "elite"),
    *[
        (cls, {"smoothing": value}, ValueError, "smoothing")
        for cls in ("HiZOO", "MeZOGV", "MeZOGreedy")
        for value in (1.0, -1e-8, 2.0, math.nan)
    ],
    ("HiZOO", {"smoothing": "small"}, TypeError, "smoothing"),
    *[
        (cls, {"curvature_dtype": value, "smoothing": 1e-8}, (TypeError, ValueError), "curvature_dtype")
        for cls in ("HiZOO", "MeZOGV", "MeZOGreedy")
        for value in (torch.float16, torch.float64, torch.int32, "float32")
    ],
    ("HiZOO", {"num_samples": 0}, ValueError, "num_samples"),
    ("HELENE", {"num_samples": 0}, ValueError, "num_samples"),
    *[("HELENE", {"hessian_interval": value}, ValueError, "hessian_interval") for value in (0, -1)],
    ("HELENE", {"hessian_interval": 1.5}, TypeError, "hessian_interval"),
    *[
        (cls, {"betas": value}, ValueError, "betas")
        for cls in ("HELENE", "MeZO")
        for value in ((1.0, 0.5), (0.5, 1.0), (-0.1, 0.5), (0.5, math.nan))
    ],
    *[
        (cls, {"betas": value}, (TypeError, ValueError), "betas")
        for cls in ("HELENE", "MeZO")
        for value in (0.9, (0.9,), (0.9, 0.9, 0.9), ("a", "b"))
    ],
    *[("HELENE", {"anneal_steps": value}, ValueError, "anneal_steps") for value in (0, -5, math.nan)],
    *[("HELENE", {name: -1e-3}, ValueError, name) for name in ("floor", "delta", "gamma")],
    ("HELENE", {"floor": math.nan}, ValueError, "floor"),
    ("HELENE", {"floor": 0.0, "delta": 0.0}, ValueError, "floor|delta"),
    ("HELENE", {"floor": 1e-35, "delta": 1e-32}, ValueError, "floor|delta"),
    ("HELENE", {"gamma": 0.0, "delta": 0.0}, ValueError, "gamma|floor|delta"),
    ("HELENE", {"floor": [1.0, 1.0]}, ValueError, "floor"),
    ("HELENE", {"floor": [1.0] * 14}, ValueError, "floor"),
    ("HELENE", {"floor": [1.0] * 12 + [-1.0]}, ValueError, "floor"),
    ("HELENE", {"floor": [1.0] * 12 + [0.0], "delta": 0.0}, ValueError, "floor|delta"),
    ("HELENE", {"floor": Strange()}, TypeError, "floor"),
    ("HELENE", {"floor": "layer"}, TypeError, "floor"),
    *[("HELENE", {"batch_size": value}, ValueError, "batch_size") for value in (0, -3)],
    *[("MeZO", {"update": "adamezo", "horizon": value}, ValueError, "horizon") for value in (0, -1)],
    ("MeZO", {"update": "adamezo", "horizon": 2.5}, TypeError, "horizon"),
    ("MeZO", {"update": "adamezo", "num_samples": 2}, ValueError, "num_samples"),
    ("MeZO", {"update": "adamw"}, ValueError, "update.*adamw"),
    ("MeZO", {"update": None}, (TypeError, ValueError), "update"),
    ("MeZO", {"update": "adam", "delta": -1e-8}, ValueError, "delta"),
    *[("ES", {"num_directions": value}, ValueError, "num_directions") for value in (1, 0, -30)],
    ("ES", {"num_directions": 2.0}, TypeError, "num_directions"),
    ("ES", {"shaping": "softmax"}, ValueError, "shaping.*softmax"),
    ("ES", {"shaping": None}, (TypeError, ValueError), "shaping"),
]


@pytest.mark.parametrize(("cls", "options", "error", "word"), BAD, ids=[f"{c}-{o}" for c, o, _, _ in BAD])
def test_bad_options_are_refused_by_name(cls, options, error, word):
    model = small()
    before = weights(model)
    assert len(before) == 13  # which the lists of floors above count on
    with pytest.raises(error, match=word):
        getattr(zokern, cls)(model, 1e-3, **options)
    assert equal(before, weights(model))


@pytest.mark.parametrize("options", [{"candidates": 2}, {"candidates": 2, "smoothing": 0.0}], ids=str)
def test_the_smallest_numbers_of_candidates_work(options):
    for cls in ("MeZOGV", "MeZOGreedy"):
        model = small()
        getattr(zokern, cls)(model, 1e-3, **options).step(scripted([1.0, 2.0, 3.0, 4.0, 5.0][: 5 if options else 4]))
        assert not equal(weights(model), weights(small()))


@CASES
@pytest.mark.parametrize("num_dropped", [-1, 3])
def test_bad_numbers_of_dropped_blocks_are_refused(case, num_dropped):
    model = small()
    before = weights(model)
    with pytest.raises(ValueError, match="num_dropped"):
        build(case, model, layers=zokern.RandomBlocks(num_dropped))
    assert equal(before, weights(model))


@CASES
@PLACEMENTS
def test_a_vector_of_losses_is_refused_where_there_is_no_use_for_it(case, placement):
    """Also a vector at a later forward of a step, or in a later step."""
    if case.method == "helene":
        pytest.skip("takes vectors")
    for position in (0, case.forwards - 1):
        model = small()
        opt = build(case, model, placement=placement)
        play(case, opt, [0])
        before, states_before = weights(model), states(opt, model)
        values: list[Any] = list(given(case, 1))
        values[position] = [1.0, 2.0]
        with pytest.raises(TypeError, match="closure"):
            opt.step(scripted(values))
        after = weights(model)
        if placement == "shadow":
            assert equal(before, after)
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(before, after, strict=True))
        assert_same_states(states_before, states(opt, model))


@pytest.mark.parametrize("value", [[[1.0, 2.0]], []], ids=["matrix", "empty"])
def test_helene_refuses_what_is_no_vector(value):
    model = small()
    before = weights(model)
    with pytest.raises(TypeError, match="closure"):
        zokern.HELENE(model, 1e-3, placement="shadow").step(scripted([value, value]))
    assert equal(before, weights(model))


def test_states_of_another_method_or_option_are_refused():
    """A state says what it is of: a run cannot go on as another one by mistake."""
    model = small()
    opt = build(METHODS["hizoo"], model)
    play(METHODS["hizoo"], opt, [0])
    kept = opt.state_dict()
    for other in ("mezo", "gv", "helene", "fzoo", "es"):
        with pytest.raises(ValueError, match="HiZOO"):
            build(METHODS[other], small()).load_state_dict(kept)
    adam = build(METHODS["mezo-adam"], small())
    with pytest.raises(ValueError, match="update"):
        adam.load_state_dict(zokern.MeZO(small(), 1e-3).state_dict())


@pytest.mark.parametrize("name", ["MeZOGreedy", "MeZOGV", "FZOO"])
def test_unknown_keywords_are_refused(name):
    """An option of another method must not be taken without a word."""
    with pytest.raises(TypeError, match="horizon"):
        getattr(zokern, name)(small(), 1e-3, horizon=3)
