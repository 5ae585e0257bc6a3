"""Reads a journal. It ends in one of four states, which all who read one share:

whole        every byte is of a good record, and the last mark is of the last step
unverified   every byte is of a good record, but no mark tells what the weights are after the last step: the writer was
             killed, or a copy ends where a record does
torn         bytes follow that are no record, and no good record comes after them: cut off, zeros or garbage of a crash;
             or the last record was changed, which cannot be told from these
damaged      bytes that are no record, and good records after them; or a record that says what none can say
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from zokern.journal import checks
from zokern.journal.format import (
    BROKEN_OFF,
    FOLD,
    FOLDS,
    LAYOUT,
    MARK,
    MAX_JSON,
    MAX_NUMBERS,
    MAX_RECORD,
    MAX_SIGNATURES,
    PREFIX,
    RESERVED,
    SIGNATURE,
    STEP,
    VERSION,
    Frame,
    JournalError,
    checksum,
    decode_step,
    read_varint,
)
from zokern.journal.search import SEARCHED, begins_good, good_record

WHOLE, UNVERIFIED, TORN, DAMAGED = "whole", "unverified", "torn", "damaged"
_COPY, _NEWER = "take another copy of it", "install a newer zokern"


@dataclass
class Step:
    """A step as it was: the layout and the signature in force, and its frame. fold: it is none, but a fold after the step
    of this number."""

    number: int
    flags: int
    layout: dict[str, Any]
    signature: dict[str, Any]
    frame: Frame
    fold: bool = False


class Mark(NamedTuple):
    """step, hash: as the record has them. done: steps that the journal has there. broken_off: whether a step that was
    broken off stands between. folded: whether a fold does. end, crc: where the record ends, and its checksum. records: of
    steps, before it. whole: the hash of the weights with what waits, "" where nothing does."""

    step: int
    hash: str
    done: int
    broken_off: bool
    end: int
    crc: int
    records: int
    folded: bool = False
    whole: str = ""


@dataclass
class Reader:
    """Reads a journal from its beginning, one record at a time; the header at once.

    After the last step, `state` is one of the four above, `end` is where the last good record ends, `crc` its checksum,
    `size` the file's, `done` the number of steps, `records` also counts those that were broken off, and folds. `first`:
    the names of the parameters that were trained in the beginning; `names`: of all that have been up to here.
    """

    path: Path
    header: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION
    size: int = 0
    end: int = 0
    crc: int = 0
    state: str = UNVERIFIED
    done: int = 0
    records: int = 0
    layout: dict[str, Any] = field(default_factory=dict)
    first: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    marks: list[Mark] = field(default_factory=list)
    signatures: list[dict[str, Any]] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.path = Path(self.path)
        try:
            with self.path.open("rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                self._read_header(file)
        except OSError as error:
            raise JournalError(f"{self.path}: cannot be read ({error.strerror})") from error
        self.done = self.header["first_step"]

    @property
    def torn(self) -> bool:
        return self.state == TORN

    def explain(self) -> str:
        """The state, in a sentence; empty for a whole journal."""
        after = f"after step {self.done}"
        return {
            WHOLE: "",
            UNVERIFIED: f"it has no hash of the weights {after}: its writer was stopped there, or the copy is incomplete",
            TORN: f"{self.size - self.end} bytes {after} are no record: cut off or changed at its end",
            DAMAGED: f"it is damaged at byte {self.end}, {after}",
        }[self.state]

    def _fail(self, what: str, remedy: str = _COPY) -> JournalError:
        self.state = DAMAGED
        return JournalError(f"{self.path}: {what}; {remedy}")

    def _read_header(self, file: BinaryIO) -> None:
        place = len(PREFIX) + 1
        start = file.read(place + 4)
        if start[: len(PREFIX)] != PREFIX or len(start) < place + 4:
            raise self._fail(
                "not a zokern journal, or its header was cut off", "give the file that the optimizer wrote"
            )
        self.version = start[place - 1]
        if not 1 <= self.version <= VERSION:
            raise self._fail(f"format version {self.version}, this zokern reads 1 to {VERSION}", _NEWER)
        (length,) = struct.unpack("<I", start[place:])
        if length > min(MAX_JSON, self.size):
            raise self._fail(f"its header claims {length} bytes, and the file has {self.size}")
        text, check = file.read(length), file.read(4)
        self.crc = zlib.crc32(start + text)
        if len(check) < 4 or struct.unpack("<I", check)[0] != self.crc:
            raise self._fail("its header is damaged (wrong checksum)")
        self.header = self._json(text, "header", 0)
        try:
            checks.header(self.header)
        except ValueError as error:
            raise self._fail(f"its header cannot be right: {error}", _remedy(error)) from error
        self.end = file.tell()

    def _json(self, text: bytes, what: str, at: int) -> dict[str, Any]:
        if len(text) > MAX_JSON:
            raise self._fail(f"the {what} at byte {at} has {len(text)} bytes, more than {MAX_JSON}")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._fail(f"the {what} at byte {at} is no JSON") from error
        if not isinstance(value, dict):
            raise self._fail(f"the {what} at byte {at} is no JSON object")
        return value

    def steps(self, end: int | None = None) -> Iterator[Step]:
        """Every step in order. A torn end only sets `state`. end: what the file has from this byte on is not read.

        Raises:
            JournalError: where it is damaged.
        """
        broken = folded = False
        try:
            with self.path.open("rb") as file:
                file.seek(self.end)
                while (end is None or self.end < end) and (body := self._next(file)) is not None:
                    at, kind = self.end, body[0] & 15
                    self.end, self.state = file.tell(), UNVERIFIED
                    step = None
                    try:
                        if kind in (STEP, FOLD):
                            step = self._step(body, fold=kind == FOLD)
                        else:
                            self._describe(body, at, broken, folded)
                    except (ValueError, IndexError) as error:
                        if isinstance(error, JournalError):
                            raise
                        self.end = at
                        what = f"the record at byte {at}, after step {self.done}, is malformed: {error}"
                        raise self._fail(what, _remedy(error)) from error
                    if step is not None:
                        broken, folded = bool(step.flags & BROKEN_OFF), step.fold
                        self.done += not broken and not step.fold
                        self.records += 1
                        yield step
        except OSError as error:
            raise JournalError(f"{self.path}: cannot be read ({error.strerror})") from error

    def _step(self, body: bytes, *, fold: bool) -> Step:
        signature, flags, frame = decode_step(body, self.frames)
        if fold and (flags or self.done == 0 or FOLDS not in self.header.get("features", [])):
            raise ValueError(
                "it is a fold, with flags, before the first step, or in a journal without the feature 'fold'"
            )
        if not self.layout:
            raise ValueError("no layout says of which parameters the step is")
        self.frames[signature] = frame
        return Step(self.done - fold, flags, self.layout, self.signatures[signature], frame, fold)

    def _describe(self, body: bytes, at: int, broken: bool, folded: bool) -> None:
        """What a record says that is not of a step."""
        kind = body[0]  # these have no flags
        if kind == LAYOUT:
            layout = self._json(body[1:], "layout", at)
            checks.layout(layout)
            names = frozenset(name for _, name, *_ in layout["params"])
            self.layout, self.first, self.names = layout, self.first or names, self.names | names
        elif kind == SIGNATURE:
            signature = self._json(body[1:], "signature", at)
            numbers = checks.signature(signature, self.header["states"], FOLDS in self.header.get("features", []))
            if len(self.signatures) == MAX_SIGNATURES or sum(map(len, self.frames)) + numbers > MAX_NUMBERS:
                raise ValueError(
                    f"its signatures are more than {MAX_SIGNATURES}, or have more than {MAX_NUMBERS} numbers"
                )
            self.signatures.append(signature)
            self.frames.append(np.zeros(numbers, np.float32))
        elif kind == MARK:
            value = self._json(body[1:], "mark", at)
            checks.mark(value)
            here = self.done, broken, self.end, self.crc, self.records, folded, value.get("folded", "")
            self.marks.append(Mark(value["step"], value["hash"], *here))
            self.state = WHOLE if value["step"] == self.done else UNVERIFIED
        else:
            name = RESERVED.get(kind, "unknown")
            raise self._fail(f"the record at byte {at} is of kind {kind} ({name})", _NEWER)

    def _next(self, file: BinaryIO) -> bytes | None:
        """The next record's body; None at the end, or where what follows is torn."""
        head = file.read(5)
        if not head:
            return None
        try:
            length, used = read_varint(head, 0)
        except (IndexError, ValueError):
            self._tail(file)
            return None
        if not 1 <= length <= MAX_RECORD:
            self._tail(file)
            return None
        file.seek(self.end + used)
        data = file.read(length + 4)
        if len(data) < length + 4:
            self._tail(file)
            return None
        crc = checksum(self.version, head[:used], data[:length], self.crc)
        if struct.unpack("<I", data[length:])[0] != crc:
            self._tail(file, used + length + 4, crc)
            return None
        self.crc = crc
        return data[:length]

    def _tail(self, file: BinaryIO, size: int = 0, crc: int = 0) -> None:
        """What follows is no record. Torn, unless a good record follows it. size, crc: where it is one but for its
        checksum, the next one may go on from that."""
        file.seek(self.end - 4)
        data = file.read(SEARCHED)
        after = struct.pack("<I", crc) + data[4 + size :]
        if good_record(self.version, data) is not None or (size and begins_good(self.version, after)):
            raise self._fail(
                f"it is damaged at byte {self.end}, after step {self.done}: good records follow what is none there",
                "take another copy, or replay only the steps before it with --until",
            )
        self.state = TORN


def _remedy(error: Exception) -> str:
    return _NEWER if isinstance(error, checks.NewerError) else _COPY
