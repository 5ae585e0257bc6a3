"""Does a journal fit the weights that it is to be replayed on? All of it is read before one of them is changed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from zokern.hashing import hash_of
from zokern.journal.format import JournalError
from zokern.journal.player import Player
from zokern.journal.reader import Reader, Step
from zokern.parts import is_dtensor

_COPY = "take another copy"
_SHORT = "until is {until}, and the journal ends after {done} steps{why}"


def check(path: Path, params: Mapping[str, Tensor], until: int | None = None, short: str = _SHORT) -> Reader:
    """Reads the whole journal, so that what is wrong with it is known before anything is changed; returns its reader.

    short: what is said of a journal that ends before `until`.

    Raises:
        JournalError: if it is damaged or malformed, or does not fit the parameters; with `until`, in the steps before that.
    """
    reader = Reader(path)
    if until is not None and until < reader.done:
        raise JournalError(f"{reader.path}: until is {until}, and the journal starts at step {reader.done}")
    player = Player(reader, params, lambda p, name: p)
    for step in _readable(reader, until):
        if until is None or step.number < until:
            _check_step(player, step)
    if until is not None and until > reader.done:
        why = f"; {reader.explain()}" if reader.torn else ""
        raise JournalError(f"{reader.path}: {short.format(until=until, done=reader.done, why=why)}")
    return reader


def _readable(reader: Reader, until: int | None) -> Iterator[Step]:
    """Its steps; what follows after `until` of them may be damaged."""
    steps = reader.steps()
    while True:
        try:
            step = next(steps)
        except StopIteration:
            return
        except JournalError:
            if until is None or reader.done < until:
                raise
            return
        yield step


def _check_step(player: Player, step: Step) -> None:
    _, _, rows = player.active(step)
    where, signature = f"{player.reader.path}: step {step.number}", step.signature
    for one in signature["passes"]:
        if one["rows"] != rows:
            raise JournalError(f"{where} has numbers for {one['rows']} rows, and its parameters have {rows}; {_COPY}")
        if any(age > step.number for age, _ in one["seeds"]):
            raise JournalError(f"{where} has a direction from before the run; {_COPY}")
    if step.layout is not player.checked:
        groups = max((group for *_, group, _, _ in step.layout["params"]), default=-1) + 1
        if groups > signature["groups"]:
            raise JournalError(f"{where} has {signature['groups']} groups, and its parameters are of {groups}; {_COPY}")
        player.checked = step.layout


def check_marks(reader: Reader) -> None:
    """Raises JournalError where a hash is of another number of steps than the journal has there."""
    for mark in reader.marks:
        if mark.step != mark.done:
            raise JournalError(
                f"{reader.path}: a hash in it is of the weights after {mark.step} steps, where it has {mark.done}: the "
                "optimizer's steps were set while it was written (load_state_dict), so the run cannot be made again"
            )


def is_base(reader: Reader, params: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights that the run started from. Those of groups that came later are not in its hash; those
    that were frozen when the journal began are, and the first step may have them."""
    beginning = Reader(reader.path)
    next(beginning.steps(), None)
    return _has_hash(params, reader.header["base"], dict.fromkeys((beginning.first, beginning.names)), params)


def has_hash(params: Mapping[str, Tensor], wanted: str, here: Reader, whole: Reader) -> bool:
    """Whether a hash in the journal is of these weights. Those of groups that came after it are not in it: then it is of
    those that the run had there. here: read up to there; whole: to the end, which has to tell of all others."""
    return _has_hash(params, wanted, [here.names or whole.first], whole.names)


def _has_hash(
    params: Mapping[str, Tensor], wanted: str, parts: Iterable[Collection[str]], known: Collection[str]
) -> bool:
    """Of all, or of a part where all others are known."""
    tried: list[Collection[str]] = [params]
    if all(name in known for name in params):
        own = ([name for name in part if name in params] for part in parts)
        tried += [part for part in own if 0 < len(part) < len(params)]
    found = (hash_of((name, params[name]) for name in part) for part in tried)
    # The ranks gather shards together: none stops at the first hash that fits, which another's may not.
    return wanted in (list(found) if any(map(is_dtensor, params.values())) else found)
