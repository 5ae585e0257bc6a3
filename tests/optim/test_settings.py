"""A setting is declared once; constructor, checks, docstring, options of the command and tables of docs agree with that."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import zokern
from zokern import kinds
from zokern.cli import app, tuning
from zokern.distributed.kinds import GroupKind, ParallelKind
from zokern.finetune import FinetuneError, Options, methods, takers
from zokern.kinds import Choice, DType, Flag, Integer, Kind, Number
from zokern.optim import ENTRIES, METHODS, ZerothOrderOptimizer
from zokern.optim.common import Common
from zokern.optim.helene import Floor
from zokern.settings import REQUIRED, Setting, Settings, setting

ROOT = Path(__file__).parents[2]
SEPARATE = [cls for cls in METHODS.values() if "__init__" not in vars(cls)]  # LeZO has MeZO's settings
pytestmark = pytest.mark.filterwarnings("ignore:ES maximizes")
EACH = pytest.mark.parametrize("cls", SEPARATE)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def wrong(kind: Kind) -> Iterator[object]:
    """Values that a kind refuses: beyond each end, on an open one, and of another type."""
    if isinstance(kind, Integer):
        yield from (kind.low - 1, 1.5, "1", True)
        if kind.high is not None:
            yield kind.high + 1
    elif isinstance(kind, Number):
        yield from (float("nan"), float("inf"), "1", True)
        yield kind.low if kind.open_low else kind.low - 1.0
        if kind.high < float("inf"):
            yield kind.high if kind.open_high else 2.0 * kind.high
    elif isinstance(kind, Flag):
        yield from (1, "yes")
    elif isinstance(kind, Choice):
        yield from ("nothing of the kind", 3)
    elif isinstance(kind, DType):
        yield from (torch.int8, torch.float64)
    elif isinstance(kind, kinds.Instance):
        yield from (3, kind.cls)
    elif isinstance(kind, kinds.Betas):
        yield from (0.9, (0.9,), (0.9, 1.0), (-0.1, 0.9))
    elif isinstance(kind, Floor):
        yield from (-1.0, [1.0, -1.0], zokern.ByLayer(-1.0), "1")
    elif isinstance(kind, GroupKind):
        yield from ("nothing of the kind", 3, [0, 1])
    elif isinstance(kind, ParallelKind):
        yield from ("nothing of the kind", 3, (), ("data", "model"))


def ends(kind: Kind) -> Iterator[Any]:
    """Values that a kind takes: its ends, and all of its names."""
    if isinstance(kind, Integer):
        yield kind.low
        if kind.high is not None:
            yield kind.high
    elif isinstance(kind, Number):
        yield from () if kind.open_low else (kind.low,)
        yield from (kind.high,) if kind.high < float("inf") and not kind.open_high else ()
    elif isinstance(kind, Choice):
        yield from kind.names
    elif isinstance(kind, DType):
        yield from kind.dtypes


KINDS = {(cls, name): one for cls in SEPARATE for name, one in cls.settings.items() if type(one.kind) is not Kind}
EACH_SETTING = pytest.mark.parametrize(
    ("cls", "name"), list(KINDS), ids=[f"{cls.__name__}-{name}" for cls, name in KINDS]
)


@EACH_SETTING
def test_wrong_values_are_refused_by_name_and_nothing_is_touched(cls: type[ZerothOrderOptimizer], name: str) -> None:
    values = list(wrong(KINDS[cls, name].kind))
    assert values
    for value in values:
        net = model()
        hooks, before = len(net._forward_pre_hooks), [p.clone() for p in net.parameters()]
        with pytest.raises((TypeError, ValueError), match=rf"^{name}\b"):
            cls(net, **{"lr": 1e-3, name: value})
        assert len(net._forward_pre_hooks) == hooks
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))


@EACH_SETTING
def test_what_is_allowed_is_taken_and_kept(cls: type[ZerothOrderOptimizer], name: str) -> None:
    one = KINDS[cls, name]
    for value in ends(one.kind):
        taken = one.check(value)
        if one.kept:
            assert taken == value
    if one.default is not REQUIRED and one.kept:
        assert getattr(cls(model(), 1e-3), one.attribute) == one.check(one.default) or name in (
            "curvature_dtype",
            "maximize",
        )


@EACH
def test_signature_and_docstring_have_every_setting(cls: type[ZerothOrderOptimizer]) -> None:
    parameters = inspect.signature(cls).parameters
    assert list(parameters)[:2] == ["params", "lr"]
    assert set(parameters) == set(cls.settings)
    own = [name for name, one in cls.settings.items() if Common.settings.get(name) is not one]
    assert set(list(parameters)[2 : 2 + len(own)]) == set(own)  # before the common ones
    for name, one in cls.settings.items():
        assert parameters[name].default == one.default
        assert cls.__doc__ is not None
        assert f"\n        {name}: {one.help.split()[0]}" in cls.__doc__
    assert all(len(line) <= 124 for line in str(cls.__doc__).splitlines())
    opt = cls(model(), 1e-3)
    stored = {one.name for one in cls.settings.values() if one.kept and one.name not in Common.settings}
    assert set(opt.options) == stored | {"distribution", "rounding", "layers", "maximize", "fold_every"}


def test_unknown_arguments_are_named_with_what_may_be_meant() -> None:
    with pytest.raises(TypeError, match="MeZO has no setting 'num_sample'; is 'num_samples' meant"):
        zokern.MeZO(model(), 1e-3, num_sample=2)
    with pytest.raises(TypeError, match=r"FZOO has no setting 'zzz'; it has params, lr, eps, .*candidates"):
        zokern.FZOO(model(), 1e-3, zzz=2)
    with pytest.raises(TypeError, match="lr"):
        zokern.MeZO(model())


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay"])
def test_rates_may_be_tensors_and_stay_them(name: str) -> None:
    value = torch.tensor(0.25)
    opt = zokern.MeZO(model(), **{"lr": 1e-3, name: value})
    assert opt.param_groups[0][name] is value
    with pytest.raises(ValueError, match=name):
        zokern.MeZO(model(), **{"lr": 1e-3, name: torch.tensor(-0.25)})


# --------------------------------------------------------------------------------------------------- one of one's own


class Scaled(zokern.MeZO):
    """MeZO whose estimate is scaled."""

    times_it: float = setting(default=1.0, kind=Number(0.0, 4.0), help="Factor of it.", changed="again", alias="by")

    def again(self) -> None:
        self.times = getattr(self, "times", 0) + 1


def test_a_setting_of_ones_own() -> None:
    opt = Scaled(model(), 1e-3, by=2.0)
    assert (opt.times_it, opt.options["by"], Scaled(model(), 1e-3).times_it) == (2.0, 2.0, 1.0)
    assert "by: Factor of it. At least 0, at most 4. Default: 1." in str(Scaled.__doc__)
    assert "by" not in zokern.MeZO.settings
    assert not hasattr(opt, "times")
    opt.times_it = 3.0
    assert (opt.times_it, opt.times) == (3.0, 1)
    with pytest.raises(ValueError, match=r"by is 5\.0; it must be in \[0, 4\]"):
        opt.times_it = 5.0
    assert (opt.times_it, opt.times) == (3.0, 1)
    with pytest.raises(ValueError, match=r"by is 1\.0 in state_dict and 2\.0 here|by is 2\.0 in state_dict"):
        Scaled(model(), 1e-3).load_state_dict(opt.state_dict())


def test_a_setting_hides_nothing_that_is_there() -> None:
    with pytest.raises(TypeError, match=r"Hiding\.step: a base has an attribute of this name"):

        class Hiding(zokern.MeZO):
            step: int = setting(default=1, kind=Integer(1), help="No.")

    class Anew(zokern.HELENE):  # another default is none of that
        floor: float = setting(default=2.0, kind=Floor(), help="Higher.", changed="rows_changed")
        plain = setting(default=1, kind=Integer(1), help="Without an annotation.")

    opt = Anew(model(), 1e-3)
    assert (opt.floor, opt.plain, str(inspect.signature(Anew).parameters["plain"])) == (2.0, 1, "plain: 'Any' = 1")


def test_a_journal_of_before_a_setting_was_there_goes_on(tmp_path: Path) -> None:
    """With its default; with another value it is refused."""
    older = type("Grown", (zokern.MeZO,), {})
    given = setting(default=1.0, kind=Number(0.0, 4.0), help="Factor.")
    newer = type("Grown", (zokern.MeZO,), {"factor": given, "__annotations__": {"factor": "float"}})

    def step(opt: ZerothOrderOptimizer, net: nn.Module) -> None:
        opt.step(lambda: net(torch.ones(2, 3)).square().mean())

    net, path = model(), tmp_path / "run.zkj"
    with zokern.journal.write(opt := older(net, 1e-2), path):
        step(opt, net)
    again = model()
    other = newer(again, 1e-2, factor=2.0)
    with (
        pytest.raises(zokern.journal.JournalError, match=r"options\['factor'\] is 1\.0 there, 2\.0 in this opt"),
        zokern.journal.resume(other, path),
    ):
        pass
    with zokern.journal.resume(opt := newer(again, 1e-2), path) as done:
        assert done == 1
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), net.parameters(), strict=True))
        step(opt, again)
    assert opt.counters["steps"] == 2


def test_a_default_in_words() -> None:
    one = Setting((0.9, 0.5), kinds.Betas(), "Two.", attribute="x")
    assert one.describe() == "Two. Two numbers, each at least 0, below 1. Default: (0.9, 0.5)."
    assert Setting(None, Integer(2, 9), "N.").describe() == "N. At least 2, at most 9."
    assert Setting(REQUIRED, Integer(2, 1 << 40), "N.").describe() == "N. At least 2."


# ------------------------------------------------------------------------------------------------------- the command


def test_the_options_of_methods_are_their_settings() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(Options)}
    for name in takers.TAKERS:
        assert name in fields
        same = {repr(taker.default) for taker in takers.TAKERS[name]}
        if name in takers.COMMON and name not in ("lr", "distribution", *takers.CHOSEN):
            assert same == {repr(fields[name])}
        else:
            assert fields[name] is None
    for method, cls in METHODS.items():
        taken = {name for name in takers.TAKERS if takers.kind(name, method) is not None}
        assert taken == {name for one in cls.settings.values() for name, _ in takers.options(one)}


@pytest.mark.parametrize("method", METHODS)
def test_options_are_checked_as_the_class_checks(method: str) -> None:
    for one in METHODS[method].settings.values():
        for name, _ in takers.options(one):
            kind = takers.kind(name, method)
            assert kind is not None
            bad = next(
                v for v in wrong(kind) if not isinstance(v, (bool, torch.dtype)) or isinstance(kind, Flag | DType)
            )
            with pytest.raises(FinetuneError, match=f"^--{name.replace('_', '-')} "):
                Options(method=method, **{name: bad}).check()
    Options(method=method, output="/tmp/not there").check()


@pytest.mark.parametrize("method", METHODS)
def test_defaults_of_the_command_are_those_of_the_class(method: str) -> None:
    net = nn.Sequential(nn.ModuleList([nn.Linear(2, 2) for _ in range(4)]))
    given = methods.settings(Options(method=method))
    plain = METHODS[method].settings
    assert given.pop("lr") == ENTRIES[method].lr
    assert all(value == plain[name].default for name, value in given.items())
    assert methods.build(net, Options(method=method)).param_groups[0]["lr"] == ENTRIES[method].lr


def test_one_of_two_betas_leaves_the_other() -> None:
    assert methods.settings(Options(method="helene", beta2=0.5))["betas"] == (0.9, 0.5)
    assert methods.settings(Options(method="mezo", beta1=0.5))["betas"] == (0.5, 0.999)
    assert methods.settings(Options(method="mezo", beta1=0.0))["betas"] == (0.0, 0.999)
    assert "betas" not in methods.settings(Options(method="mezo"))


def test_updates_have_learning_rates_of_their_own() -> None:
    for update, lr in ENTRIES["mezo"].lr_of.items():
        assert methods.settings(Options(update=update))["lr"] == lr
    assert set(ENTRIES["mezo"].lr_of) == set(zokern.MeZO.settings["update"].kind.names) - {"sgd"}


def test_help_begins_with_ten_options_and_groups_the_rest() -> None:
    text = CliRunner().invoke(app, ["finetune", "--help"], env={"COLUMNS": "160"}).output
    first, *panels = re.split(r"╭─ ", text)[1:]
    assert first.startswith("Options")
    assert re.findall(r"│ --([a-z-]+)", first) == [*(name.replace("_", "-") for name in tuning.FIRST), "help"]
    assert [panel.split(" ─")[0] for panel in panels] == list(tuning.PANELS[1:])
    told = {name for panel in [first, *panels] for name in re.findall(r"│ --([a-z0-9-]+)", panel)}
    assert told == {name.replace("_", "-") for name in tuning.described()} | {"help"}


def test_help_says_whose_a_setting_is_and_its_defaults() -> None:
    told = {name: one.help for name, one in tuning.described().items()}
    assert told["beta2"].startswith(
        "mezo, lezo: Decay of the second moment, at least 0, below 1. Default: 0.999. helene:"
    )
    assert told["distribution"].endswith("Default: normal; fzoo rademacher.")
    assert "mezo-gv, mezo-greedy: Directions tried" in told["candidates"]
    assert "Default: 8." in told["candidates"]
    assert "Default" not in told["weight_decay"]  # typer has it
    assert "Default: 0.001. With an adapter: lora 0.01" in told["eps"]
    assert all(f"{name} {entry.lr:g}" in told["lr"] for name, entry in ENTRIES.items())


# --------------------------------------------------------------------------------------------------- registry and docs


@pytest.mark.parametrize("method", [name for name, entry in ENTRIES.items() if entry.many])
def test_the_registry_says_what_a_step_costs(method: str) -> None:
    """Formulas like 2n + 1, with n the setting that `many` is of."""
    entry = ENTRIES[method]
    opt, net = None, model()
    opt = entry.cls(net, 1e-3)
    opt.step(lambda: net(torch.ones(2, 3)).square().mean())
    letter = entry.many[0]
    n = next(value for name in ("num_samples", "candidates", "num_directions") if (value := getattr(opt, name, None)))

    def value(formula: str) -> int:
        text = re.match(r"[0-9nMN +]+", formula)
        assert text is not None
        return int(eval(re.sub(rf"(\d*){letter}", lambda m: f"{m[1] or 1}*{n}", text[0])))

    assert opt.counters["forwards"] == opt.forwards() == value(entry.forwards)
    assert opt.counters["passes"] == value(entry.passes)
    each = sum(dtype.itemsize for dtype, _ in opt.state_spec.values())
    assert entry.state.startswith(f"{each} bytes")


def test_every_method_has_a_page_and_is_public() -> None:
    for name, entry in ENTRIES.items():
        assert (ROOT / "docs" / "methods" / f"{name}.md").is_file()
        assert getattr(zokern, entry.cls.__name__) is entry.cls


@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")  # that another test has imported it
def test_tables_in_pages_come_from_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python -m` runs it, in this process: it exits where a page differs."""
    monkeypatch.setattr(sys, "argv", ["from_code.py", "--check"])
    runpy.run_module("docs.from_code", run_name="__main__")


# ------------------------------------------------------------------------------------------------------- inheritance


def test_settings_of_all_bases_come_together() -> None:
    class Mixed(Settings):
        x: int = setting(default=7, kind=Integer(0), help="Of a part.")

    class A(zokern.MeZO):
        a: int = setting(default=1, kind=Integer(0), help="Of A.")

    class B(zokern.MeZO):
        b: int = setting(default=2, kind=Integer(0), help="Of B.")

    class Both(A, B):
        pass

    class First(Mixed, zokern.MeZO):
        pass

    class Last(zokern.FZOO, Mixed):
        pass

    both = Both(model(), 1e-3, b=5)
    assert (both.a, both.b, First(model(), 1e-3).x, Last(model(), 1e-3, x=9).x) == (1, 5, 7, 9)
    assert str(Last(model(), 1e-3).options["distribution"]) == "rademacher"
    assert set(Both.settings) == {*zokern.MeZO.settings, "a", "b"}


def test_a_constructor_of_ones_own_is_what_the_signature_says() -> None:
    class Own(zokern.MeZO):
        """Mine."""

        def __init__(self, model: nn.Module, scale: float = 2.0, **options: Any) -> None:
            super().__init__(model, 1e-3 * scale, **options)

    class Below(Own):
        """Below mine."""

    class Lezo(zokern.LeZO):
        """Mine too."""

    assert (
        list(inspect.signature(Own).parameters)
        == list(inspect.signature(Below).parameters)
        == ["model", "scale", "options"]
    )
    assert list(inspect.signature(Lezo).parameters) == ["model", "lr", "num_dropped", "options"]
    assert (Below.__doc__, Lezo.__doc__) == ("Below mine.", "Mine too.")
    assert Below(model(), 3.0, num_samples=2).num_samples == 2


def test_what_must_be_given_is_asked_for() -> None:
    class Asking(zokern.MeZO):
        q: int = setting(kind=Integer(0), help="How many.")

    with pytest.raises(TypeError, match=r"Asking is missing q: How many\."):
        Asking(model(), 1e-3)
    with pytest.raises(TypeError, match="Asking is missing lr, q"):
        Asking(model())
    opt = Asking(model(), 1e-3, q=2)
    opt.load_state_dict(opt.state_dict())
    with pytest.raises(TypeError, match="MeZO takes params, lr by place and the rest by name; got 3 by place"):
        zokern.MeZO(model(), 1e-3, 1e-3)
    with pytest.raises(TypeError, match="MeZO got lr by place and by name"):
        zokern.MeZO(model(), 1e-3, lr=1e-3)
    assert zokern.MeZO(params=model(), lr=1e-3).num_samples == 1


@pytest.mark.parametrize("name", ["metrics", "options", "state", "param_groups", "numbers", "active", "rounds"])
def test_names_that_an_optimizer_has_are_no_settings(name: str) -> None:
    given = setting(default=1, kind=Integer(0), help="No.")
    with pytest.raises(TypeError, match=rf"Mine\.{name}: a base has an attribute of this name"):
        type("Mine", (zokern.MeZO,), {name: given, "__annotations__": {name: "int"}})


def test_a_floor_that_is_changed_is_checked_and_followed() -> None:
    opt = zokern.HELENE(model(), 1e-3, floor=[1.0, 2.0])
    opt.floor = [5.0, 6.0]
    assert [opt.row_key(p) for p in opt.weights().values()] == [5.0, 6.0]
    for wrong_one in ([5.0], [1.0, -1.0], -1.0):
        with pytest.raises(ValueError, match="floor"):
            opt.floor = wrong_one
        assert opt.floor == [5.0, 6.0]
    opt.floor = 3.0
    assert {opt.row_key(p) for p in opt.weights().values()} == {3.0}


@pytest.mark.parametrize("cls", [zokern.MeZOGV, zokern.MeZOGreedy])
def test_no_curvature_has_no_dtype(cls: type[ZerothOrderOptimizer]) -> None:
    plain = cls(model(), 1e-3, curvature_dtype=None)
    assert (plain.options["curvature_dtype"], plain.state_spec) == (None, {})
    curved = cls(model(), 1e-3, smoothing=0.5, curvature_dtype=None)
    assert (curved.options["curvature_dtype"], curved.state_spec) == ("torch.float32", {"h": (torch.float32, 1.0)})
    saved = plain.state_dict()
    for name in ("smoothing", "curvature_dtype"):  # of a version that had none of this
        del saved["zokern"]["options"][name]
    cls(model(), 1e-3).load_state_dict(saved)


@pytest.mark.parametrize("own", [{"format": 99}, {}, {"format": 99, "contract": "zk2"}])
def test_a_state_of_another_format_is_refused_for_that(own: dict[str, Any]) -> None:
    opt = zokern.MeZO(model(), 1e-3)
    with pytest.raises(ValueError, match=r"state_dict has format (99|None) and noise contract"):
        opt.load_state_dict({**opt.state_dict(), "zokern": own})


@pytest.mark.parametrize(
    "change", [{"method": "nope"}, {"steps": "a"}, {"seed": -1}, {"placement": 5}, {"update": "x"}]
)
def test_a_run_with_options_that_cannot_be_is_not_resumed(change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "options.json").write_text(json.dumps({**Options().as_json(), **change}))
    with pytest.raises(FinetuneError, match=rf"--resume: .*--{next(iter(change))}"):
        Options.load(tmp_path)
