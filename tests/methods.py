"""One case for each method and option of the suite, and what tests do with them.

A method of zokern.optim.METHODS without a case fails a test (optim/test_methods.py). A new method is one more entry of
METHODS, and inherits every test that is parametrised over it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zokern
from tests import oracles
from tests.oracles import Group, Theta
from zokern.optim import METHODS as REGISTERED

EPS, SEED = 0.05, 11


@dataclass(frozen=True)
class Case:
    """A method with options, what a step of it costs, and learning rates that suit the tests."""

    method: str  # its name in zokern.optim.METHODS
    options: dict[str, Any]  # the constructor's; a function is called first
    forwards: int
    passes: int
    lr: float  # for given losses: moves weights by about 0.1 in five steps
    rate: float  # for least squares: learns them
    states: tuple[str, ...] = ()
    oracle: Callable[[Theta], dict[str, Any]] = field(default=lambda theta: {})  # options that the oracle has otherwise

    @property
    def cls(self) -> type[zokern.optim.ZerothOrderOptimizer]:
        return REGISTERED[self.method]

    @property
    def settings(self) -> dict[str, Any]:
        given = {name: value() if callable(value) else value for name, value in self.options.items()}
        return {"maximize": True, **given} if self.climbs else given

    @property
    def climbs(self) -> bool:
        return self.method == "es"

    @property
    def remembers(self) -> bool:
        """Keeps past steps, beside what is in its states."""
        return self.options.get("update") == "adamezo" or "keep_best" in self.options


VARIANTS = {"lezo": "mezo"}  # another method with an option, `layers`, which tests give to all cases
METHODS: dict[str, Case] = {
    "mezo": Case("mezo", {"num_samples": 2}, 4, 5, lr=0.03, rate=0.05),
    "mezo-one-sided": Case("mezo", {"one_sided": True}, 2, 2, lr=0.02, rate=0.03),
    "mezo-one-sided-3": Case("mezo", {"one_sided": True, "num_samples": 3}, 4, 4, lr=0.02, rate=0.05),
    "mezo-momentum": Case(
        "mezo", {"update": "momentum", "betas": (0.8, 0.5), "num_samples": 2}, 4, 5, lr=0.01, rate=0.01, states=("m",)
    ),
    "mezo-adam": Case("mezo", {"update": "adam"}, 2, 3, lr=0.02, rate=0.05, states=("m", "v")),
    "mezo-adam-one-sided": Case(
        "mezo",
        {"update": "adam", "betas": (0.7, 0.9), "delta": 1e-2, "one_sided": True, "num_samples": 2},
        3,
        3,
        lr=0.02,
        rate=0.05,
        states=("m", "v"),
    ),
    "mezo-adamezo": Case("mezo", {"update": "adamezo", "horizon": 3, "betas": (0.8, 0.9)}, 2, 3, lr=0.02, rate=0.02),
    "mezo-adamezo-one-sided": Case(
        "mezo", {"update": "adamezo", "one_sided": True, "delta": 1e-3}, 2, 2, lr=0.01, rate=0.005
    ),
    "mezo-adamezo-released": Case(
        "mezo",
        {"update": "adamezo", "horizon": 2, "betas": (0.7, 0.9), "scale": "released"},
        2,
        3,
        lr=3e-3,  # a hundred times that from step 3 on
        rate=3e-4,
    ),
    "mezo-sign": Case("mezo", {"update": "sign", "num_samples": 2}, 4, 5, lr=0.02, rate=0.02),
    "hizoo": Case("hizoo", {"smoothing": 1e-2}, 3, 3, lr=0.03, rate=0.1, states=("h",)),
    "hizoo-3": Case("hizoo", {"smoothing": 2e-2, "num_samples": 3}, 7, 7, lr=0.03, rate=0.1, states=("h",)),
    "hizoo-signs": Case(
        "hizoo", {"smoothing": 2e-2, "distribution": "rademacher"}, 3, 3, lr=0.03, rate=0.1, states=("h",)
    ),
    "helene": Case(
        "helene",
        {"betas": (0.9, 0.8), "anneal_steps": 3, "hessian_interval": 2, "batch_size": 3, "gamma": 1.5, "delta": 1e-2},
        2,
        3,
        lr=0.01,
        rate=0.02,
        states=("m", "h"),
        oracle=lambda theta: {"floor": lambda i: 1.0},
    ),
    "helene-by-layer": Case(
        "helene",
        {
            "betas": (0.5, 0.9),
            "hessian_interval": 1,
            "num_samples": 2,
            "floor": lambda: zokern.ByLayer(2.0),
        },
        4,
        5,
        lr=0.01,
        rate=0.02,
        states=("m", "h"),
        oracle=lambda theta: {"floor": lambda i: 2.0 / math.sqrt(theta[i].size)},
    ),
    "gv": Case("mezo-gv", {}, 6, 7, lr=0.03, rate=0.05),
    "gv-uneven": Case(
        "mezo-gv", {"candidates": 5, "elite": 0.4, "distribution": "rademacher"}, 7, 8, lr=0.03, rate=0.05
    ),
    "gv-curved": Case(
        "mezo-gv", {"candidates": 3, "elite": 0.4, "smoothing": 1e-2}, 6, 6, lr=0.03, rate=0.1, states=("h",)
    ),
    "gv-kept": Case("mezo-gv", {"candidates": 2, "keep_best": True}, 4, 5, lr=0.03, rate=0.05),
    "greedy": Case("mezo-greedy", {}, 5, 6, lr=0.03, rate=0.05),
    "greedy-curved": Case("mezo-greedy", {"candidates": 3, "smoothing": 1e-2}, 5, 5, lr=0.03, rate=0.1, states=("h",)),
    "fzoo": Case("fzoo", {"candidates": 4}, 5, 5, lr=0.002, rate=0.003),
    "fzoo-normal": Case("fzoo", {"candidates": 3, "distribution": "normal"}, 4, 4, lr=0.002, rate=0.003),
    "fzoo-released": Case("fzoo", {"candidates": 4, "scale": "released"}, 5, 5, lr=0.04, rate=0.06),
    "es-released": Case("es", {"num_directions": 5, "scale": "released"}, 5, 6, lr=0.04, rate=0.06),
    "es": Case("es", {"num_directions": 5}, 5, 6, lr=0.002, rate=0.003),
    "es-antithetic": Case("es", {"num_directions": 3, "antithetic": True}, 6, 7, lr=0.002, rate=0.003),
    "es-ranked": Case("es", {"num_directions": 6, "shaping": "ranked"}, 6, 7, lr=0.005, rate=0.008),
    "es-ranked-antithetic": Case(
        "es",
        {"num_directions": 3, "shaping": "ranked", "antithetic": True, "distribution": "rademacher"},
        6,
        7,
        lr=0.005,
        rate=0.008,
    ),
}
CASES = pytest.mark.parametrize("case", list(METHODS.values()), ids=list(METHODS))
CURVED = pytest.mark.parametrize("name", ["hizoo", "gv-curved", "greedy-curved"])
PLACEMENTS = pytest.mark.parametrize("placement", ["inplace", "shadow"])


def build(case: Case, params: Any, **options: Any) -> Any:
    return case.cls(params, case.lr, **{"eps": EPS, "seed": SEED, **case.settings, **options})


def expected_of(case: Case, theta: Theta, groups: Sequence[Group] | None = None, **more: Any) -> Any:
    groups = [Group(list(theta), case.lr, EPS)] if groups is None else groups
    own = {name: value for name, value in case.options.items() if not callable(value)}
    return getattr(oracles, case.cls.__name__)(theta, groups, **{"seed": SEED, **own, **case.oracle(theta), **more})


def given(case: Case, step: int) -> list[float]:
    """The losses of a step's forwards, apart by about 0.1: projected gradients of about 1 and curvatures of about 50."""
    return [float(x) for x in 1.0 + 0.1 * np.random.default_rng([7, step]).standard_normal(case.forwards)]


def scripted(values: Iterable[Any]) -> Callable[..., Any]:
    """A closure, and as well an oracle's loss, that returns these in turn, as float64 tensors."""
    it = iter(values)
    return lambda *_: torch.tensor(next(it), dtype=torch.float64)


def params_of(model: nn.Module) -> list[nn.Parameter]:
    return list(model.parameters())


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().cpu().clone() for p in model.parameters()]


def state_of(opt: Any, p: nn.Parameter) -> dict[str, Tensor]:
    """The states of a parameter, as copies; nothing is made for one that has none."""
    return {n: torch.as_tensor(v).detach().cpu().clone() for n, v in opt.state[p].items()} if p in opt.state else {}


def states(opt: Any, model: nn.Module) -> list[dict[str, Tensor]]:
    return [state_of(opt, p) for p in model.parameters()]


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_same_states(a: Sequence[dict[str, Tensor]], b: Sequence[dict[str, Tensor]]) -> None:
    for i, (mine, theirs) in enumerate(zip(a, b, strict=True)):
        assert mine.keys() == theirs.keys(), f"tensor {i}"
        for name, value in mine.items():
            assert value.dtype == theirs[name].dtype, f"{name} of tensor {i}"
            assert torch.equal(value, theirs[name]), f"{name} of tensor {i}"


def play(case: Case, opt: Any, steps: Iterable[int]) -> None:
    for t in steps:
        opt.step(scripted(given(case, t)))


def relative_error(now: Theta, expected: Theta, start: Theta) -> float:
    """Of the distance moved, which weights that hardly move cannot hide."""
    error = sum(float(((now[i] - expected[i]) ** 2).sum()) for i in expected)
    distance = sum(float(((expected[i] - start[i]) ** 2).sum()) for i in expected)
    return math.sqrt(error / distance)


def assert_close(model: nn.Module, expected: Theta, start: Theta, passes: int, eps: float = EPS) -> None:
    """A pass rounds twice, at the size of a perturbed weight; scalars and states are float32, a few times 2^-24 each."""
    now = oracles.theta_of(model)
    for i, want in expected.items():
        size = np.maximum(abs(want), abs(start[i])).max() + 6 * eps
        bound = 2.0**-24 * (2 * passes * size + 64 * abs(want - start[i]).max())
        worst = abs(now[i] - want).max() / bound
        assert worst < 1, f"tensor {i}: {worst} times what rounding explains"
    assert relative_error(now, expected, start) < 1e-4  # the weights did move by much more than that


def assert_close_states(case: Case, opt: Any, model: nn.Module, expected: Any) -> None:
    for i, p in enumerate(model.parameters()):
        want = {name: value for name, value in expected.state.get(i, {}).items() if name != "step"}
        mine = state_of(opt, p)
        assert set(want) == (set(case.states) if i in expected.state else set())
        for name, value in want.items():
            assert mine[name].dtype == torch.float32
            assert mine[name].shape == p.shape
            error = abs(mine[name].double().numpy() - value).max()
            assert error <= 1e-5 * abs(value).max(), f"{name} of tensor {i} is off by {error}"


def dropped_tensors(model: nn.Module, num_dropped: int) -> Callable[[int], set[int]]:
    """The oracle's view of RandomBlocks: the tensor ids that a step leaves out."""
    blocks = zokern.RandomBlocks(num_dropped)
    blocks.bind(model)
    every = params_of(model)

    def dropped(step: int) -> set[int]:
        out = blocks.dropped(SEED, step)
        return {i for i, p in enumerate(every) if not blocks.is_active(p, out)}

    return dropped


def saved(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)
