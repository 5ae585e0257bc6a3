"""The values in the columns of a row, with errors that say where they stand and which option named the column."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from zokern._checks import meant
from zokern.finetune.options import FinetuneError
from zokern.finetune.reading import Row, Table


class Cells(NamedTuple):
    """A row of a table."""

    table: Table
    number: int
    row: Row

    @property
    def place(self) -> str:
        """Where it stands."""
        return self.table.place(self.number)

    def raw(self, column: str, option: str) -> Any:
        """A value as it is; "" for an empty one."""
        if column not in self.row:
            raise FinetuneError(f"{self.table.head or self.place}: {self._lacks(column, option)}")
        value = self.row[column]
        empty = value is None or (isinstance(value, float) and math.isnan(value))  # pandas writes empty cells as NaN
        return "" if empty else value

    def _lacks(self, column: str, option: str) -> str:
        have, hint = ", ".join(map(repr, self.row)), meant(column, self.row)
        columns = f"{hint} The columns are {have}" if hint else f"the columns are {have}"
        remedy = f"Choose one with {option}"
        if option == "--template":
            remedy = f"{{{column}}} in --template stands for a column: write one of these there"
        return f"no column {column!r}; {columns}. {remedy}"

    def value(self, column: str, option: str) -> Any:
        """A string or a number."""
        value = self.raw(column, option)
        if isinstance(value, (str, int, float)):
            return value
        kind = {"list": "a list", "dict": "an object"}.get(type(value).__name__, f"a {type(value).__name__}")
        raise FinetuneError(
            f"{self.place}: column {column!r} has {kind}, {str(value)[:60]!r}; one string or number is needed. "
            f"Choose another column with {option}, or make one of it"
        )

    def text(self, column: str, option: str) -> str:
        """A text, without white space around it."""
        value = self.value(column, option)
        if isinstance(value, bool):
            raise FinetuneError(
                f"{self.place}: column {column!r} has {value}, which is no text; choose another with {option}"
            )
        return str(value).strip()

    def texts(self, column: str, option: str) -> list[str]:
        """The texts of a list, or the one text that stands for a list of one; numbers are written as such."""
        value = self.raw(column, option)
        several = list(value) if isinstance(value, (list, tuple)) else [self.value(column, option)]
        for one in several:
            if isinstance(one, bool) or not isinstance(one, (str, int, float)):
                raise FinetuneError(
                    f"{self.place}: column {column!r} has {str(value)[:60]!r}, where a list of texts is needed; choose "
                    f"another with {option}"
                )
        return [str(one).strip() for one in several]
