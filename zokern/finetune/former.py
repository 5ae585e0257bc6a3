"""What an earlier run left in an output directory: whether it is a run's, whether it is worth anything, and how it stays
until a new run has taken its place.

A new run moves the earlier results into `earlier-run-N` in the same directory, and removes that when its own are complete.
A file in it, `made-by-zokern`, says how far the move has come, so that what was killed in between is put right.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zokern.finetune import locking
from zokern.finetune.options import FinetuneError
from zokern.finetune.replacing import MARKER, PREFIX, foreign, remove_model, sweep
from zokern.journal import JournalError, Reader
from zokern.journal.format import BROKEN_OFF

NAMES = ("checkpoint", "metrics.jsonl", "curves.png", "run.json", "options.json", "journal.zkj")
ASIDE = "earlier-run-"
_MOVING, _WHOLE, _GOING = "on the move", "earlier results", "no longer needed"


def check(directory: Path, force: bool) -> None:
    """Raises FinetuneError where a new run in `directory` would touch what no run wrote, or where --force is missing."""
    if not directory.is_dir():
        return
    entries = {path.name for path in directory.iterdir()} - {locking.NAME}
    entries = {name for name in entries if not name.startswith(PREFIX)}
    where = f"--output {str(directory)!r}"
    refuse_strangers(directory)
    mine = {name for name in entries if name in NAMES or _is_aside(directory / name)}
    worthless = not any(_is_aside(directory / name) for name in mine) and not valuable(directory)
    if (entries - mine or not worthless) and not force:
        raise FinetuneError(
            f"{where} is not empty; give another directory, or --force to replace an earlier run there"
            + ("" if not (directory / "options.json").is_file() else ", or --resume to go on with it")
        )


def refuse_strangers(directory: Path) -> None:
    """Raises FinetuneError where something in `directory` has the name of a run's file and is none."""
    present = [name for name in NAMES if os.path.lexists(directory / name)]
    known = any(_recognised(directory / name) for name in ("journal.zkj", "options.json", "run.json"))
    for name in present:
        path = directory / name
        strange = "is a symbolic link" if path.is_symlink() else None
        if strange is None and name == "checkpoint":
            strange = _strange_checkpoint(path)
        elif strange is None and not path.is_file():
            strange = "is not a file"
        elif strange is None and not known and not _recognised(path):
            strange = "was not written by a run of zokern"
        if strange is not None:
            raise FinetuneError(
                f"--output {str(directory)!r}: {name} there {strange}; move it away, or give another directory"
            )


def _strange_checkpoint(path: Path) -> str | None:
    if not path.is_dir():
        return "is not a directory"
    return f"is no model that a run wrote ({found})" if (found := foreign(path)) is not None else None


def _recognised(path: Path) -> bool:
    """Whether a file's content is that of a run's file of this name. An empty one is nobody's loss."""
    if not path.is_file() or path.is_symlink():
        return False
    if path.stat().st_size == 0:
        return True
    with path.open("rb") as file:
        head = file.read(8)
    if path.name == "journal.zkj":
        return head.startswith(b"zkjrnl")
    if path.name == "curves.png":
        return head == b"\x89PNG\r\n\x1a\n"
    keys = {"metrics.jsonl": {"kind", "step"}, "run.json": {"options", "summary"}, "options.json": {"model", "steps"}}
    with contextlib.suppress(ValueError, RecursionError), path.open(encoding="utf-8") as file:
        value: Any = json.loads(file.readline() if path.name == "metrics.jsonl" else file.read())
        return isinstance(value, dict) and keys[path.name] <= set(value)
    return False


def valuable(directory: Path) -> bool:
    """Whether a run in `directory` has done a step or saved a result. What cannot be read is taken for valuable."""
    if any((directory / name).exists() for name in ("checkpoint", "run.json", "curves.png")):
        return True
    metrics = directory / "metrics.jsonl"
    if metrics.is_file() and b'"train"' in metrics.read_bytes():
        return True
    journal = directory / "journal.zkj"
    if not journal.is_file() or journal.stat().st_size == 0:
        return False
    try:
        return any(not step.flags & BROKEN_OFF for step in Reader(journal).steps())
    except JournalError:
        return True


def remove(directory: Path) -> None:
    """Removes a run's files, which `refuse_strangers` has looked at."""
    for name in NAMES:
        path = directory / name
        if name == "checkpoint" and path.is_dir() and not path.is_symlink():
            remove_model(path)
        elif name != "checkpoint":
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------- aside


def _is_aside(path: Path) -> bool:
    return path.name.startswith(ASIDE) and (path / MARKER).is_file() and not path.is_symlink()


def asides(directory: Path) -> list[Path]:
    """The directories with earlier results, the latest last."""
    found = [path for path in directory.glob(f"{ASIDE}*") if _is_aside(path) and path.name[len(ASIDE) :].isdigit()]
    return sorted(found, key=lambda path: int(path.name[len(ASIDE) :]))


def put_aside(directory: Path) -> Path | None:
    """Moves the results in `directory` into a directory of their own there; None where there are none."""
    present = [name for name in NAMES if (directory / name).exists()]
    if not present:
        return None
    number = max((int(p.name[len(ASIDE) :]) for p in asides(directory)), default=0) + 1
    while True:
        place = directory / f"{ASIDE}{number}"
        with contextlib.suppress(FileExistsError):
            place.mkdir()
            break
        number += 1
    (place / MARKER).write_text(_MOVING)
    for name in present:
        os.rename(directory / name, place / name)
    (place / MARKER).write_text(_WHOLE)
    return place


def put_back(place: Path) -> None:
    """Earlier results return to where they were. Nothing of a run may be there but what belongs to them."""
    with contextlib.suppress(OSError):  # a full disk leaves an empty marker, which says the same
        (place / MARKER).write_text(_MOVING)
    for name in NAMES:
        if os.path.lexists(place / name) and not os.path.lexists(place.parent / name):
            os.rename(place / name, place.parent / name)
    _remove_empty(place)


def discard(place: Path) -> bool:
    """Removes earlier results for good; what else is in their directory stays, and False says so."""
    with contextlib.suppress(OSError):  # a disk may be full, and removing helps
        (place / MARKER).write_text(_GOING)
    remove(place)
    return _remove_empty(place)


def _remove_empty(place: Path) -> bool:
    if {path.name for path in place.iterdir()} - {MARKER}:
        return False
    (place / MARKER).unlink(missing_ok=True)
    place.rmdir()
    return True


def settle(directory: Path, say: Callable[[str], None]) -> None:
    """Puts right what a killed run left, for a process that holds the lock of `directory`."""
    for stayed in sweep(directory, alone=True):
        say(f"{stayed} holds a result that was being replaced; it stays")
    for place in directory.glob(f"{ASIDE}*"):
        if place.name[len(ASIDE) :].isdigit() and not place.is_symlink():
            with contextlib.suppress(OSError):
                place.rmdir()  # killed before it was marked; one with anything in it stays
    for place in reversed(asides(directory)):
        state = (place / MARKER).read_text()
        if state == _GOING:
            discard(place)
        elif state != _WHOLE:
            put_back(place)
        elif not valuable(directory):
            remove(directory)
            put_back(place)
            say(f"the run that was to replace it had done no step: the earlier run is back in {directory}")
        else:
            say(f"the results of an earlier run are in {place} until a run here is complete")
