"""From a table's rows to (text, label) pairs. Rows without a text or a label are left out, and counted."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from zokern.finetune import examples
from zokern.finetune.examples import Example, Text
from zokern.finetune.options import FinetuneError, Options
from zokern.finetune.reading import Row, Table

Pair = tuple[Text, str]  # (text, label)


# Why rows are left out: a word for run.json, and what the run says.
NO_LABEL, NO_TEXT, UNKNOWN, TORN = "no label", "no text", "unknown label", "held out under another label"
WHY = {
    NO_LABEL: "as they have no label (an empty one, or what --unlabelled names)",
    NO_TEXT: "as their text is empty",
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
        return [f"{n} rows left out, {WHY[reason]}: first {self.first[reason]}" for reason, n in self.counts.items()]


@dataclass
class Part:
    """The pairs of a file or a split, and what was left out of it. names: as Table has them."""

    where: str
    pairs: list[Pair]
    left_out: LeftOut
    names: list[str] | None = None
    notes: list[str] = field(default_factory=list)


def pairs(table: Table, where: str, options: Options) -> Part:
    """The rows of a table that have a text and a label."""
    names = None if table.names is None else [name.strip() for name in table.names]
    part = Part(where, [], LeftOut(), names, list(table.notes))
    missing = {"", *(value.strip() for value in options.unlabelled.split(","))}
    booleans = False
    columns = examples.columns(options)
    for number, row in table.rows:
        raw = _value(row, "--label-column", options.label_column, table, number)
        label = _label(raw, table, number, options)
        texts = [_string(_value(row, option, column, table, number), option, column, table, number)
                 for column, option in columns]  # fmt: skip
        booleans = booleans or isinstance(raw, bool)
        if label in missing:
            part.left_out.add(NO_LABEL, table.place(number))
        elif not any(texts) or (options.pair_column is not None and not all(texts)):
            part.left_out.add(NO_TEXT, table.place(number))
        else:
            part.pairs.append((texts[0] if len(texts) == 1 else Example(tuple(texts)), label))
    if booleans:
        part.notes.append(f"{where}: labels are booleans; their names are False and True")
    return part


def _value(row: Row, option: str, column: str, table: Table, number: int) -> Any:
    if column not in row:
        have = ", ".join(map(repr, row))
        raise FinetuneError(
            f"{table.place(number)}: no column {column!r}; the columns are {have}. Choose one with {option}"
        )
    value = row[column]
    if value is None or (isinstance(value, float) and math.isnan(value)):  # pandas writes empty cells as NaN
        return ""
    if isinstance(value, (str, int, float)):
        return value
    kind = {"list": "a list", "dict": "an object"}.get(type(value).__name__, f"a {type(value).__name__}")
    raise FinetuneError(
        f"{table.place(number)}: column {column!r} has {kind}, {str(value)[:60]!r}; one string or number is needed. "
        f"Choose another column with {option}, or make one of it"
    )


def _string(value: Any, option: str, column: str, table: Table, number: int) -> str:
    if isinstance(value, bool):
        raise FinetuneError(
            f"{table.place(number)}: column {column!r} has {value}, which is no text; choose another with {option}"
        )
    return str(value).strip()


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
