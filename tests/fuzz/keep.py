"""Keeps what a fuzz run found: python -m tests.fuzz.keep [FOLDER ...], by default all of build/fuzz, where that is there.

Of all inputs there, those that reach what neither the runs' own journals nor the kept ones do, smallest first; each is made
as small as it can be and still reach that. What was kept stays, as far as it reaches anything that the others do not;
how each ends is written anew, as after a message has got other words.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Hashable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.fuzz import corpus, kept, records, targets
from tests.fuzz.kept import FOUND
from tests.fuzz.reach import features
from zokern.journal.format import VERSION

Features = frozenset[Hashable]


class Looking:
    """What inputs reach, by the file that they are in."""

    def __init__(self, path: Path) -> None:
        self.path, self.good = path, corpus.stored()

    def at(self, data: bytes) -> Features:
        self.path.write_bytes(data)
        return frozenset(features(partial(targets.all_of, self.path, self.good)))


def needed(inputs: list[bytes], look: Looking, known: Features) -> dict[bytes, Features]:
    """Those inputs that reach what is not known, none that the others make needless; each with what it is there for, which
    the ones before it do not reach."""
    reached: dict[bytes, Features] = {}
    seen = set(known)
    for i, data in enumerate(inputs):
        here = look.at(data)
        if here - seen:
            reached[data] = here - known
            seen |= here
        if i % 500 == 499:
            print(f"{i + 1} of {len(inputs)} looked at, {len(reached)} reach something new", flush=True)
    for data in sorted(reached, key=len, reverse=True):
        if reached[data] <= frozenset().union(*(other for one, other in reached.items() if one != data)):
            del reached[data]
    wanted = dict[bytes, Features]()
    for data, here in reached.items():
        wanted[data] = here - frozenset().union(*wanted.values())
    return wanted


def smaller(data: bytes, look: Looking, wanted: Features) -> bytes:
    """The input with as little in it as still reaches what is wanted."""
    parts, at, in_vain = list(_parts(data)), 0, 0
    while in_vain < len(parts):
        candidate = parts[at % len(parts)]
        if len(candidate) < len(data) and wanted <= look.at(candidate):
            data, parts, in_vain = candidate, list(_parts(candidate)), 0  # at: what came after it has its place now
        else:
            at, in_vain = at + 1, in_vain + 1
    return data


def _parts(data: bytes) -> Iterator[bytes]:
    """It with right checksums; without one of its records, without one entry of what it says; its first half."""
    header, bodies, version = records.take_apart(data)
    yield records.build(header, bodies, version)
    for i in range(len(bodies)):
        yield records.build(header, bodies[:i] + bodies[i + 1 :], version)
    for text in _less(header):
        yield records.build(text, bodies, version)
    for i, body in enumerate(bodies):
        for text in _less(body[1:]) if body[0] in records.JSON_KINDS else ():
            yield records.build(header, [*bodies[:i], body[:1] + text, *bodies[i + 1 :]], version)
    yield records.build(header, bodies, VERSION)
    for end in (len(data) // 2, len(data) - 1):
        yield data[:end]


def _less(text: bytes) -> Iterator[bytes]:
    """JSON without one of its entries, at any depth."""
    try:
        count = sum(1 for _ in records.places(json.loads(text)))
    except (ValueError, RecursionError):
        return
    for i in range(count):
        value = json.loads(text)
        holder, key = list(records.places(value))[i]
        del holder[key]
        yield json.dumps(value, separators=(",", ":")).encode()


def inputs_of(folders: list[Path]) -> list[bytes]:
    """Small ones first."""
    found = {path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}
    return sorted(found, key=lambda data: (len(data), data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [FOUND] if FOUND.is_dir() else []  # without: what is kept is looked at again
    parser.add_argument("folders", nargs="*", type=Path, default=default, help=f"of inputs (default: {FOUND})")
    args = parser.parse_args()
    missing = [str(folder) for folder in args.folders if not folder.is_dir()]
    if missing:
        sys.exit(f"{missing[0]} is no folder; give one that has inputs, as python -m tests.fuzz leaves them in {FOUND}")
    with tempfile.TemporaryDirectory() as folder:
        look = Looking(Path(folder) / "run.zkj")
        known = frozenset().union(*(look.at(path.read_bytes()) for path in corpus.stored().values()))
        before, found = list(kept.stored().values()), inputs_of(args.folders)
        print(f"{len(before)} kept so far, {len(found)} to look at; the runs' own reach {len(known)}", flush=True)
        chosen = needed([*before, *found], look, known)
        print(f"{len(chosen)} are needed; each is made smaller", flush=True)
        small = [data if data in before else smaller(data, look, wanted) for data, wanted in chosen.items()]
        ends: dict[str, dict[str, Any]] = {}
        for data in small:
            look.path.write_bytes(data)
            ends[kept.name_of(data)] = targets.outline(targets.all_of(look.path, look.good))
        more = frozenset().union(*(look.at(data) for data in small)) - known
    kept.store(small, ends)
    print(f"{len(small)} kept, {sum(map(len, small)) / 1000:.1f} kB; they reach {len(more)} more")


if __name__ == "__main__":
    main()
