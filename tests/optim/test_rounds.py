"""Methods as generators: what each asks, round by round, what it makes of the losses, and who drives it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests.methods import weights
from tests.models import small, tokens
from zokern import journal
from zokern.optim import METHODS, ZerothOrderOptimizer
from zokern.optim.drivers import Rounds, in_turn
from zokern.optim.update import Estimate

PLACEMENTS = pytest.mark.parametrize("placement", ["inplace", "shadow", "stream"])
A, B, C, D = 100, 101, 102, 103  # the seeds of directions 0, 1, 2, 3


class Told:
    """Numbers of a step in which direction k has the seed 100 + k."""

    def seed(self, k: int) -> int:
        return A + k


def number(value: object) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """rounds: the probes of each, and the losses that it is sent. The rest is the estimate."""

    method: str
    options: dict[str, Any]
    rounds: list[tuple[list[dict[int, float]], list[Any]]]
    gradient: dict[int, float]
    projected: float
    curvature: dict[int, float] = field(default_factory=dict)
    square_of_sum: bool = False


BOTH = [{A: 1.0}, {A: -1.0}]
CASES = {
    "mezo": Case("mezo", {}, [(BOTH, [3.0, 1.0])], {A: 1.0}, 1.0),
    "mezo-2": Case(
        "mezo",
        {"num_samples": 2},
        [([*BOTH, {B: 1.0}, {B: -1.0}], [3.0, 1.0, 2.0, 5.0])],  # 1 and -1.5 to either side
        {A: 0.5, B: -0.75},
        -0.25,
    ),
    "mezo-one-sided": Case("mezo", {"one_sided": True}, [([{}, {A: 1.0}], [1.0, 3.0])], {A: 2.0}, 2.0),
    "mezo-one-sided-2": Case(
        "mezo",
        {"one_sided": True, "num_samples": 2},
        [([{}, {A: 1.0}, {B: 1.0}], [1.0, 3.0, 0.0])],
        {A: 1.0, B: -0.5},
        0.5,
    ),
    "mezo-adam": Case("mezo", {"update": "adam"}, [(BOTH, [3.0, 1.0])], {A: 1.0}, 1.0),
    "mezo-adamezo": Case("mezo", {"update": "adamezo"}, [(BOTH, [3.0, 1.0])], {A: 1.0}, 1.0),
    "lezo": Case("lezo", {"num_dropped": 1}, [(BOTH, [3.0, 1.0])], {A: 1.0}, 1.0),
    "hizoo": Case("hizoo", {}, [([{}, *BOTH], [1.0, 3.0, 2.0])], {A: 0.5}, 0.5, {A: 1.5}),
    "hizoo-2": Case(
        "hizoo",
        {"num_samples": 2},
        [([{}, *BOTH, {B: 1.0}, {B: -1.0}], [1.0, 3.0, 2.0, 0.0, -4.0])],
        {A: 0.25, B: 1.0},
        1.25,
        {A: 0.75, B: 1.5},
    ),
    "helene": Case("helene", {"batch_size": 3}, [(BOTH, [4.0, 1.0])], {A: 1.5}, 1.5, {A: 6.75}),
    "helene-2": Case(
        "helene",
        {"num_samples": 2},
        [([*BOTH, {B: 1.0}, {B: -1.0}], [4.0, 0.0, 1.0, 3.0])],
        {A: 1.0, B: -0.5},
        0.5,
        {A: 2.0, B: 0.5},
    ),
    "helene-of-examples": Case(
        "helene", {"batch_size": 3}, [(BOTH, [[4.0, 2.0], [1.0, 3.0]])], {A: 0.5}, 0.5, {A: 1.25}
    ),
    "gv": Case(
        "mezo-gv",
        {"candidates": 4},
        [
            ([{A: 1.0}, {B: 1.0}, {C: 1.0}, {D: 1.0}], [3.0, 1.0, 4.0, 2.0]),
            ([{A: -0.5, B: 0.5, C: -0.5, D: 0.5}, {A: 0.5, B: -0.5, C: 0.5, D: -0.5}], [5.0, 2.0]),
        ],
        {A: -0.75, B: 0.75, C: -0.75, D: 0.75},
        1.5,
    ),
    "gv-uneven": Case(
        "mezo-gv",
        {"candidates": 3, "elite": 0.4},
        [
            ([{A: 1.0}, {B: 1.0}, {C: 1.0}], [3.0, 1.0, 4.0]),
            ([{A: -0.5, B: 1.0, C: -0.5}, {A: 0.5, B: -1.0, C: 0.5}], [5.0, 1.0]),
        ],
        {A: -1.0, B: 2.0, C: -1.0},
        2.0,
    ),
    "gv-curved": Case(
        "mezo-gv",
        {"candidates": 2, "smoothing": 0.1},
        [
            ([{}, {A: 1.0}, {B: 1.0}], [1.0, 3.0, 2.0]),
            ([{A: -1.0, B: 1.0}, {A: 1.0, B: -1.0}], [9.0, 1.0]),
        ],
        {A: -4.0, B: 4.0},
        4.0,
        {A: -1.0, B: 1.0},  # the root of |9 + 1 - 2 1| / 2 over 1 + 1
        square_of_sum=True,
    ),
    "greedy": Case(
        "mezo-greedy",
        {"candidates": 3},
        [([{A: 1.0}, {B: 1.0}, {C: 1.0}], [3.0, 1.0, 2.0]), ([{B: -1.0}], [2.0])],
        {B: -0.5},
        -0.5,
    ),
    "greedy-curved": Case(
        "mezo-greedy",
        {"candidates": 3, "smoothing": 0.1},
        [([{}, {A: 1.0}, {B: 1.0}, {C: 1.0}], [4.0, 3.0, 2.0, 1.0]), ([{C: -1.0}], [2.0])],
        {C: -0.5},
        -0.5,
        {C: 2.5},
    ),
    "fzoo": Case(
        "fzoo",
        {"candidates": 3},
        [([{}, {A: 1.0}, {B: 1.0}, {C: 1.0}], [1.0, 1.0, 3.0, 5.0])],  # sigma is 2
        {A: 0.0, B: 1 / 3, C: 2 / 3},
        1.0,
    ),
    "es": Case(
        "es", {"num_directions": 2, "maximize": False}, [([{A: 1.0}, {B: 1.0}], [1.0, 3.0])], {A: -0.5, B: 0.5}, 0.0
    ),
    "es-antithetic": Case(
        "es",
        {"num_directions": 2, "antithetic": True, "shaping": "ranked", "maximize": False},
        [([*BOTH, {B: 1.0}, {B: -1.0}], [1.0, 3.0, 2.0, 4.0])],  # rewards are minus these: 1/2, -1/6, 1/6, -1/2
        {A: -1 / 6, B: -1 / 6},
        -1 / 3,
    ),
}
EACH = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def test_every_method_has_a_case() -> None:
    assert {case.method for case in CASES.values()} == set(METHODS)


def rounds_of(case: Case) -> Rounds:
    opt = METHODS[case.method](small(), 1e-2, **case.options)
    opt.numbers = Told()
    return opt.rounds()


def plain(terms: Mapping[Any, Any]) -> list[tuple[int, float]]:
    """In their order."""
    return [(int(seed), float(multiple)) for seed, multiple in terms.items()]


def assert_found(estimate: Estimate, case: Case) -> None:
    for terms, wanted in ((estimate.gradient, case.gradient), (estimate.curvature, case.curvature)):
        assert list(map(int, terms)) == list(wanted)
        for seed, value in terms.items():
            assert value.dtype == torch.float64
            assert float(value) == pytest.approx(wanted[int(seed)], rel=1e-15, abs=1e-15)
    assert float(estimate.projected) == pytest.approx(case.projected, rel=1e-15, abs=1e-15)
    assert estimate.square_of_sum == case.square_of_sum


@EACH
def test_rounds_by_hand(case: Case) -> None:
    rounds, losses = rounds_of(case), None
    for wanted, returned in case.rounds:
        probes = next(rounds) if losses is None else rounds.send(losses)
        assert list(map(plain, probes)) == list(map(plain, wanted))
        losses = list(map(number, returned))
    with pytest.raises(StopIteration) as done:
        rounds.send(losses)
    assert_found(done.value.value, case)


@EACH
def test_rounds_in_turn(case: Case) -> None:
    script = [loss for _, returned in case.rounds for loss in returned]
    seen: list[list[tuple[int, float]]] = []

    def evaluate(terms: Mapping[Any, Any]) -> Tensor:
        seen.append(plain(terms))
        return number(script[len(seen) - 1])

    assert_found(in_turn(rounds_of(case), evaluate), case)
    assert seen == [plain(terms) for wanted, _ in case.rounds for terms in wanted]


@EACH
def test_the_first_perturbed_weights_are_along_direction_0(case: Case) -> None:
    """pipelined=True makes them in the step before."""
    assert plain(next(terms for terms in next(rounds_of(case)) if terms)) == [(A, 1.0)]


# ------------------------------------------------------------------------------------------------------- who drives them


class Watched:
    """A method's rounds as a generator that tells what it is sent, and when it is over."""

    def __init__(self, *rounds: list[dict[int, float]]) -> None:
        self.sent: list[list[float]] = []
        self.over = False
        self.generator = self._run(rounds)  # held, so that nothing but a close ends it

    def _run(self, rounds: tuple[list[dict[int, float]], ...]) -> Generator[Any, Any, Any]:
        try:
            for probes in rounds:
                self.sent.append(list(map(float, (yield probes))))
            return "the estimate"
        finally:
            self.over = True


def by_seed(terms: Mapping[Any, Any]) -> Tensor:
    return number(sum(seed * multiple for seed, multiple in terms.items()))


def test_probes_are_evaluated_in_the_order_of_the_round() -> None:
    watched = Watched([{2: 1.0}, {1: 1.0}, {2: -1.0}], [{7: 1.0}], [{1: 0.5, 2: 2.0}, {}])
    seen: list[dict[int, float]] = []
    assert in_turn(watched.generator, lambda terms: seen.append(dict(terms)) or by_seed(terms)) == "the estimate"
    assert seen == [{2: 1.0}, {1: 1.0}, {2: -1.0}, {7: 1.0}, {1: 0.5, 2: 2.0}, {}]
    assert watched.sent == [[2.0, 1.0, -2.0], [7.0], [4.5, 0.0]]
    assert watched.over


def test_a_round_is_reduced_once_and_what_comes_of_it_is_sent() -> None:
    watched, got = Watched([{2: 1.0}, {1: 1.0}], [{7: 1.0}]), []

    def reduce(losses: list[Tensor]) -> list[Tensor]:
        got.append(list(map(float, losses)))
        return [loss + 10.0 for loss in losses]

    in_turn(watched.generator, by_seed, reduce)
    assert got == [[2.0, 1.0], [7.0]]
    assert watched.sent == [[12.0, 11.0], [17.0]]


def test_an_empty_round_is_sent_nothing() -> None:
    watched = Watched([], [{3: 1.0}], [])
    assert in_turn(watched.generator, by_seed) == "the estimate"
    assert watched.sent == [[], [3.0], []]


def test_a_method_may_return_at_once() -> None:
    watched = Watched()
    assert in_turn(watched.generator, lambda terms: pytest.fail("nothing was asked")) == "the estimate"
    assert watched.over


def raising(error: BaseException) -> Callable[..., Any]:
    def evaluate(*_: Any) -> Any:
        raise error

    return evaluate


@pytest.mark.parametrize("error", [StopIteration(5), ValueError(), KeyboardInterrupt(), GeneratorExit()], ids=repr)
@pytest.mark.parametrize("who", ["a closure", "reduce"])
def test_what_is_raised_reaches_the_user_after_the_method_is_closed(error: BaseException, who: str) -> None:
    """StopIteration is not taken for the method's end, and a finally inside rounds has run."""
    watched = Watched([{2: 1.0}], [{7: 1.0}])
    evaluate, reduce = (by_seed, raising(error)) if who == "reduce" else (raising(error), None)
    with pytest.raises(type(error)) as raised:
        in_turn(watched.generator, evaluate, reduce)
    assert raised.value is error
    assert watched.over
    assert watched.sent == []


def test_what_a_method_raises_reaches_the_user() -> None:
    def rounds() -> Rounds:
        yield [{1: 1.0}]
        raise ZeroDivisionError("in the method")

    with pytest.raises(ZeroDivisionError, match="in the method"):
        in_turn(rounds(), by_seed)


# ------------------------------------------------------------------------------------------------------ a user's method


class Own(ZerothOrderOptimizer):
    """MeZO with one sample."""

    def rounds(self) -> Rounds:
        plus, minus = yield [{self.numbers.seed(0): 1.0}, {self.numbers.seed(0): -1.0}]
        return Estimate({self.numbers.seed(0): (plus - minus) / 2}, (plus - minus) / 2)


class OneByOne(Own):
    """The same, a probe a round."""

    def rounds(self) -> Rounds:
        seed = self.numbers.seed(0)
        (plus,) = yield [{seed: 1.0}]
        (minus,) = yield [{seed: -1.0}]
        return Estimate({seed: (plus - minus) / 2}, (plus - minus) / 2)


class WithEmptyRounds(Own):
    def rounds(self) -> Rounds:
        assert (yield []) == []
        estimate = yield from super().rounds()
        assert (yield []) == []
        return estimate


class WithTensors(Own):
    """Multiples of eps that the device knows."""

    def rounds(self) -> Rounds:
        seed, one = self.numbers.seed(0), number(1.0)
        plus, minus = yield [{seed: one}, {seed: -one}]
        return Estimate({seed: (plus - minus) / 2}, (plus - minus) / 2)


def run(cls: type, steps: int = 4, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, list[Tensor]]:
    model = small(dtype)
    opt = cls(model, 1e-2, eps=0.05, seed=9, **options)
    for step in range(steps):
        opt.step(lambda step=step: model(tokens(step)))
    return opt, [*weights(model), *opt.metrics.values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@PLACEMENTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [Own, OneByOne, WithEmptyRounds, WithTensors])
def test_a_method_of_two_lines_has_the_bits_of_mezo(cls: type, dtype: torch.dtype, placement: str) -> None:
    opt, mine = run(cls, dtype=dtype, placement=placement)
    mezo, wanted = run(zokern.MeZO, dtype=dtype, placement=placement)
    assert same(mine, wanted)
    assert opt.counters == mezo.counters
    assert not same(mine[:-2], weights(small(dtype)))


@pytest.mark.parametrize("placement", ["shadow", "stream"])
def test_it_can_be_pipelined(placement: str) -> None:
    assert same(run(Own, placement=placement, pipelined=True)[1], run(zokern.MeZO, placement=placement)[1])


def test_it_learns() -> None:
    torch.manual_seed(0)
    x, model = torch.randn(32, 3), nn.Linear(3, 1)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]])
    opt = Own(model, 0.02)
    losses = [float(opt.step(lambda: nn.functional.mse_loss(model(x), y))) for _ in range(300)]
    assert losses[-1] < 0.05 * losses[0]


def test_it_is_saved_and_goes_on(tmp_path: Path) -> None:
    """By its class's name: another method does not take its state."""
    model = small()
    opt = Own(model, 1e-2, eps=0.05, seed=9)
    with journal.write(opt, tmp_path / "run.zkj"):
        for step in range(2):
            opt.step(lambda step=step: model(tokens(step)))
    replayed = small()
    journal.replay(tmp_path / "run.zkj", replayed)
    assert same(weights(replayed), weights(model))
    more = Own(replayed, 1.0)
    more.load_state_dict(opt.state_dict())
    for step in range(2, 4):
        more.step(lambda step=step: replayed(tokens(step)))
    assert same([*weights(replayed), *more.metrics.values()], run(zokern.MeZO)[1])
    with pytest.raises(ValueError, match="Own"):
        zokern.MeZO(small(), 1e-2).load_state_dict(opt.state_dict())


@PLACEMENTS
def test_stop_iteration_in_a_closure_reaches_the_user(placement: str) -> None:
    """A script that has run out."""
    over: list[bool] = []

    class Closing(Own):
        def rounds(self) -> Rounds:
            try:
                return (yield from super().rounds())
            finally:
                over.append(True)

    model = small()
    opt, script = Closing(model, 1e-2, placement=placement), iter([1.0])
    with pytest.raises(StopIteration):
        opt.step(lambda: model(tokens(0)) * next(script))
    assert over == [True]
    assert opt.counters["steps"] == 0
    exact = 0.0 if placement != "inplace" else 1e-6
    assert all(torch.allclose(a, b, rtol=0, atol=exact) for a, b in zip(weights(model), weights(small()), strict=True))
    opt.step(lambda: model(tokens(0)))
    assert opt.counters["steps"] == 1


class Blind(Own):
    """Moves the weights by what it knows without asking."""

    def rounds(self) -> Rounds:
        yield from ()
        return Estimate({self.numbers.seed(0): number(0.5)}, number(0.5))


def test_a_method_that_never_asks_still_updates() -> None:
    model = small()
    opt = Blind(model, 1e-2, eps=1.0)
    opt.step(lambda: pytest.fail("nothing was asked"))
    assert opt.counters["steps"] == 1
    assert opt.skipped_steps == 0
    assert not same(weights(model), weights(small()))
