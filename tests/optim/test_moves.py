"""A step that moves the weights too far: how far is known beforehand, it is told once, and no default does it."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zokern
from tests.methods import CASES, METHODS, Case, given, scripted
from tests.models import small
from zokern.contract.rules import RULES
from zokern.optim import ENTRIES, moves
from zokern.optim.ledger import Ledger
from zokern.optim.moves import Moves, mean_square
from zokern.optim.update import Update

# How much more than it does a first step is said to move: momentum's is that of a run whose steps are all like it.
MORE = {
    "mezo-momentum": 1 / math.sqrt(1 - 0.8**2),
    "helene": 1 / math.sqrt(1 - 0.9**2),
    "helene-by-layer": 1 / math.sqrt(1 - 0.5**2),
}
DIVIDING = ("adam", "hizoo", "helene", "curved")  # by what differs from element to element: said is a little more


def wide(seed: int = 0, std: float = 0.02) -> nn.Module:
    """Weights as those of language models, some of them 0."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 400), nn.Tanh(), nn.Linear(400, 8))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=std)
            p.view(-1)[::5] = 0.0
    return model


def loss_of(model: nn.Module, seed: int = 5) -> Any:
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(32, 64, generator=g), torch.randint(8, (32,), generator=g)
    return lambda: nn.functional.cross_entropy(model(x), y)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().reshape(-1) for p in model.parameters()])


def moved(before: Tensor, after: Tensor) -> float:
    return float((after - before).square().mean().sqrt() / before[before != 0].square().mean().sqrt())


@CASES
@pytest.mark.filterwarnings("ignore::zokern.ZokernWarning")
def test_how_far_a_step_goes_is_known_before_it_is_done(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first step, from the numbers of the pass alone; LIMIT is lowered to see it."""
    name = next(name for name, one in METHODS.items() if one is case)
    monkeypatch.setattr(moves, "LIMIT", 1e-9)
    model = wide()
    before = flat(model)
    opt = case.cls(model, case.lr, eps=0.05, weight_decay=0.5, **case.settings)
    opt.step(scripted(given(case, 0)))
    said, done = math.sqrt(float(opt._moves.seen[1])), moved(before, flat(model))
    assert opt.large_steps == 1
    high = 1.2 if any(part in name for part in DIVIDING) else 1.03
    assert 0.97 * done < said / MORE.get(name, 1.0) < high * done


def test_a_step_is_told_before_anything_is_written() -> None:
    model = wide()
    before, opt = flat(model), zokern.MeZO(model, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", zokern.ZokernWarning)
        with pytest.raises(zokern.ZokernWarning, match="a step moves the trained weights by"):
            opt.step(scripted([1.0, 1.002]))
    assert torch.allclose(before, flat(model), rtol=0, atol=1e-8)  # restored, which rounds
    assert opt.counters["steps"] == 0


def test_it_is_told_once_with_the_ratio_the_remedy_and_the_users_line() -> None:
    model = wide()
    opt = zokern.MeZO(model, 0.0)
    rms = float(mean_square(model.parameters()).sqrt())
    for c, large in ((0.24 * rms, 0), (0.26 * rms, 1), (0.6 * rms, 2)):
        opt.param_groups[0]["lr"] = c
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            opt.step(scripted([1.001, 0.999]))  # c = 1
        assert opt.large_steps == large
        assert len(told) == (large == 1)
        for one in told:
            assert one.filename == __file__
            assert "by 0.26 times their rms" in str(one.message)
            assert "lower lr. Further such steps are only counted: see large_steps" in str(one.message)
    assert math.sqrt(float(opt._moves.seen[1])) == pytest.approx(0.6, rel=1e-6)


def test_a_step_that_is_skipped_moves_nothing() -> None:
    opt = zokern.MeZO(wide(), 1e3)
    with pytest.warns(zokern.ZokernWarning, match="not finite"):
        opt.step(scripted([math.nan, 1.0]))
    assert opt.large_steps == 0


def test_weights_that_are_all_zero_have_no_size() -> None:
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    opt = zokern.MeZO(model, 1e3)
    opt.step(scripted([1.0, 2.0]))
    assert opt.large_steps == 0


def test_groups_count_by_their_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "LIMIT", 1e-9)
    model = wide()
    first, *rest = model.parameters()
    before = flat(model)
    opt = zokern.MeZO([{"params": [first], "lr": 1e-3}, {"params": rest, "lr": 5e-2}], 1.0, distribution="rademacher")
    opt.step(scripted([1.001, 0.999]))
    assert math.sqrt(float(opt._moves.seen[1])) == pytest.approx(moved(before, flat(model)), rel=1e-4)


def test_the_size_is_taken_once_and_again_when_parameters_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(moves, "mean_square", lambda params: (taken.append(1), mean_square(params))[1])
    model = small()
    opt = zokern.HELENE(model, 1e-6, layers=None)
    for _ in range(4):
        opt.step(scripted([1.0, 1.1]))
    assert len(taken) == 1
    p = next(model.parameters())
    p.data = p.data.clone()
    for _ in range(2):
        opt.step(scripted([1.0, 1.1]))
    assert len(taken) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mean_square_leaves_zeros_out(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "CHUNK", 64)
    torch.manual_seed(1)
    strided = torch.randn(17, 9).t(), torch.randn(3, 40)[:, ::2]
    strided[0][2].zero_()
    tensors = [t.to(dtype) for t in (*strided, torch.randn(()), torch.zeros(5), torch.full((300,), 200.0))]
    assert not tensors[0].is_contiguous()
    every = np.concatenate([t.double().numpy().reshape(-1) for t in tensors])
    assert float(mean_square(tensors)) == pytest.approx((every[every != 0] ** 2).mean(), rel=1e-5)
    assert float(mean_square([torch.zeros(4)])) == 0.0
    assert float(mean_square([torch.zeros(0, 5), torch.tensor(3.0), torch.zeros(0)])) == 9.0
    assert float(mean_square([])) == 0.0


@CASES
@pytest.mark.filterwarnings("ignore::zokern.ZokernWarning")
def test_counted_on_a_device_as_on_the_host(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a device does, with the gate of a captured step, on the CPU: the same counts and ratios."""
    other = Moves()
    both: list[tuple[float, float]] = []
    here = Moves.note

    def note(
        self: Moves, update: Update, lr: Tensor, ok: Tensor, gate: Tensor | None, advice: Any, ledger: Any
    ) -> None:
        here(self, update, lr, ok, gate, advice, ledger)
        other.square, other._shares = self.square, self._shares
        here(
            other, update, lr, ok & bool(opt.counters["steps"] != 1), torch.ones(1, dtype=torch.int32), advice, Ledger()
        )
        both.append((float(self.seen[0]), float(other.seen[0])))

    monkeypatch.setattr(Moves, "note", note)
    opt = case.cls(wide(), 30 * case.lr, eps=0.05, **case.settings)
    for t in range(4):
        opt.step(scripted(given(case, t)))
    assert [a - (t >= 1) * (both[1][0] - both[0][0]) for t, (a, _) in enumerate(both)] == [b for _, b in both]
    assert both[-1][1] > 0
    if both[1][0] == both[0][0]:
        assert torch.allclose(other.seen, opt._moves.seen, rtol=1e-9)


def an_update(rule: str, rows: int, num_seeds: int, seed: int, square_of_sum: bool = False) -> tuple[Update, Tensor]:
    """With numbers of any size, which are those of no method; and lr."""
    g = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g, dtype=torch.float64) * 10.0 ** float(
            torch.randint(-6, 3, (1,), generator=g)
        )

    coefs = {name: some(rows, num_seeds) - 0.01 for name in RULES[rule].coefs if name != "A" or rule == "axpy"}
    shared = {name: some(rows) for name in RULES[rule].scalars}
    shared |= {name: some(rows).clamp(max=0.99) for name in shared if name.startswith(("decay", "beta", "smoothing"))}
    return Update(list(range(num_seeds)), coefs, shared, rule, square_of_sum=square_of_sum), some(rows)


def moves_of(rows: int) -> Moves:
    made = Moves()
    made._parts = [(r + 1) / sum(range(1, rows + 1)) for r in range(rows)]
    made._shares = torch.tensor(made._parts, dtype=torch.float64) if rows > 1 else None
    made.square, made._square = torch.tensor(0.37, dtype=torch.float64), 0.37
    return made


@pytest.mark.parametrize("rule", moves.ADDED)
def test_pythons_numbers_say_what_torch_says(rule: str) -> None:
    for rows, num_seeds, squared in ((1, 1, False), (1, 5, True), (3, 1, False), (moves.FEW, 4, True)):
        for seed in range(8):
            update, lr = an_update(rule, rows, num_seeds, seed, squared and rule == "hizoo")
            own = moves_of(rows)
            said = float(own._by_torch(update, lr, torch.device("cpu")))
            assert own._ratio(update, lr) == pytest.approx(said, rel=1e-12)


def test_a_division_by_0_goes_infinitely_far_as_torch_says() -> None:
    """As an update of somebody else's may have it: no curvature, and nothing left of what it was."""
    update, lr = an_update("hizoo", 1, 1, 0)
    update = dataclasses.replace(
        update, coefs={**update.coefs, "V": torch.zeros(1, 1)}, shared={**update.shared, "smoothing": torch.ones(1)}
    )
    own = moves_of(1)
    assert own._ratio(update, lr) == float(own._by_torch(update, lr, torch.device("cpu"))) == math.inf


@pytest.mark.parametrize("rows", [1, 2, moves.FEW, moves.FEW + 1])
def test_the_steps_that_are_large_are_known_to_the_last_bits(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Python's numbers and, for many rows, by torch's: counted from LIMIT on and not before."""
    torch.manual_seed(3)
    params = [nn.Parameter(torch.randn(4)) for _ in range(rows)]
    opt = zokern.MeZO([{"params": [p]} for p in params], 0.0, eps=0.5)
    size = float(mean_square(params).sqrt())
    large = []
    for factor in (0.1, 1 - 1e-9, 1 + 1e-9, 0.5, 3.0, 1 - 1e-9):
        for group in opt.param_groups:
            group["lr"] = factor * moves.LIMIT * size
        opt.step(scripted([1.5, 0.5]))  # c = 1
        large.append(opt.large_steps)
        opt._moves.version = -1  # the size is that of the weights now
        size = float(mean_square(params).sqrt())
    assert large == [0, 0, 1, 1, 2, 2]


def test_every_rule_of_an_update_is_measured() -> None:
    probes = {"scaled_axpy", "hizoo_restore"}
    assert set(moves.ADDED) == set(RULES) - probes


def test_an_update_of_a_rule_that_is_not_known_is_refused() -> None:
    class Odd(zokern.MeZO):
        """With a rule of its own."""

        def update(self, estimate: Any, rates: Any) -> Update:
            return dataclasses.replace(super().update(estimate, rates), rule="twirl")

    opt = Odd(wide(), 1e-3)
    with pytest.raises(ValueError, match=r"the rule 'twirl' has no place in zokern/optim/moves\.py"):
        opt.step(scripted([1.0, 1.1]))
    assert opt.counters["steps"] == 0


DEFAULTS: list[tuple[str, dict[str, Any], float]] = [
    *((name, {}, entry.lr) for name, entry in ENTRIES.items() if name != "lezo"),  # mezo where there are no blocks
    *(("mezo", {"update": update}, lr) for update, lr in ENTRIES["mezo"].lr_of.items()),
]


@pytest.mark.parametrize(
    ("name", "options", "lr"), DEFAULTS, ids=[f"{n}-{o.get('update', '')}" for n, o, _ in DEFAULTS]
)
def test_no_default_goes_too_far(name: str, options: dict[str, Any], lr: float) -> None:
    """With lr that `zokern finetune` takes."""
    model = wide()
    loss, opt = loss_of(model), ENTRIES[name].cls(model, lr, maximize=name == "es", **options)
    for _ in range(20):
        opt.step(loss if name != "es" else lambda: -loss())
    assert opt.large_steps == 0


def test_a_default_device_of_the_user_s_changes_nothing() -> None:
    """With several rows, where the step is counted and told."""
    model = wide()
    groups = [{"params": [p]} for p in model.parameters()]
    loss = loss_of(model)
    values = [float(loss()) + 0.1 * i for i in range(2)]
    torch.set_default_device("meta")
    try:
        opt = zokern.MeZO(groups, 1e6)
        with pytest.warns(zokern.ZokernWarning, match="a step moves the trained weights"):
            opt.step(lambda: values.pop())
    finally:
        torch.set_default_device(None)
    assert opt.large_steps == 1


RELEASED = {  # the released code's lr given to the paper's formula
    "fzoo": (zokern.FZOO, {"lr": 5e-5, "eps": 1e-4, "candidates": 8}, 1.0),
    "es": (zokern.ES, {"lr": 5e-4, "eps": 1e-3, "num_directions": 30}, -1.0),
}


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_lr_without_its_scale_is_told_in_the_first_step_and_the_remedy_helps(name: str) -> None:
    cls, options, sign = RELEASED[name]
    model = wide()
    loss, opt = loss_of(model), cls(model, maximize=sign < 0, **options)
    with pytest.warns(
        zokern.ZokernWarning, match='lower lr; if lr is that of the released code.*give scale="released"'
    ):
        opt.step(lambda: sign * loss())
    opt = cls(model := wide(), **options, maximize=sign < 0, scale="released")
    loss = loss_of(model)
    for _ in range(10):
        opt.step(lambda: sign * loss())
    assert opt.large_steps == 0
    opt.param_groups[0]["lr"] = 1e3
    with pytest.warns(zokern.ZokernWarning, match=r"lower lr\. Further"):
        opt.step(lambda: sign * loss())
