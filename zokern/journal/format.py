"""The journal's file: a header and one small record for each step, with lengths and checksums. No pickle.

    magic    8 bytes  "zkjrnl" 0x00, then the format's version, 0x02
    header   u32 length, JSON in UTF-8
    crc      u32, CRC-32 of all that precedes
    record   varint length of the body, body, u32 CRC-32 of both, started from the previous checksum

All integers are little-endian. Since every checksum starts from the one before, a record cannot be left out, changed or
moved without being noticed; and since the one before stands in the file too, good records are found again after bad ones
(search.py). In format 1 the checksum of a record is of its body alone; it is read, and a run taken up from one goes on so.

The header's "features" are names of what a reader has to know beside this page, and a reader refuses those that it does not
know: "lowrank", the directions of that name; "fold", updates that wait. The body's first byte is its kind (the low four
bits) and flags (the high four):

    1  layout      JSON: an object that describes the parameters, from here on
    2  signature   JSON: the passes of a step, numbered from 0 in the order of these records
    3  step        varint number of a signature; a mask, one bit for each number of that signature's frame, lowest first;
                   a float32 for each bit that is set: those numbers that differ from the signature's last frame

    4  mark        JSON: {"step": steps done, "hash": of the weights}, for --verify; where updates wait, "folded": the hash
                   with them
    5  fold        as a step: its pass adds all that waits to the weights, between steps; directions and rounding are
                   counted from the last step
    6  ranks       reserved: the processes that evaluate a step's probes
    7  lag         reserved: how many steps a record comes after its step
    8  sampling    reserved: generators of a reward's samples

A frame is all the numbers of a step: for each pass that wrote to the weights its coefficients [rows, coefs, seeds] and its
scalars [rows, scalars] as the pass read them, then what the method remembers of the step (float64, as two halves each),
then each parameter group's lr, then the loss. A pass that is "deferred" in the signature was not done: the update waits,
and is among the directions of the next pass that is done, or of a fold. Flags of a step: 1 skipped, 2 broken off by an
exception (what its passes did was undone, but for rounding).
"""

from __future__ import annotations

import json
import os
import struct
import time
import zlib
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

PREFIX = b"zkjrnl\x00"
VERSION = 2
LAYOUT, SIGNATURE, STEP, MARK, FOLD = 1, 2, 3, 4, 5
RESERVED = {6: "ranks", 7: "lag", 8: "sampling"}
LOW_RANK, FOLDS = "lowrank", "fold"
FEATURES = frozenset({LOW_RANK, FOLDS})  # that this reader knows
SKIPPED, BROKEN_OFF = 1, 2
MAX_RECORD, MAX_JSON, MAX_SIGNATURES, MAX_NUMBERS = 1 << 24, 1 << 23, 1 << 16, 1 << 24
SYNC_SECONDS = 10.0
Frame = npt.NDArray[np.float32]


class JournalError(ValueError):
    """A journal that is damaged or does not fit; the message names the file, the place and the remedy."""


def magic(version: int) -> bytes:
    return PREFIX + bytes([version])


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
        if at >= len(data):
            raise IndexError("it ends within a number")
        byte = data[at]
        at += 1
        n |= (byte & 0x7F) << shift
        if byte < 0x80:
            return n, at
        shift += 7
        if shift > 28:
            raise ValueError("a number of more than 32 bits")


def checksum(version: int, head: bytes, body: bytes, previous: int) -> int:
    """Of a record: head is its length as it stands there."""
    return zlib.crc32(body, zlib.crc32(head, previous) if version > 1 else previous)


def encode_step(signature: int, flags: int, frame: Frame, last: Frame, kind: int = STEP) -> bytes:
    """The body of a step's record, or a fold's. Compared as bits, NaN and -0.0 come back as they were."""
    changed = frame.view(np.uint32) != last.view(np.uint32)
    mask: bytes = np.packbits(changed, bitorder="little").tobytes()
    values: bytes = frame[changed].astype("<f4").tobytes()
    return bytes([kind | flags << 4]) + varint(signature) + mask + values


def decode_step(body: bytes, frames: list[Frame]) -> tuple[int, int, Frame]:
    """Signature, flags and frame of a step's body; `frames` has each signature's last frame."""
    signature, at = read_varint(body, 1)
    if signature >= len(frames):
        raise ValueError(f"it refers to signature {signature}, and there are {len(frames)}")
    if body[0] >> 4 not in (0, SKIPPED, BROKEN_OFF):
        raise ValueError(f"its flags are {body[0] >> 4}")
    last = frames[signature]
    size = -(-len(last) // 8)
    bits = np.unpackbits(np.frombuffer(body[at : at + size], np.uint8), bitorder="little")
    changed, values = bits[: len(last)].astype(bool), body[at + size :]
    if len(bits) != 8 * size or bits[len(last) :].any() or len(values) != 4 * changed.sum():
        raise ValueError("its length does not fit its mask")
    frame = last.copy()
    frame[changed] = np.frombuffer(values, "<f4")
    return signature, body[0] >> 4, frame


class Writer:
    """Appends records to a file that is open without a buffer; `crc` is the last checksum there.

    A record is handed to the operating system at once, so that a process that is killed loses nothing that was written;
    and to the disk when `sync` seconds have passed since that was done last, so that a machine that dies loses no more.
    """

    def __init__(self, file: BinaryIO, crc: int, version: int = VERSION, sync: float = SYNC_SECONDS) -> None:
        self.file, self.crc, self.version, self._sync_seconds = file, crc, version, sync
        self.at = file.tell()  # where the last record ends
        self._synced = time.monotonic()

    def append(self, body: bytes) -> None:
        """All of a record, or nothing of it.

        Raises:
            OSError: with the file as it was before, as far as the system lets it be cut off.
        """
        self.append_all([body])

    def append_all(self, bodies: Sequence[bytes]) -> None:
        """Several records, or nothing of them."""
        crc, data = self.crc, list[bytes]()
        for body in bodies:
            if not 1 <= len(body) <= MAX_RECORD:
                raise JournalError(f"a record has {len(body)} bytes, and a journal takes 1 to {MAX_RECORD}")
            head = varint(len(body))
            crc = checksum(self.version, head, body, crc)
            data += (head, body, struct.pack("<I", crc))
        self._write(b"".join(data))
        self.crc = crc
        if time.monotonic() - self._synced >= self._sync_seconds:
            self.sync()

    def append_json(self, kind: int, value: object) -> None:
        text = json.dumps(value, separators=(",", ":")).encode()
        if len(text) >= MAX_JSON:
            raise JournalError(f"a description has {len(text)} bytes, and a journal takes less than {MAX_JSON}")
        self.append(bytes([kind]) + text)

    def sync(self) -> None:
        """Waits until the disk has all that was written."""
        os.fsync(self.file.fileno())
        self._synced = time.monotonic()

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
        except BaseException:
            self.file.seek(self.at)
            self.file.truncate()
            raise
        self.at += len(data)


def start(file: BinaryIO, header: dict[str, Any], version: int = VERSION, sync: float = SYNC_SECONDS) -> Writer:
    """Writes magic, header and checksum."""
    text = json.dumps(header, separators=(",", ":")).encode()
    if len(text) > MAX_JSON:
        raise JournalError(f"the header has {len(text)} bytes, and a journal takes {MAX_JSON}: make `about` shorter")
    data = magic(version) + struct.pack("<I", len(text)) + text
    writer = Writer(file, zlib.crc32(data), version, sync)
    writer._write(data + struct.pack("<I", writer.crc))
    writer.sync()
    return writer
