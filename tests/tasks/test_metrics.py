"""Metrics against their public definitions: torchmetrics where it has them, else cases worked out by hand."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from zokern.tasks import metrics
from zokern.tasks.metrics import accuracy, exact_match, macro_f1, matthews, named, normalised, token_f1


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("seed", range(4))
def test_metrics_of_classes_are_those_of_torchmetrics(classes: int, seed: int) -> None:
    functional = pytest.importorskip("torchmetrics.functional")
    draw = torch.Generator().manual_seed(seed)
    wanted = torch.randint(classes, (40,), generator=draw)
    got = torch.where(torch.rand(40, generator=draw) < 0.6, wanted, torch.randint(classes, (40,), generator=draw))
    given = {"task": "multiclass", "num_classes": classes}
    assert accuracy(got, wanted) == pytest.approx(float(functional.accuracy(got, wanted, average="micro", **given)))
    assert macro_f1(got, wanted) == pytest.approx(float(functional.f1_score(got, wanted, average="macro", **given)))
    assert matthews(got, wanted) == pytest.approx(float(functional.matthews_corrcoef(got, wanted, **given)), abs=1e-6)
    names = ["no", "yes", "x", "y", "z", "u", "v"]
    for metric in (accuracy, macro_f1, matthews):  # however the classes are written
        as_names = metric([names[i] for i in got], [names[i] for i in wanted])
        assert metric(got, wanted) == metric(got.numpy(), wanted.tolist()) == as_names


def test_metrics_of_texts_are_those_of_torchmetrics() -> None:
    squad = pytest.importorskip("torchmetrics.functional.text").squad
    draw = random.Random(0)
    words = ["The", "cat,", "a", "CAT", "sat", "on", "an", "mat.", "42", "--"]
    predictions = [" ".join(draw.choices(words, k=draw.randrange(0, 5))) for _ in range(200)]
    references = [[" ".join(draw.choices(words, k=draw.randrange(1, 5))) for _ in range(1 + i % 3)] for i in range(200)]
    said = squad(
        [{"prediction_text": text, "id": str(i)} for i, text in enumerate(predictions)],
        [
            {"answers": {"answer_start": [0] * len(texts), "text": texts}, "id": str(i)}
            for i, texts in enumerate(references)
        ],
    )
    assert 0 < exact_match(predictions, references) == pytest.approx(float(said["exact_match"]) / 100, abs=1e-6)
    assert token_f1(predictions, references) == pytest.approx(float(said["f1"]) / 100, abs=1e-6)


def test_cases_by_hand() -> None:
    assert accuracy([0, 1, 1], [0, 1, 0]) == 2 / 3
    # class 0: TP 1, FP 0, FN 1: 2/3; class 1: TP 1, FP 1, FN 0: 2/3; class 2 occurs in predictions alone: 0
    assert macro_f1([0, 1, 1, 2], [0, 1, 0, 0]) == pytest.approx((2 / 4 + 2 / 3 + 0) / 3)
    # TP 2, TN 1, FP 1, FN 1
    assert matthews([1, 1, 1, 0, 0], [1, 1, 0, 0, 1]) == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))
    assert matthews([1, 1], [0, 1]) == matthews([0, 1], [1, 1]) == matthews([1], [1]) == 0.0
    assert matthews([0, 1, 0, 1], [1, 0, 1, 0]) == -1.0
    assert matthews([True, False], np.array([True, False])) == 1.0
    assert normalised("  The  U.S.  has\nan A-team: a theme!") == "us has ateam theme"
    assert token_f1(["the black cat"], ["a cat"]) == pytest.approx(2 * 1 / (2 + 1))
    assert token_f1(["no", "cat cat"], [["yes", "no"], "cat"]) == pytest.approx((1 + 2 / 3) / 2)
    assert token_f1(["the", ""], ["a", "cat"]) == 0.5
    assert exact_match(["The cat.", "dog"], ["cat", ["cats", "dogs"]]) == 0.5


@pytest.mark.parametrize("name", metrics.METRICS)
def test_lengths_and_empty_input_are_errors(name: str) -> None:
    metric = named(name)
    with pytest.raises(ValueError, match="2 predictions and 1 references"):
        metric(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="no predictions"):
        metric([], [])
    for wrong in ("abc", 3, torch.tensor(1), None):
        with pytest.raises(TypeError, match="predictions"):
            metric(wrong, ["a"])


@pytest.mark.parametrize(
    ("metric", "predictions", "references", "message"),
    [
        (matthews, ["a"], [["a", "b"]], r"matthews compares classes.*references\[0\] is a list.*exact_match"),
        (macro_f1, [0.5], [1], r"predictions\[0\] is a score"),
        (accuracy, ["1", "0"], [1, 0], "some classes are names and some numbers"),
        (accuracy, [None], [1], r"predictions\[0\] is a NoneType"),
        (token_f1, [1], [1], r"token_f1 compares texts; predictions\[0\] is 1\. Classes are compared by accuracy"),
        (exact_match, ["a", "b"], ["a", {"text": 1}], r"references\[1\] is \{'text': 1\}"),
        (exact_match, ["a"], [["b", 2]], r"references\[0\] is \['b', 2\]"),
    ],
)
def test_a_metric_that_does_not_fit(
    metric: metrics.Function, predictions: list, references: list, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        metric(predictions, references)


def test_no_reference_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"references\[1\] is an empty list"):
        token_f1(["a", "b"], ["a", []])


def test_names_and_a_users_own() -> None:
    assert [named(name).function for name in metrics.METRICS] == [accuracy, macro_f1, matthews, exact_match, token_f1]
    own = named("math:dist")
    assert own([0.0, 0.0], [3.0, 4.0]) == 5.0
    assert own.of == metrics.ANY
    for name, message in [
        ("f1", "there is no metric 'f1'; there are accuracy, macro_f1, matthews, exact_match, token_f1, and your own"),
        ("no_such_module:f", "cannot be imported .*no_such_module"),
        ("math:nothing", "cannot be imported .*nothing"),
        (":f", "cannot be imported"),
        ("math:pi", "is a float, no function"),
    ]:
        with pytest.raises(ValueError, match=message):
            named(name)
    with pytest.raises(ValueError, match=r"the metric 'builtins:max' gave 'b'; it has to return a finite number"):
        named("builtins:max")("a", "b")
    with pytest.raises(ValueError, match="gave inf"):
        named("builtins:max")(1.0, math.inf)


def test_no_framework_is_needed() -> None:
    code = "import sys, zokern.tasks.metrics; sys.exit(any(m in sys.modules for m in ('transformers', 'datasets')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
