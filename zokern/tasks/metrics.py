"""How good predictions are: each metric is a function of predictions and references, and has a name.

Classes may be integers, booleans or names (str), in lists, arrays or tensors of one dimension. Texts are str; a reference
is one text, or a list of texts of which any is right. Every metric is a float, higher is better, and needs one prediction
at least: a mean over none is no number.
"""

from __future__ import annotations

import importlib
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

Function = Callable[[Any, Any], float]
CLASSES, TEXTS, ANY = "classes", "texts", "classes or texts"
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Metric(NamedTuple):
    """A metric. of: what it compares, CLASSES or TEXTS; ANY of a user's own. It can be called."""

    name: str
    function: Function
    of: str

    def __call__(self, predictions: Any, references: Any) -> float:
        """The metric as a float. Raises ValueError where a user's function gives anything else."""
        value = self.function(predictions, references)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"the metric {self.name!r} gave {value!r}; it has to return a finite number")
        return number


def accuracy(predictions: Any, references: Any) -> float:
    """Share of predictions that are the reference, in [0, 1].

    predictions, references: n classes each. Raises ValueError where the lengths differ or are 0, TypeError for what is no
    class, a score for example.
    """
    got, wanted = _classes("accuracy", predictions, references)
    return float(np.mean(got == wanted))


def macro_f1(predictions: Any, references: Any) -> float:
    """Mean over the classes of F1 = 2 TP / (2 TP + FP + FN), in [0, 1]: every class counts the same.

    The classes are those that occur in predictions or references. Arguments and errors: as of `accuracy`.
    """
    table = _confusion(*_classes("macro_f1", predictions, references))
    right = np.diag(table)
    return float(np.mean(2 * right / (table.sum(0) + table.sum(1))))


def matthews(predictions: Any, references: Any) -> float:
    """Correlation of predictions and references, in [-1, 1]; 0 is chance.

    Gorodkin's R_K, which for two classes is Matthews' coefficient (TP TN - FP FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN)). 0
    where all predictions or all references are one class. Arguments and errors: as of `accuracy`.

    Source: Gorodkin, "Comparing two K-category assignments by a K-category correlation coefficient", 2004.
    """
    table = _confusion(*_classes("matthews", predictions, references)).astype(
        object
    )  # Python's integers: never too large
    predicted, there, total = table.sum(0), table.sum(1), int(table.sum())
    both = int(np.trace(table)) * total - int(predicted @ there)
    spread = (total**2 - int(predicted @ predicted)) * (total**2 - int(there @ there))
    return both / math.sqrt(spread) if spread else 0.0


def exact_match(predictions: Any, references: Any) -> float:
    """Share of texts that are a reference after `normalised`, in [0, 1].

    predictions: n str. references: n of str or of lists of str. Raises ValueError where the lengths differ or are 0,
    or a list is empty; TypeError for what is no text.

    Source: the evaluation script of SQuAD (Rajpurkar et al. 2016).
    """
    pairs = _texts("exact_match", predictions, references)
    return sum(any(normalised(got) == normalised(one) for one in wanted) for got, wanted in pairs) / len(pairs)


def token_f1(predictions: Any, references: Any) -> float:
    """Mean over the texts of F1 = 2 s / (p + r), in [0, 1]: s words are shared by a prediction of p and a reference of r.

    Words are those of `normalised`, each as often as it occurs. Of several references the best counts. Two texts without a
    word are alike (1); one of them is not (0). Arguments and errors: as of `exact_match`.

    Source: the evaluation script of SQuAD (Rajpurkar et al. 2016).
    """
    pairs = _texts("token_f1", predictions, references)
    return sum(max(_shared(got, one) for one in wanted) for got, wanted in pairs) / len(pairs)


def normalised(text: str) -> str:
    """A text as SQuAD compares it: lower case, without ASCII punctuation and a, an, the, one space between words."""
    plain = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def _shared(got: str, wanted: str) -> float:
    a, b = normalised(got).split(), normalised(wanted).split()
    if not a or not b:
        return float(a == b)
    return 2 * sum((Counter(a) & Counter(b)).values()) / (len(a) + len(b))


METRICS = {
    name: Metric(name, function, of)
    for name, function, of in (
        ("accuracy", accuracy, CLASSES),
        ("macro_f1", macro_f1, CLASSES),
        ("matthews", matthews, CLASSES),
        ("exact_match", exact_match, TEXTS),
        ("token_f1", token_f1, TEXTS),
    )
}


def named(name: str) -> Metric:
    """The metric of METRICS, or a function of your own as "module:function", which takes predictions and references.

    Raises ValueError that names what is not there.
    """
    if name in METRICS:
        return METRICS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(
            f"there is no metric {name!r}; there are {', '.join(METRICS)}, and your own as module:function"
        )
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"the metric {name!r} cannot be imported ({error}); give module:function, of a module that is installed "
            "or on PYTHONPATH"
        ) from error
    if not callable(function):
        raise ValueError(
            f"the metric {name!r} is a {type(function).__name__}, no function of predictions and references"
        )
    return Metric(name, function, ANY)


# ---------------------------------------------------------------------------------------------------------------- input


def _lists(predictions: Any, references: Any) -> tuple[list[Any], list[Any]]:
    found = []
    for name, values in (("predictions", predictions), ("references", references)):
        if isinstance(values, str) or not (hasattr(values, "tolist") or isinstance(values, Sequence)):
            raise TypeError(
                f"{name} must be a list, an array or a tensor of one dimension, got {type(values).__name__}"
            )
        plain = values.tolist() if hasattr(values, "tolist") else list(values)
        if not isinstance(plain, list):
            raise TypeError(f"{name} is one value, {plain!r}; a list is needed")
        found.append(plain)
    got, wanted = found
    if len(got) != len(wanted):
        raise ValueError(f"there are {len(got)} predictions and {len(wanted)} references; each needs the other")
    if not got:
        raise ValueError("there are no predictions; a metric needs one at least")
    return got, wanted


def _classes(metric: str, predictions: Any, references: Any) -> tuple[Any, Any]:
    """Both as arrays of class indices."""
    got, wanted = _lists(predictions, references)
    index: dict[Hashable, int] = {}
    for name, values in (("predictions", got), ("references", wanted)):
        for i, value in enumerate(values):
            if isinstance(value, np.generic):
                value = value.item()
            if not isinstance(value, (int, str)):
                kind = {float: "a score", list: "a list"}.get(type(value), f"a {type(value).__name__}")
                raise TypeError(
                    f"{metric} compares classes, integers or names; {name}[{i}] is {kind}, {str(value)[:60]!r}. Texts are "
                    "compared by exact_match and token_f1"
                )
            index.setdefault(value, len(index))
    if len({isinstance(key, str) for key in index}) > 1:
        raise TypeError(f"{metric}: some classes are names and some numbers: {list(index)[:6]}; give all as the same")
    return np.array([index[value] for value in got]), np.array([index[value] for value in wanted])


def _confusion(got: Any, wanted: Any) -> Any:
    """table[r, p]: how often class r was predicted as p."""
    count = int(max(got.max(), wanted.max())) + 1
    return np.bincount(wanted * count + got, minlength=count * count).reshape(count, count)


def _texts(metric: str, predictions: Any, references: Any) -> list[tuple[str, list[str]]]:
    """(prediction, its references) of each text."""
    got, wanted = _lists(predictions, references)
    pairs = []
    for i, (one, right) in enumerate(zip(got, wanted, strict=True)):
        several = [right] if isinstance(right, str) else right
        if (
            not isinstance(one, str)
            or not isinstance(several, Sequence)
            or not all(isinstance(r, str) for r in several)
        ):
            what = f"predictions[{i}] is {one!r}" if not isinstance(one, str) else f"references[{i}] is {right!r}"
            raise TypeError(
                f"{metric} compares texts; {what[:90]}. Classes are compared by accuracy, macro_f1 and matthews"
            )
        if not several:
            raise ValueError(f"references[{i}] is an empty list; a text is needed to compare with")
        pairs.append((one, list(several)))
    return pairs
