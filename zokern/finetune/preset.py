"""`--task NAME`: a preset (zokern/tasks/presets.py) as options, and its data in the benchmark's own form."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zokern.finetune.embedded import TEXTS
from zokern.finetune.options import FILES, FinetuneError, Options
from zokern.finetune.reading import Row, Table
from zokern.kinds import placeholders
from zokern.tasks.presets import PRESETS

_HELD = ("val", "dev")


def applied(options: Options) -> Options:
    """With what --task or embedded texts say in place of every option that has its default; nothing else is changed."""
    if options.task is None:
        known = TEXTS.get(options.data)
        if known is None or not known.template or options.changed("template"):
            return options
        return dataclasses.replace(options, template=known.template)
    preset = PRESETS[options.task]
    said: dict[str, Any] = {
        "data": preset.hub, "template": preset.template, "cut": preset.cut, "choices": preset.choices,
        "answer": preset.answer, "metric": None if preset.metric == "accuracy" else preset.metric,
    }  # fmt: skip
    taken = {name: value for name, value in said.items() if not options.changed(name)}
    if "template" not in taken and preset.cut not in placeholders(options.template):
        taken.pop("cut", None)  # the template is the user's own
    return dataclasses.replace(options, **taken)


def for_objective(options: Options) -> Options:
    """With the columns of --task for a classifier, once the objective is known."""
    if options.task is None or options.objective not in ("classifier", "similarity"):
        return options
    texts = PRESETS[options.task].texts
    if not texts or (options.objective == "similarity" and len(texts) > 1):
        head = "give --objective classifier, or " if texts else "give "
        raise FinetuneError(
            f"--task {options.task} cannot be done with --objective {options.objective}; {head}--model a language "
            "model, as an OPT or a T5"
        )
    if options.changed("text_column") or options.pair_column is not None:
        return options  # the columns are the user's own
    cut = None if options.cut == PRESETS[options.task].cut not in texts else options.cut
    return dataclasses.replace(options, text_column=texts[0], pair_column=texts[1] if len(texts) > 1 else None, cut=cut)


def is_pair(options: Options) -> bool:
    """Whether --task asks about two texts with fixed answers."""
    return options.task is not None and len(PRESETS[options.task].texts) > 1


def words(options: Options, labels: list[str]) -> list[str] | None:
    """The labels' words of --task, or of embedded texts; None without any."""
    known = TEXTS.get(options.data)
    found = PRESETS[options.task].words if options.task is not None else known.words if known is not None else {}
    return [found.get(label, label) for label in labels] if found else None


def prepared(table: Table, options: Options) -> Table:
    """The rows that --task reads of a table. Raises FinetuneError where one lacks what the task has."""
    if options.task is None:
        return table
    preset = PRESETS[options.task]

    def rows() -> Iterator[tuple[int, Row]]:
        count = 0
        for number, row in table.rows:
            try:
                for made in preset.rows(row):
                    yield (count if table.whole else number), made
                    count += 1
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                raise FinetuneError(
                    f"{table.place(count if table.whole else number)}: {error}. --task {options.task} reads the files of "
                    f"the benchmark, and {preset.hub} of the hub; for other columns leave it out and give --template"
                ) from error

    return Table(rows(), table.place, list(preset.words) or None, table.notes)


def files_in(directory: Path) -> tuple[Path, Path | None] | None:
    """(the file to train on, the one to evaluate on or None) of a benchmark's own directory; None of any other."""
    found = sorted(p for p in directory.iterdir() if p.name.lower().removesuffix(".gz").endswith(FILES[:-1]))
    train = [path for path in found if "train" in path.name.lower()]
    held = [path for path in found if any(word in path.name.lower() for word in _HELD) and path not in train]
    for one in (train, held):
        if len(one) > 1:
            names = ", ".join(path.name for path in one)
            raise FinetuneError(f"--data {str(directory)!r} has several files of one part: {names}; give one of them")
    return (train[0], held[0] if held else None) if train else None
