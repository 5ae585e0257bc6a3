"""Keeps what the GPU suite left in its OUTDIR as results, from which pages are made.

python -m benchmarks.gpu.keep OUTDIR                        # of --part truth, and again with the OUTDIR of --part speed
python -m benchmarks.gpu.keep OUTDIR --clocks clocks.csv    # with the GPU's clock, sampled beside the suite (clocks.py)

Kernels, steps and the checksum are copied as they are. Of compared bits a row for each rule, dtype and backend is kept. A
run with a section that did not pass, or with a wrong bit, is refused.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import clocks
from benchmarks.gpu.equality import is_wrong
from benchmarks.gpu.sections import PARTS, ROOT

RESULTS = ROOT / "benchmarks" / "results"
COPIED = ("kernels-*-cuda.json", "compiled/kernels-*-cuda.json", "step-cuda-*.json")
RENAMED = {"checksum.json": "checksum-cuda.json"}
BITS = {"equality.json": "equality-cuda.json", "equality-large.json": "equality-large-cuda.json"}
KIND = ("rule", "dtype", "backend", "against")


def rows_of_bits(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One for each KIND: how many cases, and their elements."""
    kinds: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        kind = tuple(row[key] for key in KIND)
        one = kinds.setdefault(kind, {**dict(zip(KIND, kind, strict=True)), "cases": 0, "elements": 0, "different": 0})
        one["cases"] += 1
        one["elements"] += row["elements"]
        one["different"] += row["different"]
    return [kinds[kind] for kind in sorted(kinds)]


def of_sanitizer(log: str) -> dict[str, dict[str, Any]]:
    """{tool: what it watched and found}, from the section's log; "of" is how many cases of CUDA there are.

    Ends the program where a tool says no result.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in re.split(r"^\$ ", log, flags=re.MULTILINE)[1:]:
        tool = re.search(r"--tool (\w+)", text)
        compared = re.search(r"^(\d+) of cuda, (\d+) of triton passes, (\d+) with wrong bits", text, re.MULTILINE)
        cut = re.search(r"^time limit: (\d+) of (\d+) cases", text, re.MULTILINE)
        summary = re.search(r"SUMMARY: (\d+) (?:errors?|hazards?)", text)
        if tool is None or compared is None or summary is None:
            raise SystemExit(f"not kept: the sanitizer's log has no result of {tool[1] if tool else text[:60]!r}")
        cuda, triton, wrong = map(int, compared.groups())
        found[tool[1]] = {"cuda": cuda, "of": int(cut[2]) if cut else cuda, "triton": triton, "wrong_bits": wrong,
                          "found": int(summary[1])}  # fmt: skip
    return found


def part_of(summary: Mapping[str, Any]) -> str:
    """Which part of the suite it was; ends the program where it was none, or did not pass."""
    ran = [section["name"] for section in summary["sections"]]
    bad = [section["name"] for section in summary["sections"] if section["status"] != "passed"]
    if bad or summary["interrupted"]:
        raise SystemExit(f"not kept: {', '.join(bad) or 'the run'} did not pass; see logs/ in that folder")
    for part, names in PARTS.items():
        if ran == list(names):
            return part
    raise SystemExit(f"not kept: the run has {', '.join(ran)}; run the suite with --part {' or '.join(PARTS)}")


def _write(path: Path, record: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def keep(out: Path, into: Path = RESULTS, sampled: Path | None = None) -> None:
    """Everything, or nothing where anything is refused. sampled: of the clock."""
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    kept = {into / f"gpu-suite-{part_of(summary)}.json": summary}
    for name, to in BITS.items():
        if (out / name).exists():
            record = json.loads((out / name).read_text())
            if wrong := [row for row in record["results"] if is_wrong(row)]:
                raise SystemExit(f"not kept: {name} has {len(wrong)} cases that are wrong, the first {wrong[0]}")
            kept[into / to] = record | {"results": rows_of_bits(record["results"])}
    log = out / "logs" / "sanitizer.log"
    if log.exists():
        machine = {"gpu": summary["gpu"]["name"], "driver": summary["gpu"]["driver"]}
        about = {"benchmark": "sanitizer", "date": summary["date"], "commit": summary["commit"], "machine": machine}
        kept[into / "sanitizer-cuda.json"] = {**about, "results": of_sanitizer(log.read_text())}
    if sampled is not None:
        try:
            kept[into / "clocks-cuda.json"] = clocks.record(sampled.read_text(), summary)
        except ValueError as error:
            raise SystemExit(f"not kept: {sampled}: {error}") from None
    for path, record in kept.items():
        _write(path, record)
    copied = {out / name: into / new for name, new in RENAMED.items()}
    copied |= {path: into / path.relative_to(out) for pattern in COPIED for path in out.glob(pattern)}
    for path, where in copied.items():
        if path.exists():
            where.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, where)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUTDIR", help="of benchmarks/gpu_suite.sh")
    parser.add_argument("--clocks", type=Path, metavar="CSV", help=f"of {' '.join(clocks.COMMAND)}")
    parser.add_argument("--into", type=Path, default=RESULTS, help="the folder of results (default: %(default)s)")
    options = parser.parse_args(arguments)
    keep(options.out, options.into, options.clocks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
