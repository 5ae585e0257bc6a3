"""What is right for a row whose answers are its own: which of its candidates (--choices), or which texts (--answer)."""

from __future__ import annotations

from typing import Any

from zokern.finetune.cells import Cells
from zokern.finetune.examples import choice_columns
from zokern.finetune.options import FinetuneError, Options


def candidates(cells: Cells, options: Options) -> list[str]:
    """The candidates of a row: of a column each, of which the last ones may be empty, or of one column with a list."""
    columns = choice_columns(options)
    if len(columns) == 1:
        column = columns[0]
        if not isinstance(value := cells.raw(column, "--choices"), (list, tuple)):
            raise FinetuneError(
                f"{cells.place}: column {column!r} has {str(value)[:60]!r}; --choices with one column needs a list of "
                "texts in it. Candidates in columns of their own are named with commas between"
            )
        found = cells.texts(column, "--choices")
    else:
        found = [cells.text(column, "--choices") for column in columns]
        while found and not found[-1]:
            found.pop()
    if "" in found:
        raise FinetuneError(f"{cells.place}: candidate {found.index('')} of --choices {options.choices} is empty")
    return found


def right_ones(cells: Cells, found: list[str], missing: set[str], options: Options) -> tuple[int, ...]:
    """The places of the right candidates; () where the row does not say.

    The label is a candidate's place (from 0), its text, or the name of its column; or a list of these.
    """
    raw = cells.raw(options.label_column, "--label-column")
    several = list(raw) if isinstance(raw, (list, tuple)) else [raw]
    places = set()
    for one in several:
        if str(one).strip() not in missing:
            text = found[_place(cells, one, found, options)]
            places |= {i for i, other in enumerate(found) if other == text}
    return tuple(sorted(places))


def _place(cells: Cells, label: Any, found: list[str], options: Options) -> int:
    columns = choice_columns(options)
    if isinstance(label, float) and label.is_integer():
        label = int(label)  # a column of whole numbers with a gap in it comes as floats
    named = str(label).strip()
    places = set()
    if isinstance(label, str):
        places |= {found.index(named)} if named in found else set()
        places |= {columns.index(named)} if len(columns) > 1 and named in columns[: len(found)] else set()
    if not isinstance(label, bool) and named.isdecimal() and int(named) < len(found):
        places.add(int(named))
    if len(places) == 1:
        return places.pop()
    where = f"{cells.place}: column {options.label_column!r} has {label!r}"
    if places:
        raise FinetuneError(
            f"{where}, which is a candidate's place and another one's text; write the places as numbers in a .jsonl file, "
            "or the right candidate as its column's name"
        )
    raise FinetuneError(
        f"{where}; the right one of the {len(found)} candidates {[text[:30] for text in found[:4]]} is named by its place "
        f"(0 to {len(found) - 1}), its text or its column. Choose another column with --label-column"
    )


def answers(cells: Cells, options: Options) -> tuple[str, ...]:
    """The texts of --answer, of which any is right and the first is learnt; () where there is none."""
    assert options.answer is not None
    return tuple(text for text in cells.texts(options.answer, "--answer") if text)
