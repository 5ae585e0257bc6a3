"""Files of texts as tables: CSV, TSV, JSON (an object a line, or one array), each with .gz too, and parquet."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zokern.finetune.examples import columns, needed
from zokern.finetune.options import FILES, REMEDY, FinetuneError, Options

Row = dict[str, Any]


@dataclass
class Table:
    """Rows, each with a number from which `place` makes what an error says of it.

    names: the labels of a data set that numbers its classes, in their order. notes: what the run is to say.
    head: where the columns of all rows have their names.
    """

    rows: Iterable[tuple[int, Row]]
    place: Callable[[int], str]
    names: list[str] | None = None
    notes: list[str] = field(default_factory=list)
    head: str = ""
    whole: bool = False  # one object that has all rows, as SQuAD's files are


def read_file(path: Path, options: Options) -> Table:
    """The table in a file, by the end of its name. Raises FinetuneError naming file, line and remedy."""
    name = path.name.lower()
    kind = Path(name.removesuffix(".gz")).suffix
    if kind not in FILES or (kind == ".parquet" and name.endswith(".gz")):
        raise FinetuneError(
            f"{path}: unknown kind of file {path.suffix!r}; give .csv, .tsv, .jsonl, .json or .parquet, "
            "or .gz of the first four"
        )
    if kind == ".parquet":
        return _parquet(path, options)
    text = _text(path)
    if kind == ".csv":
        return _csv(path, text, options)
    if kind == ".tsv":
        return _tsv(path, text, options)
    if kind == ".json" and options.task is not None and (whole := _object_of(text)) is not None:
        return Table([(0, whole)], lambda number: f"{path}, question {number + 1}", whole=True)
    return _json_array(path, text) if kind == ".json" and text.lstrip()[:1] == "[" else _json_lines(path, text)


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.name.lower().endswith(".gz") else raw
    except (OSError, EOFError, zlib.error) as error:
        raise FinetuneError(f"{path}: cannot be read ({error})") from error
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in raw[:200]:
        raise FinetuneError(f"{path}: this is UTF-16 or no text at all; save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise FinetuneError(
            f"{path}, line {line}: the byte 0x{error.object[error.start]:02x} is not UTF-8; the file is in another "
            "encoding, as Latin-1 or GBK; save it as UTF-8"
        ) from None


# --------------------------------------------------------------------------------------------------------- CSV and TSV


def _tsv(path: Path, text: str, options: Options) -> Table:
    """GLUE's dialect: no quotes, a text has neither tab nor line break. A quote is a character like any other."""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    head, begun = _head(path, [(i, line.split("\t")) for i, line in enumerate(lines, 1) if line][:1], options)
    remedy = "a .tsv is read without quotes, so no text may have a tab or a line break; such texts need .csv or .jsonl"
    rows, quoted, texts = [], 0, columns(options)
    for number, line in enumerate(lines, 1):
        if number > begun and line:
            row = _row(path, number, head, line.split("\t"), remedy)
            cells = [row.get(column, "") for column, _ in texts]
            quoted += any(len(cell) > 3 and cell[0] == cell[-1] == '"' and '""' in cell[1:-1] for cell in cells)
            rows.append((number, row))
    notes = [f'{path}: {quoted} texts stand in quotes with "" inside, and keep them: {remedy}'] if quoted else []
    return _lines(path, rows, notes, head=f"{path}, line {begun}")


def _csv(path: Path, text: str, options: Options) -> Table:
    """A quoted text may span lines. Quotes that are not closed where they should be are errors, not texts."""
    seen: list[str] = []

    def lines() -> Iterator[str]:
        for line in io.StringIO(text, newline=""):
            seen.append(line)
            yield line

    reader = csv.reader(lines(), strict=True)
    records: list[tuple[int, int, list[str]]] = []  # the first and the last of its lines
    before = csv.field_size_limit(2**31 - 1)  # of the process
    begun = 1
    try:
        for fields in reader:
            if fields:
                records.append((begun, reader.line_num, fields))
            begun = reader.line_num + 1
    except csv.Error as error:
        raise FinetuneError(
            f"{path}, in the row that begins on line {begun}: {error}. A text that begins with a quote must end with one "
            'and have those inside doubled (""); write it so, or give .tsv (no quotes) or .jsonl'
        ) from None
    finally:
        csv.field_size_limit(before)
    head, first = _head(path, [(begun, fields) for begun, _, fields in records[:1]], options)
    remedy = 'put texts that contain the delimiter in "double quotes"'
    records = [record for record in records if record[0] > first]
    rows = [(begun, _row(path, begun, head, fields, remedy)) for begun, _, fields in records]
    _find_swallowed(path, head, records, seen, options)
    return _lines(path, rows, head=f"{path}, line {first}")


def _find_swallowed(
    path: Path, head: list[str], records: list[tuple[int, int, list[str]]], lines: list[str], options: Options
) -> None:
    """Refuses a text that spans lines which are rows themselves: a quote at its beginning has swallowed them."""
    if options.label_column not in head:
        return  # which is refused later, by name
    column = head.index(options.label_column)
    known = {fields[column].strip() for begun, end, fields in records if begun == end}

    def is_row(line: str) -> bool:
        fields = [value.strip().strip('"') for value in line.rstrip("\r\n").split(",")]
        return len(fields) == len(head) > 1 and fields[column] in known

    for begun, end, _ in records:
        if begun == end:
            continue
        inside = [is_row(line) for line in lines[begun : end - 1]]
        alone = len(inside) < 2 and is_row(lines[begun - 1]) and is_row(lines[end - 1]) and all(inside)
        if alone or (len(inside) > 1 and 2 * sum(inside) > len(inside)):
            raise FinetuneError(
                f"{path}, line {begun}: a quote opens here and closes on line {end}, and the lines between look like rows "
                'of their own. A text that begins with a quote is written """so"" it begins"; or give .tsv (no quotes) or '
                ".jsonl"
            )


def _head(path: Path, first: list[tuple[int, list[str]]], options: Options) -> tuple[list[str], int]:
    if not first:
        raise FinetuneError(f"{path}: empty; the first line must have the columns' names")
    line, head = first[0]
    for column, option in needed(options):
        if head.count(column) > 1:
            raise FinetuneError(f"{path}, line {line}: {head.count(column)} columns are named {column!r} ({option})")
    if len(head) == 1 and (other := next((c for c in ";\t|" if c in head[0]), None)):
        raise FinetuneError(
            f"{path}, line {line}: one column, {head[0]!r}; a .csv has commas between the columns, this has {other!r}: "
            "save it with commas, or with tabs as .tsv"
        )
    return head, line


def _row(path: Path, line: int, head: list[str], fields: list[str], remedy: str) -> Row:
    if len(fields) != len(head):
        raise FinetuneError(f"{path}, line {line}: {len(fields)} values for {len(head)} columns; {remedy}")
    return dict(zip(head, fields, strict=True))


def _lines(path: Path, rows: list[tuple[int, Row]], notes: list[str] | None = None, head: str = "") -> Table:
    return Table(rows, lambda number: f"{path}, line {number}", None, notes or [], head)


# -------------------------------------------------------------------------------------------------- JSON and parquet


def _object_of(text: str) -> Row | None:
    """The one object that a file is; None where it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _json_lines(path: Path, text: str) -> Table:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise FinetuneError(
                    f"{path}, line {number}: not valid JSON ({error}); one object a line is needed, or one array of "
                    "objects in a .json file"
                ) from None
            rows.append((number, _object(row, f"{path}, line {number}")))
    return _lines(path, rows)


def _json_array(path: Path, text: str) -> Table:
    try:
        items = json.loads(text)
    except ValueError as error:
        raise FinetuneError(f"{path}: not valid JSON ({error})") from None
    rows = [(number, _object(item, f"{path}, item {number}")) for number, item in enumerate(items, 1)]
    return Table(rows, lambda number: f"{path}, item {number}")


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise FinetuneError(f"{where}: a JSON object is needed, this is a {type(row).__name__}")
    return row


def _parquet(path: Path, options: Options) -> Table:
    try:
        import datasets
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise FinetuneError(f"{path}: reading parquet needs `datasets` ({error}); {REMEDY}") from None
    try:
        table = pq.read_table(path)
        for i, one in enumerate(table.schema):
            if pa.types.is_dictionary(one.type):  # what pandas calls categories
                table = table.set_column(i, one.name, table.column(i).cast(one.type.value_type))
        part = datasets.Dataset(datasets.table.InMemoryTable(table))
    except (OSError, ValueError, NotImplementedError, pa.ArrowException) as error:
        raise FinetuneError(f"{path}: cannot be read as parquet ({error})") from error
    return of_dataset(part, str(path), options)


def of_dataset(part: Any, where: str, options: Options) -> Table:
    """The table of a part of a data set of the `datasets` library. where: what errors call it."""
    wanted = list(dict.fromkeys(column for column, _ in needed(options)))
    if options.objective == "image" and type((part.features or {}).get(options.image_column)).__name__ == "Image":
        import datasets

        part = part.cast_column(options.image_column, datasets.Image(decode=False))  # files, not pixels
    names = getattr((part.features or {}).get(options.label_column), "names", None)
    if options.task is None and set(wanted) <= set(part.column_names):
        part = part.select_columns(wanted)  # pictures and the like need not be decoded
    return Table(enumerate(part), lambda number: f"{where}, row {number}", names, head=where)
