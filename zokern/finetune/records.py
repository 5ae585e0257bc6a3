"""The lines of metrics.jsonl, and which of them a run that goes on keeps: those that it would have without the break."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zokern.finetune.options import Options

Record = dict[str, Any]
_NEEDED = {"train": {"loss", "skipped"}, "eval": {"loss"}}
_START = b'{"kind": "'
_ALWAYS = {"kind", "step", "seconds", "forwards", "lr", "eps"}


def line(record: Record) -> str:
    """A record as it is written. A value that is not finite becomes null: JSON has no NaN."""
    return json.dumps(plain(record), allow_nan=False) + "\n"


def plain(record: Record) -> Record:
    """A record as a reader of the file has it."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def read(path: Path) -> tuple[list[Record], str | None]:
    """The records of a file up to the first line that is none, and what is wrong with that; None where nothing is.

    A last line without its end is what a killed process leaves: it is dropped, and nothing is wrong.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return [], "it is missing"
    found: list[Record] = []
    *lines, rest = text.split(b"\n")
    for number, one in enumerate(lines, 1):
        record = _parsed(one)
        if record is None:
            return found, f"line {number} is damaged"
        found.append(record)
    if rest and (last := _parsed(rest)) is not None:
        found.append(last)
    elif rest[: len(_START)] != _START[: len(rest)]:
        return found, f"line {len(lines) + 1} is damaged"
    return found, None


def _parsed(text: bytes) -> Record | None:
    try:
        record = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("kind") not in _NEEDED:
        return None
    named = _ALWAYS | _NEEDED[record["kind"]]
    if record["kind"] == "eval":
        named = named | {"score" if isinstance(record.get("metric"), str) else "accuracy"}
    if not named <= set(record) or not all(_number(record[name], name) for name in named - {"kind"}):
        return None
    return record


def _number(value: Any, name: str) -> bool:
    if name in ("step", "forwards", "skipped"):
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if value is None:
        return name in ("loss", "lr", "eps")
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def scored(metric: str, value: float) -> Record:
    """The part of an evaluation's record with its metric: accuracy under its own name, others as "metric" and "score"."""
    return {"accuracy": value} if metric == "accuracy" else {"metric": metric, "score": value}


def score(record: Record) -> float:
    """The metric in an evaluation's record."""
    return float(record["score"] if "metric" in record else record["accuracy"])


def kept(records: Sequence[Record], options: Options, done: int, ends: Sequence[int]) -> list[Record]:
    """Those of a run's records that it has after `done` steps if nothing breaks in. ends: numbers of steps it once had."""
    found: dict[tuple[str, int], Record] = {}
    for record in records:
        kind, step = record["kind"], record["step"]
        if step <= done and (step in ends or planned(kind, step, options)):
            found.setdefault((kind, step), record)
    return list(found.values())


def planned(kind: str, step: int, options: Options) -> bool:
    """Whether a run that nothing breaks into has a record of this kind after this step."""
    if step == options.steps:
        return True
    if kind == "train":
        return step > 0 and step % options.log_every == 0
    return step == 0 or (options.eval_every > 0 and step % options.eval_every == 0)
