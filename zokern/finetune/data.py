"""Texts and labels from a CSV, TSV or JSONL file, a data set of the `datasets` library, or the embedded docstrings.

Where no evaluation set is given, one is held out: stratified by label and chosen by a hash of the text alone, so that
runs with other seeds, and on other machines, are compared on the same texts, and no text is in both sets.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zokern.finetune.options import REMEDY, FinetuneError, Options

MAX_HELD_OUT = 400  # texts; 20 % of the data where that is less
Pair = tuple[str, str]  # (text, label)


@dataclass
class TextSet:
    """texts[i] has the label with index targets[i]."""

    texts: list[str]
    targets: list[int]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass
class Data:
    """The training and evaluation texts, the label names in order of their index, and where all came from."""

    train: TextSet
    eval: TextSet
    labels: list[str]
    descriptions: dict[str, str]
    source: str


def load(options: Options, label2id: dict[str, int] | None = None) -> Data:
    """Read what `options` names. Raises FinetuneError naming file, line, column and remedy.

    label2id: the order of the labels in a model that may know them already; else they are sorted, numbers as numbers.
    """
    descriptions: dict[str, str] = {}
    held: list[Pair] | None = None
    if options.data == "docstrings":
        from zokern.finetune import docstrings

        try:
            pairs = docstrings.sentences()
        except ValueError as error:
            raise FinetuneError(str(error)) from None
        descriptions = dict(docstrings.DESCRIPTIONS)
        source = "docstrings of the Python standard library"
    else:
        pairs, held = read(options.data, options)
        source = options.data
    if options.eval_data is not None:
        held = read(options.eval_data, options)[0]
    if held is None:
        pairs, held = split(pairs, min(MAX_HELD_OUT, round(0.2 * len(pairs))))
    if options.limit_train is not None:
        pairs = split(pairs, options.limit_train)[1]
    if options.limit_eval is not None:
        held = split(held, options.limit_eval)[1]

    labels = sorted({label for _, label in pairs}, key=_natural)
    if label2id is not None and set(label2id) == set(labels):
        labels = sorted(labels, key=lambda label: label2id[label])
    if len(labels) < 2:
        raise FinetuneError(
            f"{source}: {len(pairs)} training texts with the labels {labels}; classification needs two labels"
        )
    if not held:
        raise FinetuneError(f"{source}: no text is left to evaluate on; give more data, or --eval-data")
    unknown = sorted({label for _, label in held} - set(labels))
    if unknown:
        raise FinetuneError(
            f"the evaluation set has labels that no training text has: {unknown}; training has {labels}"
        )
    return Data(_texts(pairs, labels), _texts(held, labels), labels, descriptions, source)


def split(pairs: list[Pair], count: int) -> tuple[list[Pair], list[Pair]]:
    """(rest, held): about `count` held-out pairs, each label in its proportion, no text in both. Both in hash order."""
    ordered = sorted(pairs, key=lambda pair: hashlib.sha256("\0".join(pair).encode("utf-8", "surrogatepass")).digest())
    if count >= len(ordered):
        return [], ordered
    groups: dict[str, list[Pair]] = {}
    for pair in ordered:
        groups.setdefault(pair[1], []).append(pair)
    # Largest remainders: the shares add up to `count` exactly. Ties go to the label that sorts first.
    shares = {label: count * len(group) / len(ordered) for label, group in groups.items()}
    takes = {label: int(share) for label, share in shares.items()}
    for label in sorted(shares, key=lambda name: (takes[name] - shares[name], name))[: count - sum(takes.values())]:
        takes[label] += 1
    held = {pair for label, group in groups.items() for pair in group[: takes[label]]}
    texts = {text for text, _ in held}
    return [pair for pair in ordered if pair[0] not in texts], [pair for pair in ordered if pair in held]


def read(name: str, options: Options) -> tuple[list[Pair], list[Pair] | None]:
    """(training pairs, evaluation pairs or None) of a file, or of a data set: "name" or "name:configuration"."""
    path = Path(name)
    if path.is_file():
        if path.suffix in (".csv", ".tsv"):
            return list(_read_csv(path, options)), None
        if path.suffix in (".jsonl", ".json"):
            return list(_read_jsonl(path, options)), None
        raise FinetuneError(
            f"{name}: unknown kind of file {path.suffix!r}; give .csv, .tsv, .jsonl or .json (one object a line)"
        )
    return _read_hub(name, options)


def read_map(path: Path, what: str, labels: Iterable[str]) -> dict[str, str]:
    """A JSON object {label: text} with a text for each of `labels`. `what` names the option in errors."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FinetuneError(f"{what} {path}: not valid JSON ({error})") from None
    if not isinstance(value, dict) or not all(isinstance(v, str) and v.strip() for v in value.values()):
        raise FinetuneError(f'{what} {path}: needs one JSON object of non-empty texts, as {{"label": "its text"}}')
    missing = [label for label in labels if label not in value]
    if missing:
        raise FinetuneError(f"{what} {path}: no entry for the labels {missing}; it has {sorted(value)}")
    return {str(key): text for key, text in value.items()}


def _natural(label: str) -> tuple[int, int, str]:
    return (0, int(label), "") if label.isascii() and label.isdigit() else (1, 0, label)


def _texts(pairs: list[Pair], labels: list[str]) -> TextSet:
    index = {label: i for i, label in enumerate(labels)}
    return TextSet([text for text, _ in pairs], [index[label] for _, label in pairs])


def _pair(row: dict[str, Any], where: str, options: Options) -> Pair:
    values = []
    for option, column in (("--text-column", options.text_column), ("--label-column", options.label_column)):
        if column not in row:
            have = ", ".join(repr(key) for key in row if key is not None)
            raise FinetuneError(f"{where}: no column {column!r}; the columns are {have}. Choose one with {option}")
        value = "" if row[column] is None else str(row[column]).strip()
        if not value:
            raise FinetuneError(f"{where}: column {column!r} is empty; fill it in or remove the line")
        values.append(value)
    return values[0], values[1]


def _read_csv(path: Path, options: Options) -> Iterator[Pair]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        try:
            for row in reader:
                if None in row:
                    raise FinetuneError(
                        f"{path}, line {reader.line_num}: {len(row[None]) + len(row) - 1} values for {len(row) - 1} "
                        'columns; put texts that contain the delimiter in "double quotes"'
                    )
                yield _pair(row, f"{path}, line {reader.line_num}", options)
        except (UnicodeDecodeError, csv.Error) as error:
            raise FinetuneError(
                f"{path}, after line {reader.line_num}: {error}; the file must be UTF-8 CSV with a head line"
            ) from None


def _read_jsonl(path: Path, options: Options) -> Iterator[Pair]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise FinetuneError(
                    f"{path}, line {number}: not valid JSON ({error}); one object a line is needed"
                ) from None
            if not isinstance(row, dict):
                raise FinetuneError(f"{path}, line {number}: a JSON object is needed, this is a {type(row).__name__}")
            yield _pair(row, f"{path}, line {number}", options)


def _read_hub(name: str, options: Options) -> tuple[list[Pair], list[Pair] | None]:
    try:
        import datasets
    except ImportError:
        raise FinetuneError(
            f"--data {name!r} is not a file, and reading a data set by name needs `datasets`; {REMEDY}"
        ) from None
    base, _, configuration = name.partition(":")
    try:
        loaded = datasets.load_dataset(base, configuration or None)
    except Exception as error:  # the library raises a score of unrelated types here
        raise FinetuneError(
            f"--data {name!r}: neither a file here nor a data set that could be loaded "
            f"({type(error).__name__}: {error}). Give a .csv or .jsonl file, or a name as 'ag_news' or 'glue:sst2'; "
            "without internet access only cached sets load"
        ) from error
    splits = {key: list(_rows(part, f"{name}, split {key!r}", options)) for key, part in loaded.items()}
    train = splits.get("train") or next(iter(splits.values()))
    held = next((splits[key] for key in ("validation", "test") if splits.get(key)), None)
    return train, None if held is train else held


def _rows(part: Any, where: str, options: Options) -> Iterator[Pair]:
    feature = (part.features or {}).get(options.label_column)
    names = getattr(feature, "names", None)
    for number, row in enumerate(part):
        label = row.get(options.label_column)
        if names is not None and isinstance(label, int):
            if label < 0:
                return  # a test split published without its labels
            row = {**row, options.label_column: names[label]}
        yield _pair(row, f"{where}, row {number}", options)
