"""What makes a run this run: its options and its texts. `--resume` compares them with what options.json says."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zokern.finetune import adapter_files, adapters, preset, takers
from zokern.finetune.data import Data, TextSet
from zokern.finetune.embedded import MODELS, TEXTS
from zokern.finetune.examples import key
from zokern.finetune.options import FinetuneError, Options, flag
from zokern.finetune.tasks import Task

KEY = "run"  # of options.json, beside the options
LOCAL = ("model", "data", "eval_data", "descriptions", "verbalizers")  # may be paths
_ALWAYS = ("model", "data", "steps")  # in every version's file; of later settings one without them has the defaults
_WHAT = {
    "train": "the training texts or their labels",
    "eval": "the evaluation texts or their labels",
    "labels": "the order of the labels",
    "tokens": "what the model reads of the texts (its tokenizer, --descriptions or --verbalizers)",
}


@dataclasses.dataclass
class Stored:
    """The content of options.json. hashes: None in an older file. ends: values of --steps before it grew. ranks: processes
    that began it."""

    options: Options
    hashes: dict[str, str] | None
    ends: list[int]
    grown: bool = False
    ranks: int = 1


def hashes(data: Data, task: Task) -> dict[str, str]:
    """SHA-256, in hex, of each thing that a run's batches come from."""
    return {
        "train": _of_texts(data.train),
        "eval": _of_texts(data.eval),
        "labels": _digest([label.encode("utf-8", "surrogatepass") for label in data.labels]),
        "tokens": _of_tokens(task),
    }


def _digest(parts: list[bytes]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()


def _of_texts(texts: TextSet) -> str:
    targets = ",".join(map(str, texts.targets)).encode()
    return _digest([targets, *(key(text).encode("utf-8", "surrogatepass") for text in texts.texts)])


def _of_tokens(task: Task) -> str:
    parts = []
    for name in sorted(task.sets):
        for rows in task.hashed(name):
            lengths = ",".join(map(str, rows.lengths)).encode()
            parts += [name.encode(), lengths, rows.ids.cpu().numpy().astype("<i8").tobytes()]
    return _digest([*parts, json.dumps(getattr(task, "words", task.settings)).encode()])


def compare(there: Mapping[str, str], now: Mapping[str, str], options: Options) -> None:
    """Raises FinetuneError that names what is no longer what it was."""
    unlike = [what for name, what in _WHAT.items() if there.get(name) != now[name]]
    if unlike:
        raise FinetuneError(
            f"--resume: {'; '.join(unlike)} are not those that the run began with (--data {options.data!r}); bring those "
            "back, or begin a new run with another --output"
        )


def stored(options: Options) -> dict[str, Any]:
    """The options as options.json has them: local paths are absolute, so that --resume works from any directory."""
    return {name: normal(name, value) for name, value in options.as_json().items()}


def normal(name: str, value: Any) -> Any:
    """A value as it is stored and compared."""
    value = str(value) if isinstance(value, Path) else value
    if name in LOCAL and isinstance(value, str) and value not in (*MODELS, *TEXTS):
        with contextlib.suppress(OSError):  # longer than a path can be
            return str(Path(value).absolute()) if Path(value).exists() else value
    return value


def load(directory: Path, given: Mapping[str, Any] | None = None) -> Stored:
    """The run in a directory, to go on with it. given: options that the user has set beside --resume.

    Raises FinetuneError where the file is damaged, or where what is given differs; --steps may grow.
    """
    path = Path(directory) / "options.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object")
        if missing := [name for name in _ALWAYS if name not in values]:
            raise ValueError(f"it lacks {', '.join(map(repr, missing))}")
        run = values.pop(KEY, None)
        values.setdefault("packing", "never")  # as it was before there was a choice: the same bits
        options = Options(**values)
        _check_defaults(options)
        options.check_stored()
        found = Stored(dataclasses.replace(options, output=Path(directory), force=False), **_run(run))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise FinetuneError(f"--resume: {path} cannot be read ({why}); give the --output of a run") from error
    return _with(found, given or {})


def _check_defaults(options: Options) -> None:
    for field in dataclasses.fields(options):
        default = takers.default(field.name) if field.name in takers.TAKERS else field.default
        if default is not None and getattr(options, field.name) is None:
            raise ValueError(f"{flag(field.name)} is null")


def _run(run: Any) -> dict[str, Any]:
    if run is None:
        return {"hashes": None, "ends": []}
    found, ends, ranks = run["hashes"], run.get("ends", []), run.get("ranks", 1)
    if not isinstance(found, dict) or not all(isinstance(x, int) for x in (*ends, ranks)):
        raise ValueError(f"{KEY!r} in it is damaged")
    return {"hashes": found, "ends": ends, "ranks": ranks}


def _with(found: Stored, given: Mapping[str, Any]) -> Stored:
    options, unlike = found.options, []
    if given.get("force"):
        raise FinetuneError("--resume goes on with the run in --output, --force replaces it; give one of them")
    for name, value in given.items():
        there = normal(name, getattr(options, name, None))
        if there is None:
            there = _taken(name, options)
        if name not in ("output", "force", "steps") and normal(name, value) != there:
            unlike.append(f"{flag(name)} is {normal(name, value)!r} here and {there!r} there")
    if unlike:
        raise FinetuneError(
            f"--resume goes on with the options of the run in {options.output}: {'; '.join(unlike)}. Leave them out, or "
            "begin a new run with another --output; only --steps may grow"
        )
    steps = given.get("steps", options.steps)
    if steps < options.steps:
        raise FinetuneError(f"--resume: --steps is {steps}; allowed: at least {options.steps}, which the run there has")
    if steps > options.steps:
        ends = [*found.ends, options.steps]
        return dataclasses.replace(found, options=dataclasses.replace(options, steps=steps), ends=ends, grown=True)
    return found


def _taken(name: str, options: Options) -> Any:
    """What a run takes for an option that was not given; None where that is not known before its model is loaded."""
    if name == "metric":
        return "token_f1" if preset.applied(options).answer is not None else "accuracy"
    if name.startswith(adapters.PREFIX) and options.adapter is not None:
        return adapters.settings(options).get(name.removeprefix(adapters.PREFIX))
    if name in takers.CHOSEN and not adapter_files.is_directory(options.model):
        return adapters.chosen(name, options)
    return None


def file(found: Stored) -> dict[str, Any]:
    """The content of options.json."""
    ranks = {"ranks": found.ranks} if found.ranks > 1 else {}
    return {**stored(found.options), KEY: {"hashes": found.hashes, "ends": found.ends, **ranks}}
