"""Tables of the whole-step and the scaling benchmark, as rows of text: for the terminal and for docs/steps.md."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from zokern.bench.split import PARTS

NOTHING: Mapping[str, str] = MappingProxyType({})
Row = list[str]
STEP_COLUMNS = ("case", "step, ms", "forwards", "passes", "other", "share", "memory", "speed-up")
SCALING_COLUMNS = (
    "parameters",
    "case",
    "ns each",
    "fastest, slowest",
    "ratio",
    "weights, MB",
    "beside, MB",
)


def _megabytes(value: float) -> str:
    return f"{value / 1e6:,.1f}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.{0 if seconds >= 0.1 else 1}f}"


def published(results: Mapping[str, Mapping[str, Any]], result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The timed step of the same method, model, type and tokens in the published way, if there is one."""
    same = ("model", "tokens", "method", "dtype")
    for other in results.values():
        if other["way"] == "published" and other["status"] == "timed" and all(other[k] == result[k] for k in same):
            return other
    return None


def step_rows(results: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """A row for each case with times: ms; the passes' share; memory beyond a forward's, in shares of the weights; times
    faster than the published way."""
    rows = []
    for name, result in results.items():
        if result["status"] != "timed":
            continue
        other, step = published(results, result), result["step"]["median"]
        speed = "" if other is None or other is result else f"{other['step']['median'] / step:.2f}"
        times = [_milliseconds(step), *(_milliseconds(result[p]) if p in result else "" for p in PARTS)]
        share = f"{result['passes'] / step:.1%}" if "passes" in result else ""
        rows.append([name, *times, share, f"{result['extra_share']:.1%}", speed])
    return rows


def scaling_rows(results: list[dict[str, Any]]) -> list[Row]:
    """A row for each size with times, compared with those of the smallest of the same type, method and placement."""
    rows, smallest = [], dict[tuple[str, ...], float]()
    for result in sorted(results, key=lambda r: (r["dtype"], r["method"], r["placement"], r["parameters"])):
        key = (result["dtype"], result["method"], result["placement"])
        if result["status"] != "timed":
            continue
        head = [f"{result['parameters'] / 1e6:,.1f} M", " ".join(key)]
        ns = result["ns_per_parameter"]
        ratio = ns["median"] / smallest.setdefault(key, ns["median"])
        sizes = (_megabytes(result[name]) for name in ("weights_bytes", "extra_bytes"))
        rows.append([*head, f"{ns['median']:.2f}", f"{ns['min']:.2f}, {ns['max']:.2f}", f"{ratio:.2f}", *sizes])
    return rows


def step_notes(results: Mapping[str, Mapping[str, Any]], not_timed: Mapping[str, str] = NOTHING) -> list[str]:
    """A line for each way that the run had not (way: why), and for each case without times."""
    notes = [f"{way}: not timed: {why}" for way, why in not_timed.items()]
    return notes + [f"{name}: {_reason(r)}" for name, r in results.items() if r["status"] != "timed"]


def scaling_notes(results: list[dict[str, Any]]) -> list[str]:
    """A line for each size without times."""
    return [
        f"{r['parameters'] / 1e6:,.1f} M {r['dtype']} {r['method']} {r['placement']}: {_reason(r)}"
        for r in results
        if r["status"] != "timed"
    ]


def _reason(result: Mapping[str, Any]) -> str:
    if result["status"] == "does not fit":
        return f"does not fit: needs {result['needed_bytes'] / 1e9:.1f} GB, {result['free_bytes'] / 1e9:.1f} GB free"
    if result["status"] == "not captured":
        return f"not captured: {result['why']}"
    return "left out: the time was up"
