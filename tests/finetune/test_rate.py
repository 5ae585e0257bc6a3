"""What a run says of its lr, and of having learnt nothing."""

from __future__ import annotations

import re

import pytest

import zokern
from benchmarks.choose import searches
from tests.finetune.test_measured import models_dir, options, table  # noqa: F401
from tests.models import toy
from zokern.finetune import finetune, learnt
from zokern.finetune.options import Options
from zokern.optim import rate

# ruff: noqa: F811 - fixtures of another file


def test_an_lr_far_from_the_rules_is_told(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    """Before and after; the lr that it names is told of no more."""
    options.method, options.lr, options.steps = "mezo", 1e-7, 2
    finetune(options)
    ruled, again = re.findall(
        r"lr 1e-07 is \S+ times smaller than (\S+), which the rule of thumb has for", said(capsys)
    )
    assert ruled == again
    for lr in (float(ruled), float(ruled) * 2.5, float(ruled) / 2.5):
        options.lr, options.force = lr, True
        finetune(options)
        assert "the rule of thumb" not in said(capsys)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def test_the_rule_is_that_of_the_stored_searches() -> None:
    assert rate.mezo(10**8, 4) == searches.RULES["mezo"].lr(10**8, 4, 1e-3) == pytest.approx(0.16 / 1e8**0.4)


@pytest.mark.parametrize(
    ("lr", "trained", "told"),
    [
        (0.03, 1_530_000, "lr 0.03 is 220 times 0.00013, which the rule of thumb has for 1.53 million parameters: the run "
         "may lose what the model has learnt; docs/choose.md#which-lr"),
        (1e-7, 1_530_000, "lr 1e-07 is 1,300 times smaller than 0.00013, which the rule of thumb has for 1.53 million "
         "parameters: the run may learn nothing in its steps; docs/choose.md#which-lr"),
        (0.01, 2090, "lr 0.01 is 5.3 times 0.0019, which the rule of thumb has for 2,090 parameters: the run may lose what "
         "the model has learnt; docs/choose.md#which-lr"),
    ],
)  # fmt: skip
def test_the_note_has_plain_numbers(lr: float, trained: int, told: str) -> None:
    assert rate.note(zokern.MeZO(toy(), lr), lr, trained, True) == told


@pytest.mark.parametrize(
    "made",
    [
        lambda m: zokern.MeZO(m, 1.0, update="adam"), lambda m: zokern.HiZOO(m, 1.0), lambda m: zokern.FZOO(m, 1.0),
        lambda m: zokern.LeZO(m, 1.0, num_dropped=1),
    ],
)  # fmt: skip
def test_other_methods_have_no_rule(made: object) -> None:
    optimizer = made(toy())  # type: ignore[operator]
    assert rate.note(optimizer, 1.0, 1000, True) is None
    assert rate.note(zokern.MeZO(toy(), 1.0), 1.0, 1000, True) is not None
    assert rate.note(zokern.MeZO(toy(), 1.0), 1.0, 1000, False) is None  # an adapter


def test_a_run_that_learnt_nothing_says_so(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    options.lr, options.steps = 1e-12, learnt.STEPS
    finetune(options)
    text = said(capsys)
    ruled = re.findall(r"times smaller than (\S+), which the rule of thumb has for", text)[-1]
    assert f" fallen: try --lr {ruled}, which the rule says, and more --steps" in text  # and no other lr beside it


@pytest.mark.parametrize(
    ("losses", "steps", "told"),
    [((1.0, 1.0), 20, "has not fallen"), ((1.0, 2.0), 20, "has not fallen"), ((1.0, 0.99), 20, None),
     ((1.0, 1.0), 19, "19 steps show that all of it runs"), ((1.0, 0.5), 1, "some hundred show"),
     ((-1.0, -1.1), 20, None), ((-1.0, -1.0), 20, "has not fallen"), ((1.0, float("nan")), 20, "has not fallen"),
     ((0.6937, 0.6908), 20, "has hardly fallen: try --lr three times and a third of this one, and more")],
)  # fmt: skip
def test_what_is_told_when(losses: tuple[float, float], steps: int, told: str | None) -> None:
    said = learnt.not_learnt(losses, steps)
    assert (said is None) == (told is None)
    assert (told or "") in (said or "")
