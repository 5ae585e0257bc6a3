"""The journal's file: a header and one small record for each step, with lengths and checksums. No pickle.

    magic    8 bytes  "zkjrnl" 0x00 0x01 (the format's version)
    header   u32 length, JSON in UTF-8
    crc      u32, CRC-32 of all that precedes it
    record   varint length of the body, body, u32 CRC-32 of the body started from the previous checksum

All integers are little-endian. Since every checksum starts from the one before, a record cannot be left out, changed or
moved without being noticed. The body's first byte is its kind (the low four bits) and flags (the high four):

    1  layout      JSON: an object that describes the parameters, from here on
    2  signature   JSON: the passes of a step, numbered from 0 in the order of these records
    3  step        varint number of a signature; a mask, one bit for each number of that signature's frame, lowest first;
                   a float32 for each bit that is set: those numbers that differ from the signature's last frame

    4  mark        JSON: {"step": steps done, "hash": of the weights}, for --verify

A frame is all the numbers of a step: for each pass that wrote to the weights its coefficients [rows, coefs, seeds] and its
scalars [rows, scalars] as the pass read them, then what the method remembers of the step (float64, as two halves each),
then each parameter group's lr, then the loss. Flags of a step: 1 skipped, 2 broken off by an exception (what its passes
did was undone, but for rounding).
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

MAGIC = b"zkjrnl\x00\x01"
LAYOUT, SIGNATURE, STEP, MARK = 1, 2, 3, 4
SKIPPED, BROKEN_OFF = 1, 2
MAX_HEADER, MAX_RECORD, MAX_SIGNATURES, MAX_NUMBERS = 1 << 26, 1 << 24, 1 << 16, 1 << 24
Frame = npt.NDArray[np.float32]


class JournalError(ValueError):
    """A journal that is damaged or does not fit; the message names the file, the place and the remedy."""


def varint(n: int) -> bytes:
    """Seven bits a byte, lowest first; the high bit says that more follow."""
    out = bytearray()
    while n >= 0x80:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    out.append(n)
    return bytes(out)


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, and where it ends. Raises IndexError at the end of data, ValueError beyond 32 bits."""
    n = shift = 0
    while True:
        byte = data[at]
        at += 1
        n |= (byte & 0x7F) << shift
        if byte < 0x80:
            return n, at
        shift += 7
        if shift > 28:
            raise ValueError("a number of more than 32 bits")


def encode_step(signature: int, flags: int, frame: Frame, last: Frame) -> bytes:
    """The body of a step's record. Numbers are compared as bits, so that NaN and -0.0 come back as they were."""
    changed = frame.view(np.uint32) != last.view(np.uint32)
    mask: bytes = np.packbits(changed, bitorder="little").tobytes()
    values: bytes = frame[changed].astype("<f4").tobytes()
    return bytes([STEP | flags << 4]) + varint(signature) + mask + values


def decode_step(body: bytes, frames: list[Frame]) -> tuple[int, int, Frame]:
    """Signature, flags and frame of a step's body; `frames` has each signature's last frame."""
    signature, at = read_varint(body, 1)
    if signature >= len(frames):
        raise ValueError(f"it refers to signature {signature}, and there are {len(frames)}")
    last = frames[signature]
    size = -(-len(last) // 8)
    bits = np.unpackbits(np.frombuffer(body[at : at + size], np.uint8), bitorder="little")
    changed = bits[: len(last)].astype(bool)
    values = np.frombuffer(body[at + size :], "<f4")
    if len(bits) != 8 * size or bits[len(last) :].any() or len(values) != changed.sum():
        raise ValueError("its length does not fit its mask")
    frame = last.copy()
    frame[changed] = values
    return signature, body[0] >> 4, frame


class Writer:
    """Appends records to an open file; `crc` is the last checksum there."""

    def __init__(self, file: BinaryIO, crc: int) -> None:
        self.file, self.crc = file, crc

    def append(self, body: bytes) -> None:
        """One write, handed to the operating system at once: a process that is killed loses nothing that was written."""
        self.crc = zlib.crc32(body, self.crc)
        self.file.write(varint(len(body)) + body + struct.pack("<I", self.crc))
        self.file.flush()

    def append_json(self, kind: int, value: object) -> None:
        self.append(bytes([kind]) + json.dumps(value, separators=(",", ":")).encode())


def start(file: BinaryIO, header: dict[str, Any]) -> Writer:
    """Writes magic, header and checksum."""
    text = json.dumps(header, separators=(",", ":")).encode()
    data = MAGIC + struct.pack("<I", len(text)) + text
    crc = zlib.crc32(data)
    file.write(data + struct.pack("<I", crc))
    file.flush()
    return Writer(file, crc)


@dataclass
class Step:
    """A step as it was: the layout and the signature in force, and its frame."""

    number: int
    flags: int
    layout: dict[str, Any]
    signature: dict[str, Any]
    frame: Frame


@dataclass
class Reader:
    """Reads a journal from its beginning, one record at a time.

    After the last step, `end` is where the last good record ends, `crc` its checksum, and `torn` whether the file holds
    a piece of a further record, as a process leaves it that is killed while it writes.
    """

    path: Path
    header: dict[str, Any] = field(default_factory=dict)
    end: int = 0
    crc: int = 0
    torn: bool = False
    layout: dict[str, Any] = field(default_factory=dict)
    marks: list[dict[str, Any]] = field(default_factory=list)
    signatures: list[dict[str, Any]] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.path = Path(self.path)
        try:
            size = self.path.stat().st_size
            with self.path.open("rb") as file:
                self._read_header(file, size)
        except OSError as error:
            raise JournalError(f"{self.path}: cannot be read ({error.strerror})") from error

    def _fail(self, what: str, remedy: str = "take another copy of it") -> JournalError:
        return JournalError(f"{self.path}: {what}; {remedy}")

    def _read_header(self, file: BinaryIO, size: int) -> None:
        start = file.read(len(MAGIC) + 4)
        if start[:6] != MAGIC[:6] or len(start) < len(MAGIC) + 4:
            raise self._fail("not a zokern journal", "give the file that the optimizer wrote")
        if start[: len(MAGIC)] != MAGIC:
            raise self._fail(f"format version {start[7]}, and this zokern reads 1", "install a newer zokern")
        (length,) = struct.unpack("<I", start[len(MAGIC) :])
        if length > min(MAX_HEADER, size):
            raise self._fail(f"its header claims {length} bytes, and the file has {size}")
        text, check = file.read(length), file.read(4)
        self.crc = zlib.crc32(start + text)
        if len(check) < 4 or struct.unpack("<I", check)[0] != self.crc:
            raise self._fail("its header is damaged (wrong checksum)")
        self.header = self._json(text, "header", 0)
        self.end = file.tell()

    def _json(self, text: bytes, what: str, at: int) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._fail(f"the {what} at byte {at} is no JSON") from error
        if not isinstance(value, dict):
            raise self._fail(f"the {what} at byte {at} is no JSON object")
        return value

    def steps(self) -> Iterator[Step]:
        """Every step in order. Raises JournalError at a damaged record; a torn last one only sets `torn`."""
        number = int(self.header.get("first_step", 0))
        with self.path.open("rb") as file:
            file.seek(self.end)
            while (body := self._next(file)) is not None:
                at, kind = self.end, body[0] & 15
                self.end = file.tell()
                if kind == LAYOUT:
                    self.layout = self._json(body[1:], "layout", at)
                elif kind == SIGNATURE:
                    self._add_signature(body, at)
                elif kind == MARK:
                    self.marks.append(self._json(body[1:], "mark", at))
                elif kind == STEP:
                    try:
                        signature, flags, frame = decode_step(body, self.frames)
                    except (ValueError, IndexError) as error:
                        raise self._fail(f"the record of step {number} at byte {at} is malformed ({error})") from error
                    self.frames[signature] = frame
                    yield Step(number, flags, self.layout, self.signatures[signature], frame)
                    number += not flags & BROKEN_OFF
                else:
                    raise self._fail(f"the record at byte {at} is of the unknown kind {kind}", "install a newer zokern")

    def _add_signature(self, body: bytes, at: int) -> None:
        signature = self._json(body[1:], "signature", at)
        numbers = signature.get("numbers")
        if not isinstance(numbers, int) or not 0 <= numbers <= MAX_RECORD // 4:
            raise self._fail(f"the signature at byte {at} has no sensible count of numbers")
        if len(self.signatures) == MAX_SIGNATURES or sum(map(len, self.frames)) + numbers > MAX_NUMBERS:
            raise self._fail(f"its signatures are more than {MAX_SIGNATURES}, or have more than {MAX_NUMBERS} numbers")
        self.signatures.append(signature)
        self.frames.append(np.zeros(numbers, np.float32))

    def _next(self, file: BinaryIO) -> bytes | None:
        """The next record's body; None at the end, or where the file ends in the middle of a record."""
        head = file.read(5)
        if not head:
            return None
        try:
            length, used = read_varint(head, 0)
        except IndexError:
            self.torn = True
            return None
        except ValueError as error:
            raise self._fail(f"the record at byte {self.end} has a length of {error}") from error
        if not 1 <= length <= MAX_RECORD:
            raise self._fail(f"the record at byte {self.end} claims {length} bytes")
        file.seek(used - len(head), 1)
        data = file.read(length + 4)
        if len(data) < length + 4:
            self.torn = True
            return None
        crc = zlib.crc32(data[:length], self.crc)
        if struct.unpack("<I", data[length:])[0] != crc:
            raise self._fail(
                f"the record at byte {self.end} is damaged (wrong checksum)",
                "take another copy, or replay only the steps before it with --until",
            )
        self.crc = crc
        return data[:length]
