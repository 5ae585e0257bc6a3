"""A journal as the list of what it says, and back; and changes of that."""

from __future__ import annotations

import copy
import json
import random
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from zokern.journal import format as journal_format
from zokern.journal.format import LAYOUT, MARK, PREFIX, SIGNATURE, checksum, read_varint, varint

JSON_KINDS = (LAYOUT, SIGNATURE, MARK)
HOSTILE: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 7, 127, 128, 1023, 65536, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 62) + 1,
    1 << 63, 1 << 64, -(1 << 63), 10**30, 0.0, -0.0, 0.5, 1e308, -1e308, 5e-324, "", "w", "axpy", "momentum", "adam",
    "helene", "hizoo", "hizoo_restore", "scaled_axpy", "adamezo", "sign", "float32", "float16", "bfloat16", "float64",
    "int8", "normal", "rademacher", "m", "h", "v", "\x1b[2J", "a" * 300, [], {}, [0], [[]], [0, 0], [[0, 0]],
    [[0, 0], [0, 1]], [[1 << 40, 0]], {"": 0}, {"m": ["bfloat16", 0.0]}, {"h": ["bfloat16", 1.0]}, ["float32", 0.0],
    [1, 2], ["a", "b"],
    float("inf"), float("nan"), "lowrank:1", "lowrank:2", "lowrank:99", ["fold"], ["lowrank"], ["lowrank", "fold"], [1, 3],
    "0" * 32,
]  # fmt: skip
KEYS = ("stochastic", "rounded", "square_of_sum", "keep_second", "deferred", "folded", "features", "about", "colour")


def build(header: bytes, bodies: list[bytes], version: int = 2) -> bytes:
    """The file, with right lengths and checksums."""
    data = journal_format.magic(version) + struct.pack("<I", len(header)) + header
    crc = zlib.crc32(data)
    data += struct.pack("<I", crc)
    for body in bodies:
        head = varint(len(body))
        crc = checksum(version, head, body, crc)
        data += head + body + struct.pack("<I", crc)
    return data


def take_apart(data: bytes) -> tuple[bytes, list[bytes], int]:
    """Header, bodies and version of a file; lengths are believed as far as the file goes, checksums not at all."""
    place = len(PREFIX) + 1
    version = 1 if data[place - 1 : place] == b"\x01" else 2
    length = int.from_bytes(data[place : place + 4], "little")
    header, at, bodies = data[place + 4 : place + 4 + length], place + 8 + length, []
    while at < len(data):
        try:
            length, at = read_varint(data, at)
        except (IndexError, ValueError):
            break
        if body := data[at : at + length]:
            bodies.append(body)
        at += length + 4
    return header, bodies, version


def repaired(data: bytes) -> bytes:
    """The same records with right checksums."""
    return build(*take_apart(data))


def changed(data: bytes, rng: random.Random) -> bytes:
    """One to three changes of what a journal says, or of the order in which it says it."""
    header, bodies, version = take_apart(data)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(-1, len(bodies)) if bodies else -1
        what = rng.random()
        if place < 0:
            header = changed_json(header, rng)
        elif what < 0.1:
            bodies.insert(rng.randrange(len(bodies) + 1), bodies[place])
        elif what < 0.2 and len(bodies) > 1:
            del bodies[place]
        elif what < 0.3:
            other = rng.randrange(len(bodies))
            bodies[place], bodies[other] = bodies[other], bodies[place]
        elif bodies[place] and bodies[place][0] in JSON_KINDS and what < 0.9:
            bodies[place] = bodies[place][:1] + changed_json(bodies[place][1:], rng)
        else:
            bodies[place] = changed_bytes(bodies[place], rng)
    return build(header, bodies, rng.choice((version, 1, 2)))


def spliced(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """The beginning of one journal, with records of another after it."""
    (header, first, version), (_, second, _) = take_apart(data), take_apart(other)
    at = rng.randrange(len(second) + 1)
    return build(header, first[: rng.randrange(len(first) + 1)] + second[at : at + rng.randint(1, 4)], version)


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    what = rng.random()
    if what < 0.6 and out:
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    elif what < 0.8:
        del out[rng.randrange(len(out) + 1) :]
    else:
        out += rng.randbytes(rng.randint(1, 40))
    return bytes(out)


def changed_json(text: bytes, rng: random.Random) -> bytes:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return changed_bytes(text, rng)
    if not change(value, rng):
        return json.dumps(rng.choice(HOSTILE)).encode()
    return json.dumps(value, separators=(",", ":")).encode()


def change(value: Any, rng: random.Random, hostile: Sequence[Any] = HOSTILE) -> bool:
    """One entry at any depth is another one, or is missing, or is there twice. False where there is none."""
    found = list(places(value))
    if not found:
        return False
    holder, key = rng.choice(found)
    what = rng.random()
    if what < 0.1:
        del holder[key]
    elif what < 0.2 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif what < 0.2:
        holder[rng.choice(KEYS)] = copy.deepcopy(rng.choice(hostile))
    elif what < 0.3 and isinstance(holder[key], int):
        holder[key] += rng.choice((-2, -1, 1, 2))
    elif what < 0.4:
        other, theirs = rng.choice(found)
        holder[key] = copy.deepcopy(other[theirs])
    else:
        holder[key] = copy.deepcopy(rng.choice(hostile))
    return True


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each entry's holder and its key or index there, at any depth of dicts and lists."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])
