"""What each method refuses: an error that names the argument, and nothing is changed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import zokern
from tests.methods import (
    CASES,
    METHODS,
    PLACEMENTS,
    assert_same_states,
    build,
    equal,
    given,
    play,
    scripted,
    states,
    weights,
)
from tests.models import small


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
