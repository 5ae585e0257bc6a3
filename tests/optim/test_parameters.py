"""Which parameters an optimizer moves, and by which ids: frozen, tied, empty, replaced, added. What it leaves alone."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zokern
from tests import oracles
from tests.methods import PLACEMENTS, scripted
from tests.models import linear, sentences, transformer
from tests.optim.scripts import assert_equal_to_rounding, script
from zokern.contract import reference

# ------------------------------------------------------------------------------------------- which parameters, which ids


def noise_seen(model: nn.Module, opt: zokern.MeZO) -> dict[str, Tensor]:
    """z of each parameter of the module, measured from inside the closure with eps 1 (theta + z and theta - z)."""
    seen: list[dict[str, Tensor]] = []

    def closure() -> float:
        seen.append({n: p.detach().double().clone() for n, p in model.named_parameters()})
        return 1.0

    opt.step(closure)
    return {n: (seen[0][n] - seen[1][n]) / 2 for n in seen[0]}


@PLACEMENTS
def test_ids_are_positions_and_do_not_change_with_freezing(placement):
    noise = noise_seen(transformer(), zokern.MeZO(transformer(), 0.0))  # an optimizer of another model: nothing moves
    assert all(not z.any() for z in noise.values())
    model = transformer()
    noise = noise_seen(model, zokern.MeZO(model, 0.0, eps=1.0, seed=3, placement=placement))
    seed = reference.derive_seed(3, 0, 0)
    for i, (_, z) in enumerate(noise.items()):
        want = torch.from_numpy(reference.noise(z.numel(), seed, i)).reshape(z.shape).double()
        assert torch.allclose(z, want, atol=1e-6, rtol=1e-6)
    frozen = transformer()
    frozen.embedding.requires_grad_(False)
    frozen.blocks[0].requires_grad_(False)
    opt = zokern.MeZO(frozen, 0.0, eps=1.0, seed=3, placement=placement)
    frozen.norm.requires_grad_(False)  # after the optimizer was made
    some = noise_seen(frozen, opt)
    for name, z in some.items():
        if name.startswith(("embedding", "blocks.0", "norm")):
            assert not z.any(), name
        else:
            assert torch.allclose(z, noise[name], atol=1e-6), name


@PLACEMENTS
def test_tied_parameters_move_once(placement):
    model = transformer()
    assert model.head.weight is model.embedding.weight
    start, losses = oracles.theta_of(model), script(1, 1)
    opt = zokern.MeZO(model, 1e-2, seed=2, placement=placement)
    tied = []

    values = scripted(losses)

    def closure() -> Tensor:
        tied.append(model.head.weight is model.embedding.weight)
        return values()

    opt.step(closure)
    assert tied == [True, True]
    assert model.head.weight is model.embedding.weight
    expected = oracles.MeZO(start, [oracles.Group(list(start), 1e-2)], seed=2)
    expected.step(scripted(losses))
    assert_equal_to_rounding(model, expected.theta, start, 3)
    assert opt.counters["elements_moved"] == 3 * 2 * sum(p.numel() for p in model.parameters())


def test_a_parameter_listed_twice_moves_once():
    p = nn.Parameter(torch.ones(50))
    q = nn.Parameter(torch.ones(50))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch itself warns of duplicates
        twice = zokern.MeZO([p, p], 1e-2, seed=1)
    once = zokern.MeZO([q], 1e-2, seed=1)
    twice.step(scripted([1.0, 3.0]))
    once.step(scripted([1.0, 3.0]))
    assert torch.equal(p, q)


@PLACEMENTS
def test_replaced_param_groups_are_honoured(placement):
    """The list is read at each step: a dropped parameter stays, a new dictionary's lr counts."""
    model = linear(6, 5, 2)
    every = list(model.parameters())
    opt = zokern.MeZO(model, 1e-2, seed=2, placement=placement)
    opt.step(scripted([1.0, 1.002]))
    middle = oracles.theta_of(model)
    opt.param_groups = [
        {"params": [every[3]], "lr": 0.1, "eps": 1e-3, "weight_decay": 0.0},
        {"params": [every[0]], "lr": 0.01, "eps": 1e-2, "weight_decay": 1.0},
    ]
    opt.step(scripted([1.0, 1.004]))
    expected = oracles.MeZO(
        middle, [oracles.Group([3], 0.1), oracles.Group([0], 0.01, 1e-2, 1.0)], seed=2, step_number=1
    )
    expected.step(scripted([1.0, 1.004]))
    after = oracles.theta_of(model)
    assert np.array_equal(after[1], middle[1])
    assert np.array_equal(after[2], middle[2])
    assert_equal_to_rounding(model, expected.theta, middle, 3)


def test_added_param_group_gets_the_next_ids():
    a, b = nn.Parameter(torch.zeros(40)), nn.Parameter(torch.zeros(40))
    opt = zokern.MeZO([("a", a)], 1.0, eps=1.0, seed=2)
    opt.add_param_group({"params": [b], "lr": 0.5})
    opt.step(scripted([3.0, 1.0]))
    seed = reference.derive_seed(2, 0, 0)
    assert torch.allclose(a, -torch.from_numpy(reference.noise(40, seed, 0)), atol=1e-6)
    assert torch.allclose(b, -0.5 * torch.from_numpy(reference.noise(40, seed, 1)), atol=1e-6)
    assert opt.state_dict()["zokern"]["names"][0] == ["a"]


@PLACEMENTS
def test_zero_size_parameters_are_skipped_and_keep_their_place(placement):
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.ones(5))
            self.empty = nn.Parameter(torch.ones(0, 3))
            self.b = nn.Parameter(torch.ones(7))

    model = Holder()
    noise = noise_seen(model, zokern.MeZO(model, 0.0, eps=1.0, seed=3, placement=placement))
    want = torch.from_numpy(reference.noise(7, reference.derive_seed(3, 0, 0), 2)).double()
    assert torch.allclose(noise["b"], want, atol=1e-6)


def test_frozen_parameters_of_any_type_are_left_alone():
    """Quantised base weights: integers in the module, not trainable, never touched."""
    model = linear(4, 3)
    model.register_parameter("codes", nn.Parameter(torch.arange(12, dtype=torch.uint8), requires_grad=False))
    opt = zokern.MeZO(model, 1e-2)
    opt.step(scripted([1.0, 2.0]))
    assert torch.equal(model.codes, torch.arange(12, dtype=torch.uint8))


# ------------------------------------------------------------------------------------------------------- side effects


def test_global_random_state_is_not_touched():
    model = transformer(torch.bfloat16)
    torch.manual_seed(1)
    np.random.seed(1)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    opt = zokern.LeZO(model, 1e-3, num_dropped=1, num_samples=2, seed=1)
    opt.step(lambda: model(sentences(0)))
    opt.load_state_dict(opt.state_dict())
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(before_numpy, np.random.get_state()[1])


def test_no_gradients_are_recorded():
    model = transformer()
    opt = zokern.MeZO(model, 1e-3, placement="shadow")

    def closure() -> Tensor:
        assert not torch.is_grad_enabled()
        return model(sentences(0))

    opt.step(closure)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    with torch.enable_grad():  # and backward through the weights works afterwards
        model(sentences(0)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_seeds_differ_between_steps_samples_and_runs():
    seen = set()
    for run in (0, 1):
        model = linear(4, 3)
        opt = zokern.MeZO(model, 0.0, eps=1.0, num_samples=2, seed=run)
        for _ in range(3):
            opt.step(lambda m=model: seen.add(tuple(m[0].weight.flatten().tolist())) or 1.0)
    assert len(seen) == 2 * 3 * 2 * 2  # none of the 24 perturbed states comes twice


def test_an_offloaded_model_is_told_what_to_do():
    model = nn.Linear(3, 3, device="meta")
    with pytest.raises(ValueError, match=r"weight is .* on meta .*: load the model whole, on one device"):
        zokern.MeZO(model, lr=1e-3)
    zokern.MeZO(model.to_empty(device="cpu"), lr=1e-3)


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay"])
def test_an_array_of_one_number_is_that_number(name):
    found = []
    for value in (0.25, np.array([0.25]), torch.tensor([0.25])):
        model = linear(3, 2)
        opt = zokern.MeZO(model, **{"lr": 0.5, "eps": 0.5, name: value})
        opt.step(lambda model=model: sum(p.sum() for p in model.parameters()))
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_state_saved_after_freezing_is_loaded_as_the_message_says():
    model, other, again = linear(3, 3, 2), linear(3, 3, 2), linear(3, 3, 2)
    opt = zokern.MeZO(model, lr=1e-3)
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    saved = opt.state_dict()
    next(iter(other.parameters())).requires_grad_(False)
    with pytest.raises(ValueError, match="make the optimizer first, and freeze then"):
        zokern.MeZO(other, lr=1e-3).load_state_dict(saved)
    opt = zokern.MeZO(again, lr=1e-3)
    next(iter(again.parameters())).requires_grad_(False)
    opt.load_state_dict(saved)
