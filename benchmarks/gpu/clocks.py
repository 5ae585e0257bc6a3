"""A GPU's clock and power while the suite ran, section by section, from what nvidia-smi printed beside it.

Sample with COMMAND, into a file, from before the suite until after it. The suite's sections follow each other from the
date of its summary on, to a second. A sample is under load where kernels ran for LOAD of the driver's last interval.
nvidia-smi prints local time; it is taken as UTC, which the suite's dates are in.
"""

from __future__ import annotations

import csv
import itertools
import statistics
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any, NamedTuple

FIELDS = ("timestamp", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active",
          "utilization.gpu")  # fmt: skip
COMMAND = ("nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits", "-lms", "200")
POWER_CAP = 0x4  # of the reasons: the clock is held down to stay within the power limit
LOAD = 50  # per cent


class Sample(NamedTuple):
    """Clocks in MHz, power in watts, load in per cent."""

    time: datetime
    clock: int
    memory: int
    power: float
    capped: bool
    load: int


def samples(text: str) -> list[Sample]:
    """Of a CSV with FIELDS.

    Raises:
        ValueError: for a line that is not one, or none at all.
    """
    found = []
    for number, row in enumerate(csv.reader(text.splitlines()), 1):
        if len(row) != len(FIELDS):
            raise ValueError(f"line {number} has {len(row)} columns, not the {len(FIELDS)} of {' '.join(COMMAND)}")
        time = datetime.strptime(row[0].strip(), "%Y/%m/%d %H:%M:%S.%f").replace(tzinfo=timezone.utc)
        reasons = int(row[5].strip(), 16)
        found.append(Sample(time, int(row[1]), int(row[2]), float(row[3]), bool(reasons & POWER_CAP), int(row[6])))
    if not found:
        raise ValueError("there is no sample in it")
    return found


def _sections(summary: Mapping[str, Any]) -> Iterator[tuple[str, datetime, datetime]]:
    begin = datetime.fromisoformat(summary["date"])
    for section in summary["sections"]:
        end = begin + timedelta(seconds=section["seconds"])
        yield section["name"], begin, end
        begin = end


def of_section(taken: list[Sample]) -> dict[str, Any]:
    """What is kept of its samples: of all how many there were; of those under load the rest. Clocks in Hz."""
    loaded = [s for s in taken if s.load >= LOAD]
    facts: dict[str, Any] = {"samples": len(taken), "under_load": len(loaded)}
    if loaded:
        clock = [1e6 * s.clock for s in loaded]
        facts["power_capped"] = sum(s.capped for s in loaded) / len(loaded)
        facts["clock"] = {"mean": statistics.fmean(clock), "min": min(clock), "max": max(clock)}
        facts["memory_clock"] = {"min": 1e6 * min(s.memory for s in loaded), "max": 1e6 * max(s.memory for s in loaded)}
        facts["power"] = {"mean": statistics.fmean(s.power for s in loaded), "max": max(s.power for s in loaded)}
    return facts


def record(text: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    """What is stored: the samples of each section in a few numbers.

    Raises:
        ValueError: where the samples are of another time than the suite.
    """
    found = samples(text)
    sections = list(_sections(summary))
    if found[0].time > sections[0][1] + timedelta(seconds=2) or found[-1].time < sections[-1][1]:
        raise ValueError(
            f"its samples are from {found[0].time} to {found[-1].time}, the suite ran from {sections[0][1]} to "
            f"{sections[-1][2]} (UTC): sample from before the suite until after it"
        )
    apart = statistics.median((b.time - a.time).total_seconds() for a, b in itertools.pairwise(found))
    return {
        "benchmark": "clocks",
        "date": summary["date"],
        "commit": summary["commit"],
        "machine": {"gpu": summary["gpu"]["name"], "driver": summary["gpu"]["driver"]},
        "settings": {
            "tool": "nvidia-smi", "fields": FIELDS, "seconds_apart": apart, "load": LOAD / 100, "samples": len(found),
        },
        "results": {name: of_section([s for s in found if begin <= s.time < end]) for name, begin, end in sections},
    }  # fmt: skip
