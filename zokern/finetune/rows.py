"""From a table's rows to (text, label) pairs. Rows without a text or a label are left out, and counted."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zokern.finetune import examples, pictures, targets
from zokern.finetune.cells import Cells
from zokern.finetune.examples import Example, Text
from zokern.finetune.options import FinetuneError, Options
from zokern.finetune.preset import prepared
from zokern.finetune.reading import Table

Pair = tuple[Text, str]  # (text, label)


# Why rows are left out: a word for run.json, and what the run says.
NO_LABEL, NO_TEXT, UNKNOWN, TORN = "no label", "no text", "unknown label", "held out under another label"
NO_ANSWER, NO_CHOICE, NO_PICTURE = "no answer", "no choice", "no picture"
WHY = {
    NO_LABEL: "as they have no label (an empty one, or what --unlabelled names)",
    NO_TEXT: "as their text is empty",
    NO_ANSWER: "as --answer has no text for them",
    NO_PICTURE: "as --image-column is empty for them",
    NO_CHOICE: "as they have one candidate or none",
    UNKNOWN: "as no training text has their label",
    TORN: "as their text is held out with another label",
}


@dataclass
class LeftOut:
    """Rows that are not used, by the reason. first: where the first one is."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, where: str, count: int = 1) -> None:
        """Count rows."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        self.first.setdefault(reason, where)

    def said(self) -> list[str]:
        """A sentence for each reason."""
        return [f"{_left_out(n, WHY[reason])}: first {self.first[reason]}" for reason, n in self.counts.items()]


def _left_out(count: int, why: str) -> str:
    if count > 1:
        return f"{count} rows left out, {why}"
    for many, one in (("they have", "it has"), ("their", "its"), ("them", "it")):
        why = why.replace(many, one)
    return f"{count} row left out, {why}"


@dataclass
class Part:
    """The pairs of a file or a split, and what was left out of it. names: as Table has them."""

    where: str
    pairs: list[Pair]
    left_out: LeftOut
    names: list[str] | None = None
    notes: list[str] = field(default_factory=list)


def pairs(table: Table, where: str, options: Options) -> Part:
    """The rows of a table that have a text, and a label or an answer of their own."""
    table = prepared(table, options)
    names = None if table.names is None else [name.strip() for name in table.names]
    part = Part(where, [], LeftOut(), names, list(table.notes))
    missing = {"", *(value.strip() for value in options.unlabelled.split(","))}
    booleans = False
    columns = examples.columns(options)
    for number, row in table.rows:
        cells = Cells(table, number, row)
        texts = tuple(cells.text(column, option) for column, option in columns)
        if options.objective in examples.OWN:
            text, reason = _own(cells, texts, missing, options)
            label = ""
        else:
            raw = cells.value(options.label_column, "--label-column")
            label = _label(raw, table, number, options)
            booleans = booleans or isinstance(raw, bool)
            text = texts[0] if len(texts) == 1 else Example(texts)
            if options.objective == "image":
                text = pictures.read(cells, options, Path(where).parent) or ""
            reason = NO_LABEL if label in missing else NO_PICTURE if options.objective == "image" and not text else ""
        if not reason and columns and (not any(texts) or (options.pair_column is not None and not all(texts))):
            reason = NO_TEXT
        if reason:
            part.left_out.add(reason, table.place(number))
        else:
            part.pairs.append((text, label))
    if booleans:
        part.notes.append(f"{where}: labels are booleans; their names are False and True")
    return part


def _own(cells: Cells, texts: tuple[str, ...], missing: set[str], options: Options) -> tuple[Text, str]:
    """(a row with candidates or answers of its own, why it is left out or "")."""
    if options.objective == "answer":
        right = targets.answers(cells, options)
        return Example(texts, answers=right), "" if right else NO_ANSWER
    found = targets.candidates(cells, options)
    places = targets.right_ones(cells, found, missing, options)
    reason = NO_LABEL if not places else NO_CHOICE if len(found) < 2 else ""
    return Example(texts, tuple(found), places), reason


def _label(value: Any, table: Table, number: int, options: Options) -> str:
    if table.names is not None and isinstance(value, int) and not isinstance(value, bool):
        if value >= len(table.names):
            raise FinetuneError(
                f"{table.place(number)}: column {options.label_column!r} has the class {value}; the data set names "
                f"{len(table.names)}"
            )
        return "" if value < 0 else table.names[value].strip()
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of whole numbers with a gap in it comes as floats
    return str(value).strip()
