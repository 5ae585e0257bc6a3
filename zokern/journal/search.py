"""Is there a good record after bytes that are none? It tells damage, with more of the run behind it, from a torn end.

Four bytes before a record stands the checksum that its own starts from. So each place where a record can begin is tried
with the four bytes before it: chance finds one in 2^32 of them good.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from zokern.journal.format import LAYOUT, MARK, MAX_JSON, MAX_RECORD, RESERVED, SIGNATURE, STEP, checksum

SEARCHED = MAX_RECORD + MAX_JSON  # bytes: no single bad record is longer
_BLOCK = 1 << 20
_SUMMED = 1 << 28  # bytes of checksums, so that no file takes more than a moment
_HEADS = np.array([LAYOUT, SIGNATURE, MARK, *RESERVED, *(STEP | flags << 4 for flags in range(3))], np.uint8)
Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]


def good_record(version: int, data: bytes, last: int | None = None) -> int | None:
    """Where in `data` a record begins that can be shown to be good; None if there is none.

    data: from the last good record's checksum on, its four bytes included. last: the place before which one must begin.
    """
    values, summed = np.frombuffer(data, np.uint8), 0
    first, last = (5, len(data)) if last is None else (4, min(last, len(data)))
    for begin in range(first, last, _BLOCK):
        places, heads, lengths = _candidates(values, begin, min(begin + _BLOCK, last))
        for i in np.argsort(lengths, kind="stable").tolist():  # short ones are the likely ones
            at, head, length = int(places[i]), int(heads[i]), int(lengths[i])
            summed += length
            if summed > _SUMMED:
                return None
            (previous,) = struct.unpack_from("<I", data, at - 4)
            (said,) = struct.unpack_from("<I", data, at + head + length)
            body = data[at + head : at + head + length]
            if checksum(version, data[at : at + head], body, previous) == said:
                return at
    return None


def begins_good(version: int, data: bytes) -> bool:
    """Whether a good record stands at the beginning, after the checksum that it starts from."""
    return good_record(version, data[: 4 + MAX_RECORD], last=5) is not None


def _candidates(data: Bytes, first: int, last: int) -> tuple[Ints, Ints, Ints]:
    """Places from first to last where a record may begin that ends within the data; sizes of its length and its body."""
    found: list[tuple[Ints, Ints, Ints]] = []
    places = np.arange(first, last, dtype=np.int64)
    for head in range(1, 5):
        places = places[places + head < len(data)]
        ends = data[places + head - 1] < 0x80  # here the length ends
        at = places[ends & np.isin(data[places + head], _HEADS)]
        length = np.zeros(len(at), np.int64)
        for i in range(head):
            length |= (data[at + i].astype(np.int64) & 0x7F) << 7 * i
        fits = (length >= 2) & (length <= MAX_RECORD) & (at + head + length + 4 <= len(data))
        found.append((at[fits], np.full(int(fits.sum()), head, np.int64), length[fits]))
        places = places[~ends]
    one, two, three = zip(*found, strict=True)
    return np.concatenate(one), np.concatenate(two), np.concatenate(three)
