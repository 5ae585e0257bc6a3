"""Data sets with splits, by the `datasets` library: named ones, directories of files, and what `save_to_disk` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zokern.finetune.embedded import TEXTS
from zokern.finetune.options import REMEDY, FinetuneError, Options
from zokern.finetune.reading import of_dataset
from zokern.finetune.rows import Part, pairs

# Splits to evaluate on, best first.
EVALUATION = ("validation", "valid", "val", "dev", "devel", "validation_matched", "dev_matched", "eval", "evaluation",
              "test", "test_matched", "testing")  # fmt: skip


def read_named(name: str, options: Options, split: str | None, eval_split: str | None) -> tuple[Part, Part | None]:
    """(the part to train on, the part to evaluate on or None) of a data set. Raises FinetuneError.

    split, eval_split: their names, where they are asked for.
    """
    parts = _load(name)
    train = split or ("train" if "train" in parts else next(iter(parts)))
    for option, wanted in (("--split", split), ("--eval-split", eval_split)):
        if wanted is not None and wanted not in parts:
            raise FinetuneError(f"{option}: {name} has no split {wanted!r}; its splits are {', '.join(parts)}")

    def part(key: str) -> Part:
        where = f"{name}, split {key!r}"
        return pairs(of_dataset(parts[key], where, options), where, options)

    notes = []
    if "train" not in parts and split is None:
        notes.append(f"{name} has no split 'train': {train!r} is trained on (see --split)")
    held = None
    if eval_split is not None:
        held = part(eval_split)
        if not held.pairs:
            raise FinetuneError(f"{held.where}: no row has a text and a label; {'; '.join(held.left_out.said())}")
    else:
        for key in (key for key in EVALUATION if key in parts and key != train):
            held = part(key)
            if held.pairs:
                break
            notes.append(f"split {key!r} is not used: none of its {len(parts[key])} rows has a text and a label")
            held = None
    known = {train, *EVALUATION}
    if held is None and (others := [key for key in parts if key not in known]):
        notes.append(f"splits that are not used: {', '.join(others)} (see --eval-split)")
    training = part(train)
    training.notes += notes
    return training, held


def _load(name: str) -> dict[str, Any]:
    try:
        import datasets
    except ImportError:
        raise FinetuneError(
            f"--data {name!r} is not a file, and reading a data set by name needs `datasets`; {REMEDY}"
        ) from None
    base, configuration = _named(name)
    try:
        if any((Path(base) / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(base)
        else:
            loaded = datasets.load_dataset(base, configuration)
    except Exception as error:  # the library raises a score of unrelated types here
        raise FinetuneError(
            f"--data {name!r}: neither a file here nor a data set that could be loaded "
            f"({type(error).__name__}: {error}). Give a .csv or .jsonl file, a name as 'ag_news' or 'glue:sst2', or one of "
            f"{', '.join(TEXTS)}; without internet access only cached sets of the hub load"
        ) from error
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _named(name: str) -> tuple[str, str | None]:
    """(name or directory, configuration or None). A directory may have colons in its name."""
    if Path(name).is_dir():
        return name, None
    base, _, configuration = name.rpartition(":")
    if base and Path(base).is_dir():
        return base, configuration
    base, _, configuration = name.partition(":")
    return base, configuration or None
