"""Texts and labels from a file (reading.py), a data set of the `datasets` library (named.py), or an embedded set.

Where no evaluation set is given, one is held out: stratified by label and chosen by a hash of the text alone, so that
runs with other seeds, and on other machines, are compared on the same texts, and no text is in both sets.

Nothing is left out silently: `Data` has what was, and the run says it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zokern.finetune import preset
from zokern.finetune.embedded import TEXTS
from zokern.finetune.examples import OWN, Text, key
from zokern.finetune.labels import Classes, check_classes, doubtful, few, lost_head, order, whole
from zokern.finetune.named import read_named
from zokern.finetune.options import FinetuneError, Options, names_a_file
from zokern.finetune.reading import read_file
from zokern.finetune.rows import TORN, UNKNOWN, LeftOut, Pair, Part, pairs

MAX_HELD_OUT = 400  # texts; 20 % of the data where that is less


@dataclass
class TextSet:
    """texts[i] has the label with index targets[i]."""

    texts: list[Text]
    targets: list[int]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass
class Data:
    """The training and evaluation texts, the label names in order of their index, and where all came from.

    left_out: rows that are in neither, by set. notes: what a user should know of the data, a sentence each.
    """

    train: TextSet
    eval: TextSet
    labels: list[str]
    descriptions: dict[str, str]
    source: str
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """For run.json."""
        return {"source": self.source, "train": len(self.train), "eval": len(self.eval), "labels": self.labels,
                "left_out": {name: part.counts for name, part in self.left_out.items()}, "notes": self.notes}  # fmt: skip


def load(options: Options, label2id: dict[str, int] | None = None, *, head: bool = False) -> Data:
    """Read what `options` names. Raises FinetuneError naming file, line, column and remedy.

    An objective that is auto counts as one that reads --text-column alone. label2id: the order of the labels in a model
    that may know them already. head: whether the model has a trained head for these, whose classes they are. labels.py has
    the rest of the rule.
    """
    descriptions: dict[str, str] = {}
    if (known := TEXTS.get(options.data)) is not None:
        try:
            train, held = Part(options.data, [*known.read()], LeftOut()), None
        except FinetuneError:
            raise
        except ValueError as error:
            raise FinetuneError(str(error)) from None
        descriptions, source = dict(known.descriptions), known.source
    else:
        train, held, source = *_read_both(options), options.data
    notes = [*train.notes, *(held.notes if held else ())]
    _write_alike(train, held)
    if not train.pairs:
        said = "; ".join(train.left_out.said())
        raise FinetuneError(f"{train.where}: no row has a text and a label{said and ': ' + said}")
    if options.objective not in OWN:
        check_classes([label for _, label in train.pairs], source)

    rest, left_out = train.pairs, {"train": train.left_out}
    if held is None:
        rest, kept = split(rest, min(MAX_HELD_OUT, round(0.2 * len(rest))), keep=True)
        if torn := len(train.pairs) - len(rest) - len(kept):
            held_rows, texts = set(kept), {text for text, _ in kept}
            first = next(pair[0] for pair in train.pairs if pair[0] in texts and pair not in held_rows)
            train.left_out.add(TORN, few([key(first)]), torn)
        if known is None:
            notes.append(f"evaluated on texts held out of {train.where}")
    else:
        kept, left_out["eval"] = held.pairs, held.left_out
        notes.append(f"evaluated on {held.where}")
    if options.limit_train is not None:
        rest = split(rest, options.limit_train)[1]
    if options.limit_eval is not None:
        kept = split(kept, options.limit_eval)[1]

    where = held.where if held is not None else source
    labels: list[str] = []
    if options.objective not in OWN:
        classes = _classes(rest, train, source, options, label2id, head)
        if known is None:
            rows = Counter(label for _, label in train.pairs)
            notes += [f"order of the labels: {classes.said}", *doubtful(rows)]
            if classes.lost is not None:
                notes.append(lost_head(classes, rows))
        labels = classes.labels
        rest, kept = (_renamed(pairs, classes.renamed) for pairs in (rest, kept))
        kept = _known(kept, labels, where, left_out.setdefault("eval", LeftOut()))
    if not kept:
        raise FinetuneError(f"{where}: no text is left to evaluate on; give more data, or --eval-data")
    if both := len({text for text, _ in kept} & {text for text, _ in rest}):
        notes.append(f"WARNING: {both} of the texts to evaluate on are trained on too")
    notes += [f"{name}: {said}" for name, part in left_out.items() for said in part.said()]
    return Data(_texts(rest, labels), _texts(kept, labels), labels, descriptions, source, left_out, notes)


def _classes(
    rest: list[Pair], train: Part, source: str, options: Options, label2id: dict[str, int] | None, head: bool
) -> Classes:
    """The labels of the training texts, of which there are two at least."""
    found = {label for _, label in rest}
    classes = order(found, train.names, label2id, head=head, asked=options.label_order)
    if len(classes.labels) < 2:
        also = "".join(f"; {said}" for said in train.left_out.said())
        raise FinetuneError(
            f"{source}: {len(rest)} training texts with the labels {classes.labels}; classification needs two labels{also}"
        )
    return classes


def _read_both(options: Options) -> tuple[Part, Part | None]:
    """The part to train on, and the one to evaluate on or None."""
    if options.eval_data is None:
        return read(options.data, options, options.split, options.eval_split)
    train = read(options.data, options, options.split, None)[0]
    part, held = read(options.eval_data, options, None, options.eval_split)
    return train, held or part


def _write_alike(train: Part, held: Part | None) -> None:
    """Labels that are whole numbers are written as such in both parts: 1 and 1.0 are one class."""
    parts = [train] if held is None else [train, held]
    if renamed := whole(label for part in parts for _, label in part.pairs):
        for part in parts:
            part.pairs = _renamed(part.pairs, renamed)


def _renamed(pairs: list[Pair], names: dict[str, str]) -> list[Pair]:
    return [(text, names.get(label, label)) for text, label in pairs] if names else pairs


def _known(kept: list[Pair], labels: list[str], where: str, left_out: LeftOut) -> list[Pair]:
    """Without the rows whose labels no training text has. Where these are the most, the columns or names are wrong."""
    known = set(labels)
    unknown = [label for _, label in kept if label not in known]
    if 2 * len(unknown) > len(kept):
        raise FinetuneError(
            f"{where}: {len(unknown)} of {len(kept)} texts to evaluate on have labels that no training text has: "
            f"{few(sorted(set(unknown)))}; training has {few(labels)}"
        )
    if unknown:
        left_out.add(UNKNOWN, few(unknown[:1]), len(unknown))
    return [pair for pair in kept if pair[1] in known] if unknown else kept


def split(pairs: list[Pair], count: int, *, keep: bool = False) -> tuple[list[Pair], list[Pair]]:
    """(rest, held): about `count` held-out pairs, each label in its proportion, no text in both. Both in hash order.

    keep: the rest has every label; what would take a label's last text is not held.
    """
    ordered = sorted(pairs, key=_hash)
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
    if keep:
        for group in groups.values():
            if all(text in texts for text, _ in group):
                texts.discard(group[-1][0])
        held = {pair for pair in held if pair[0] in texts}
    return [pair for pair in ordered if pair[0] not in texts], [pair for pair in ordered if pair in held]


def _hash(pair: Pair) -> bytes:
    return hashlib.sha256(f"{key(pair[0])}\0{pair[1]}".encode("utf-8", "surrogatepass")).digest()


def read(
    name: str, options: Options, split: str | None = None, eval_split: str | None = None
) -> tuple[Part, Part | None]:
    """(training part, evaluation part or None) of a file, or of a data set: "name" or "name:configuration".

    split, eval_split: the splits that are asked for, of a data set that has splits.
    """
    path = Path(name)
    if options.task is not None and path.is_dir() and (found := preset.files_in(path)) is not None:
        for option, wanted in (("--split", split), ("--eval-split", eval_split)):
            if wanted is not None:
                raise FinetuneError(f"{option} is {wanted!r}, but {name} has files; give one by --data or --eval-data")
        file, other = found
        held = None if other is None else pairs(read_file(other, options), str(other), options)
        return pairs(read_file(file, options), str(file), options), held
    if path.is_file() or (names_a_file(name) and not path.is_dir()):
        for option, wanted in (("--split", split), ("--eval-split", eval_split)):
            if wanted is not None:
                raise FinetuneError(f"{option} is {wanted!r}, but {name} is one file, without splits; give --eval-data")
        return pairs(read_file(path, options), name, options), None
    return read_named(name, options, split, eval_split)


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


def _texts(pairs: list[Pair], labels: list[str]) -> TextSet:
    if not labels:  # the rows have what is right
        return TextSet([text for text, _ in pairs], [0] * len(pairs))
    index = {label: i for i, label in enumerate(labels)}
    return TextSet([text for text, _ in pairs], [index[label] for _, label in pairs])
