"""Labels as classes: which there are, in which order, and what is odd about them. A published head's own order wins."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from zokern.finetune.options import FinetuneError

MANY = 10  # labels, which are too many to name each with its rows or its number


class Classes(NamedTuple):
    """The labels in the order of their index. said: where the order is from. renamed: new names of the data's labels. lost:
    the classes of a trained head that does not fit, for which a new one is made."""

    labels: list[str]
    said: str
    renamed: dict[str, str]
    lost: list[str] | None = None


def few(names: Iterable[str], count: int = 5) -> str:
    """The first names, and how many there are: 'a', 'b' and 98 more."""
    every = [repr(name if len(name) <= 40 else name[:40] + "...") for name in names]
    return ", ".join(every[:count]) + (f" and {len(every) - count} more" if len(every) > count else "")


def natural(label: str) -> tuple[int, float, str]:
    """Sorts numbers as numbers, before names."""
    return (0, float(label), label) if re.fullmatch(r"-?\d+(\.\d+)?", label, re.ASCII) else (1, 0.0, label)


def whole(labels: Iterable[str]) -> dict[str, str]:
    """{"1.0": "1"} where all labels are whole numbers, of which some are written as floats."""
    found = set(labels)
    if not all(re.fullmatch(r"-?\d+(\.0*)?", label, re.ASCII) for label in found):
        return {}
    return {label: label.partition(".")[0] for label in found if "." in label}


def check_classes(labels: list[str], source: str) -> None:
    """Refuses what is no classification: scores, and answers that hardly ever come twice. labels: one for each row."""
    counts = Counter(labels)
    numbers = all(re.fullmatch(r"-?\d+(\.\d+)?([eE][-+]?\d+)?", label, re.ASCII) for label in counts)
    fractions = numbers and len(counts) > 10 and any(not float(label).is_integer() for label in counts)
    alone = sum(count == 1 for count in counts.values())
    if fractions or (len(counts) > 10 and 2 * alone > len(labels)):
        what = (
            "scores, and regression is not supported" if numbers else "answers, which --answer COLUMN learns to write"
        )
        raise FinetuneError(
            f"{source}: {len(counts)} labels in {len(labels)} rows, {few(sorted(counts, key=natural))}: these look like "
            f"{what}; choose another --label-column, or make a few classes of them"
        )


def order(
    found: set[str], own: list[str] | None, label2id: dict[str, int] | None, *, head: bool, asked: str | None = None
) -> Classes:
    """The labels as classes.

    found: those of the training texts. own: of the data set, where it numbers them, in its order. label2id: of the model's
    configuration. head: whether the model has a trained head, whose order it is. asked: --label-order.
    """
    ids = {} if label2id is None else {int(i): str(name) for name, i in label2id.items()}
    names = [ids[i] for i in range(len(ids))] if set(ids) == set(range(len(ids))) else []
    if asked is not None:
        return _asked(found, [label.strip() for label in asked.split(",")], names, head)
    by_key = {_key(label): label for label in found}
    keys = [_key(name) for name in names]
    if len(by_key) == len(found) and len(set(keys)) == len(keys):
        if set(by_key) == set(keys):
            return Classes([by_key[key] for key in keys], "the model's own", {})
        if head and by_key and set(by_key) < set(keys):
            labels = [by_key.get(key, name) for key, name in zip(keys, names, strict=True)]
            unseen = few(label for label in labels if label not in found)
            return Classes(labels, f"the model's own; no training text has {unseen}", {})
    present = [label for label in own or () if label in found]
    ordered = present if len(present) == len(found) else sorted(found, key=natural)
    whose = "the data set's own" if ordered is present else "sorted"
    return _of_head(ordered, whose, own, names, found) if head and names else Classes(ordered, whose, {})


def _of_head(ordered: list[str], whose: str, own: list[str] | None, names: list[str], found: set[str]) -> Classes:
    """For a trained head that does not name these labels."""
    count, nameless = len(names), all(re.fullmatch(r"LABEL_\d+", name) for name in names)
    if found == {str(i) for i in range(count)}:
        classes = [str(i) for i in range(count)]
        if nameless:
            return Classes(classes, "the numbers of the head's classes", {})
        return Classes(
            names, "the numbers of the head's classes, which it names", dict(zip(classes, names, strict=True))
        )
    if own is not None and set(own) >= found and len(own) == count:
        ordered, whose = own, "the data set's own"
    if len(ordered) != count:
        return Classes(ordered, whose, {}, names)
    if nameless and ordered is own:
        return Classes(ordered, f"{whose}; the head does not name its classes", {})
    heads = "the head does not name its classes"
    if not nameless:
        heads = f"the head names its classes {few(names)}, which are not the data's"
    return Classes(
        ordered,
        f"{whose}: {_numbered(ordered)}. WARNING: {heads}; if the accuracy before is poor, the order is another: give "
        "--label-order",
        {},
    )


def _asked(found: set[str], labels: list[str], names: list[str], head: bool) -> Classes:
    missing = sorted(found - set(labels), key=natural)
    if missing or len(set(labels)) < len(labels):
        wrong = f"it lacks {few(missing)}" if missing else "it has one twice"
        raise FinetuneError(f"--label-order must have each label once; {wrong}, and is {few(labels)}")
    lost = names if head and names and len(names) != len(labels) else None
    return Classes(labels, "as --label-order says", {}, lost)


def _numbered(labels: list[str]) -> str:
    """0 = five, 1 = one."""
    shown = [f"{i} = {label}" for i, label in enumerate(labels[:MANY])]
    return ", ".join(shown) + (f" and {len(labels) - MANY} more" if len(labels) > MANY else "")


def lost_head(classes: Classes, rows: Mapping[str, int]) -> str:
    """The warning that a trained head does not fit. rows: how many each label has."""
    assert classes.lost is not None
    labels = classes.labels
    each = ": " + _with_rows(labels, rows) if len(labels) <= MANY else ""
    return (
        f"WARNING: the trained head is lost, and a new one is drawn at random. The head has {len(classes.lost)} classes, "
        f"{few(classes.lost)}; the data has {len(labels)} labels{each}"
    )


def doubtful(rows: Mapping[str, int]) -> list[str]:
    """Warnings of labels that may be mistyped: those that only case or blanks tell apart, and those of one row alone."""
    alike: dict[str, list[str]] = {}
    for label in sorted(rows, key=natural):
        alike.setdefault(" ".join(label.casefold().split()), []).append(label)
    groups = [group for group in alike.values() if len(group) > 1]
    found = [
        f"WARNING: labels that differ only by case or blanks: {_with_rows(group, rows)}" for group in groups[:MANY]
    ]
    alone = [group[0] for group in alike.values() if len(group) == 1 and rows[group[0]] == 1]
    if alone:
        found.append(f"WARNING: {'a label' if len(alone) == 1 else 'labels'} of one row alone: {few(alone)}")
    return found


def _with_rows(labels: Iterable[str], rows: Mapping[str, int]) -> str:
    counts = ((label, rows.get(label, 0)) for label in labels)
    return ", ".join(f"{label!r} ({count} row{'s' * (count != 1)})" for label, count in counts)


def _key(label: str) -> str:
    return " ".join(re.sub(r"[\s_-]+", " ", label.casefold()).split())
