"""`placement=` takes an object of yours, and `distribution=` one of zokern's."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests.methods import CASES, METHODS, Case, build, given, scripted, states, weights
from tests.models import small, tokens
from zokern import directions, journal
from zokern.contract.rules import RULES
from zokern.passes.spec import PassNumbers, PassSpec
from zokern.passes.update import Terms, Update, packed, perturbation, seed_tensor
from zokern.placement import PLACEMENTS, Ahead, Placement, Rounding, Shadow
from zokern.sweep import Passes, Sweep


class Kept:
    """The weights are perturbed where they are, and put back exactly from a float64 copy."""

    name = "kept"

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.theta: list[Tensor] = []

    def bind(self, module: nn.Module | None, passes: Passes) -> None:
        self.calls.append("bind")
        self.module, self.passes = module, passes

    def begin(self, sweep: Sweep, eps: Tensor, *, scaled: bool) -> None:
        self.calls.append("begin")
        self.sweep, self.eps = sweep, eps
        self.spec = PassSpec(RULES["scaled_axpy" if scaled else "axpy"], self.passes.direction)
        self.theta = [m.param.to(torch.float64, copy=True) for m in sweep]
        self.scratch = [torch.empty_like(m.param) for m in sweep]

    @contextlib.contextmanager
    def present(self, terms: Terms) -> Iterator[None]:
        self.calls.append("present")
        if terms:
            numbers = perturbation(self.eps, terms, torch.ones(len(self.eps), 1), self.passes.gate)
            self.passes.run(self.sweep, self.spec, numbers, out=self.scratch)
            self._load(self.scratch)
        try:
            yield
        finally:
            self._load(self.theta)

    def update(self, update: Update, ok: Tensor, rounding: Rounding, ahead: Ahead | None = None) -> None:
        self.calls.append("update")
        rule, coefs = RULES[update.rule], dict(update.coefs)
        if "A" in rule.coefs:
            coefs.setdefault("A", torch.zeros_like(next(iter(coefs.values()))))
        spec = PassSpec(rule, self.passes.direction, rounding.name, update.square_of_sum, update.keep_second)
        told = packed(rule, coefs, update.shared)
        enabled = ok.reshape(1).to(torch.int32)
        self.passes.run(self.sweep, spec, PassNumbers(seed_tensor(update.seeds), *told, rounding.seeds, enabled))

    def end(self) -> None:
        self.calls.append("end")
        self.theta = self.scratch = []

    def memory(self) -> list[Tensor]:
        return []

    def _load(self, values: list[Tensor]) -> None:
        for m, value in zip(self.sweep, values, strict=True):
            m.param.copy_(value)


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------------------------- placement


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@CASES
def test_an_object_of_yours_has_the_bits_of_shadow(case: Case, dtype: torch.dtype) -> None:
    found = []
    for placement in (Kept(), "shadow"):
        model = small(dtype)
        opt = build(case, model, placement=placement, weight_decay=0.1)
        sign = -1.0 if case.climbs else 1.0
        losses = [opt.step(lambda step=step, model=model, sign=sign: sign * model(tokens(step))) for step in range(3)]
        kept = [t for own in states(opt, model) for t in own.values()]
        found.append([*weights(model), *kept, *losses, *opt.metrics.values()])
        assert opt.counters["passes"] == 3 * (case.forwards - plain_forwards(case) + 1)
    assert same(*found)
    assert not same(found[0][: len(weights(model))], weights(small(dtype)))


def plain_forwards(case: Case) -> int:
    """Forwards at theta itself, which take no pass."""
    curved = case.method == "hizoo" or "smoothing" in case.options
    return int(curved or case.method == "fzoo" or bool(case.options.get("one_sided")))


def test_it_is_asked_in_the_order_of_a_step() -> None:
    model, placement = small(), Kept()
    opt = zokern.HiZOO(model, 1e-2, placement=placement)
    assert isinstance(placement, Placement)
    assert placement.calls == ["bind"]
    assert placement.module is model
    assert opt.placement == "kept"
    for _ in range(2):
        opt.step(lambda: model(tokens(0)))
    assert placement.calls == ["bind"] + 2 * ["begin", "present", "present", "present", "update", "end"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_it_is_told_of_the_end_of_a_step_that_breaks_off(error: type[BaseException]) -> None:
    model, placement = small(), Kept()
    opt = zokern.MeZO(model, 1e-2, placement=placement)
    script = iter([1.0])

    def closure() -> float:
        for loss in script:
            return loss
        raise error

    with pytest.raises(error):
        opt.step(closure)
    assert placement.calls == ["bind", "begin", "present", "present", "end"]
    assert same(weights(model), weights(small()))


def test_it_serves_parameters_without_a_module() -> None:
    placement = Kept()
    model = small()
    opt = zokern.MeZO(model.parameters(), 1e-2, eps=0.05, placement=placement)
    opt.step(lambda: model(tokens(0)))
    other = small()
    zokern.MeZO(other, 1e-2, eps=0.05, placement="shadow").step(lambda: other(tokens(0)))
    assert placement.module is None
    assert same(weights(model), weights(other))


def test_a_skipped_step_moves_nothing_there() -> None:
    model = small()
    opt = zokern.HiZOO(model, 1e-2, placement=Kept(), weight_decay=0.1)
    with pytest.warns(zokern.ZokernWarning, match="not finite"):
        opt.step(scripted([1.0, math.nan, 1.0]))
    assert opt.skipped_steps == 1
    assert same(weights(model), weights(small()))


@pytest.mark.parametrize("name", ["mezo", "hizoo"])
def test_a_journal_names_it_and_replays(name: str, tmp_path: Path) -> None:
    model, path = small(), tmp_path / "run.zkj"
    opt = build(METHODS[name], model, placement=Kept())
    with journal.write(opt, path):
        for step in range(3):
            opt.step(scripted(given(METHODS[name], step)))
    assert journal.Reader(path).header["placement"] == "kept"
    again = small()
    journal.replay(path, again)
    assert same(weights(again), weights(model))
    with pytest.raises(journal.JournalError, match=r"placement is 'kept' there, 'shadow' in"):  # noqa: SIM117
        with journal.resume(build(METHODS[name], small(), placement="shadow"), path):
            pass
    again = small()
    with journal.resume(build(METHODS[name], again, placement=Kept()), path) as done:
        assert done == 3
    assert same(weights(again), weights(model))


METHODS_OF_A_PLACEMENT = ["bind", "begin", "present", "update", "end", "memory"]


@pytest.mark.parametrize("missing", ["name", *METHODS_OF_A_PLACEMENT])
def test_an_object_that_lacks_something_is_refused_by_its_name(missing: str) -> None:
    body = {name: value for name, value in vars(Kept).items() if name != missing and name != "__dict__"}
    placement = type("Half", (), body)()
    with pytest.raises(TypeError, match=f"placement is a Half.*zokern.placement.Placement .it has no {missing}.$"):
        zokern.MeZO(small(), 1e-2, placement=placement)


@pytest.mark.parametrize("wanted", [None, 3, ["shadow"], nn.Linear(1, 1)], ids=["None", "3", "a list", "a module"])
def test_what_is_no_placement_is_refused_with_all_that_it_lacks(wanted: object) -> None:
    with pytest.raises(
        TypeError, match=f"placement is a {type(wanted).__name__}; .*has no .*begin, present, update, end"
    ):
        zokern.MeZO(small(), 1e-2, placement=wanted)


@pytest.mark.parametrize("wanted", [Kept, Shadow])
def test_a_class_is_refused(wanted: type) -> None:
    with pytest.raises(TypeError, match=f"placement is the class {wanted.__name__}; .* or an object"):
        zokern.MeZO(small(), 1e-2, placement=wanted)


def test_an_object_of_zokerns_own_is_taken() -> None:
    opt = zokern.MeZO(small(), 1e-2, placement=Shadow(), pipelined=True)
    assert opt.placement == "shadow"


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"placement is 'kept'.*" + ".*".join(PLACEMENTS)):
        zokern.MeZO(small(), 1e-2, placement="kept")


def test_pipelining_is_refused_by_its_name() -> None:
    placement = Kept()
    with pytest.raises(
        ValueError, match=r"pipelined=True.*placement='kept' has none; use placement='shadow' or 'stream'"
    ):
        zokern.MeZO(small(), 1e-2, placement=placement, pipelined=True)
    assert placement.calls == [], "refused before it is bound"


# ---------------------------------------------------------------------------------------------------------- distribution

OBJECTS = [(zokern.Normal(), "normal"), (zokern.Rademacher(), "rademacher")]


def of(distribution: object, cls: str, path: Path) -> tuple[Any, Any]:
    model = small()
    climbs = {"maximize": True} if cls == "ES" else {}
    opt = getattr(zokern, cls)(model, 1e-2, distribution=distribution, eps=0.05, seed=3, **climbs)
    with journal.write(opt, path, force=True):
        for step in range(2):
            opt.step(lambda step=step: model(tokens(step)))
    return model, opt


@pytest.mark.parametrize(("direction", "name"), OBJECTS, ids=["normal", "rademacher"])
@pytest.mark.parametrize("cls", ["MeZO", "HiZOO", "FZOO", "ES"])
def test_a_direction_is_what_its_name_is(direction: Any, name: str, cls: str, tmp_path: Path) -> None:
    """Bits, saved state, journal byte for byte."""
    model, opt = of(direction, cls, tmp_path / "object.zkj")
    other, named = of(name, cls, tmp_path / "name.zkj")
    assert same(weights(model), weights(other))
    assert opt.state_dict()["zokern"] == named.state_dict()["zokern"]
    assert opt.options["distribution"] == name
    assert journal.Reader(tmp_path / "object.zkj").header["distribution"] == name
    assert (tmp_path / "object.zkj").read_bytes() == (tmp_path / "name.zkj").read_bytes()
    getattr(zokern, cls)(small(), 1e-2, distribution=name, maximize=opt.maximize).load_state_dict(opt.state_dict())
    elsewhere = next(n for _, n in OBJECTS if n != name)
    assert not same(weights(model), weights(of(elsewhere, cls, tmp_path / "other.zkj")[0]))


class Sharper(directions.Normal):
    """Known by a name that is another's."""


class Posing(directions.Direction):
    name = "normal"


class Unknown(directions.Direction):
    name = "cauchy"


class Nameless(directions.Direction):
    pass


@pytest.mark.parametrize(
    "distribution",
    [
        "gauss", "Normal", "", None, 3, ["normal"], zokern.Normal, torch.distributions.Normal(0.0, 1.0),
        Sharper(), Posing(), Unknown(),
        Nameless(), directions.Direction(),
    ],
    ids=lambda d: d.__name__ if isinstance(d, type) else type(d).__name__ if isinstance(d, directions.Direction) else None,
)  # fmt: skip
def test_what_is_no_direction_is_refused_with_both_forms_of_those_there_are(distribution: object) -> None:
    said = r"is .*'normal', 'rademacher', 'lowrank:1'.* zokern\.Normal\(\), zokern\.Rademacher\(\), zokern\.LowRank"
    with pytest.raises(ValueError, match=said):
        zokern.MeZO(small(), 1e-2, distribution=distribution)
