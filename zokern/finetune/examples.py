"""What a run reads of each row: one text, or an `Example` of several; and from which columns."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import NamedTuple

from zokern.finetune.embedded import TEXTS
from zokern.finetune.options import FinetuneError, Options
from zokern.kinds import placeholders


class Example(NamedTuple):
    """A row that is more than one text.

    parts: the texts of its columns, in their order. candidates, right: of --choices, and the places of the right ones.
    answers: of --answer; any is right, the first is learnt.
    """

    parts: tuple[str, ...]
    candidates: tuple[str, ...] = ()
    right: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Picture:
    """A picture. digest: SHA-256 of its file, in hex; equal ones are one picture. content: of the file; None: read path."""

    digest: str
    path: str = field(compare=False)
    content: bytes | None = field(compare=False)


PROMPTED = ("prompt", "choices", "answer")  # objectives that read --template
OWN = ("choices", "answer")  # objectives whose rows have no labels, but candidates or answers of their own

Text = str | Example | Picture


def parts(text: Text) -> tuple[str, ...]:
    """The texts of a row's columns; a picture has none."""
    assert not isinstance(text, Picture)
    return (text,) if isinstance(text, str) else text.parts


def key(text: Text) -> str:
    """What is hashed of a row: equal rows have the same, others another."""
    if isinstance(text, Picture):
        return text.digest
    return text if isinstance(text, str) else json.dumps(text)


def columns(options: Options) -> list[tuple[str, str]]:
    """(column, the option that names it) of each text, in the order of `Example.parts`. `--objective` is no longer auto, or
    counts as one that takes --text-column.
    """
    if options.objective == "image":
        return []
    if options.objective in PROMPTED:
        return [
            (options.text_column, "--text-column") if name == "text" else (name, "--template")
            for name in placeholders(options.template)
        ]
    found = [(options.text_column, "--text-column")]
    return found if options.pair_column is None else [*found, (options.pair_column, "--pair-column")]


def needed(options: Options) -> list[tuple[str, str]]:
    """(column, the option that names it) of all that a row must have."""
    found = columns(options)
    if options.objective == "image":
        found = [(options.image_column, "--image-column")]
    if options.objective == "choices":
        found += [(column, "--choices") for column in choice_columns(options)]
    if options.objective == "answer":
        return [*found, (str(options.answer), "--answer")]
    return [*found, (options.label_column, "--label-column")]


def choice_columns(options: Options) -> list[str]:
    """The columns of --choices."""
    return [name.strip() for name in (options.choices or "").split(",")]


def check(options: Options) -> None:
    """Raises FinetuneError where options about columns do not fit the objective, which is no longer auto."""
    for objective, given in (("choices", options.choices), ("answer", options.answer)):
        if (options.objective == objective) != (given is not None):
            have = "missing" if given is None else repr(given)
            raise FinetuneError(
                f"--{objective} is {have}, and the objective is {options.objective}; --{objective} goes with --objective "
                f"{objective}, which auto picks for it"
            )
    if options.pair_column is not None and options.objective != "classifier":
        raise FinetuneError(
            f"--pair-column is for --objective classifier, and the objective is {options.objective}; give that, or a "
            'prompt, which names its columns in --template, as "{premise} {hypothesis}"'
        )
    if options.chat and options.objective not in PROMPTED:
        raise FinetuneError(
            f"--chat is for {', '.join(PROMPTED)}, and the objective is {options.objective}; leave it out"
        )
    files = {"prompt": ("verbalizers", options.verbalizers), "similarity": ("descriptions", options.descriptions)}
    for objective, (name, path) in files.items():
        if path is not None and options.objective != objective:
            raise FinetuneError(
                f"--{name} is for --objective {objective}, and the objective is {options.objective}; leave it out"
            )
    if options.data in TEXTS and options.objective in (*OWN, "image"):
        raise FinetuneError(
            f"--data {options.data} has texts and labels; give data for --objective {options.objective}"
        )
    if options.data in TEXTS and [column for column, _ in columns(options)] != [options.text_column]:
        raise FinetuneError(
            f"--data {options.data} has one text a row, {{text}}; give data with other columns, or leave out --pair-column "
            "and other names in --template"
        )
    cut_place(options)


def cut_place(options: Options) -> int | None:
    """The place of --cut in `Example.parts`; None where the longest texts give way."""
    if options.cut is None:
        return None
    names = [column for column, _ in columns(options)]
    if options.cut not in names:
        raise FinetuneError(
            f"--cut is {options.cut!r}, and the texts are of the columns {', '.join(map(repr, names))}; give one of them"
        )
    return names.index(options.cut)
