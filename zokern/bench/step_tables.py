"""Tables of the whole-step and the scaling benchmark, as rows of text: for the terminal and for docs/steps.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Row = list[str]
STEP_COLUMNS = ("case", "step, ms", "forwards", "passes", "other", "passes' share", "memory", "speed-up")
SCALING_COLUMNS = (
    "parameters",
    "case",
    "ns/parameter",
    "fastest, slowest",
    "over the smallest",
    "weights, MB",
    "beside them, MB",
)


def _megabytes(value: float) -> str:
    return f"{value / 1e6:,.1f}"


def published(results: Mapping[str, Mapping[str, Any]], result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The timed step of the same method, model, type and tokens in the published way, if there is one."""
    same = ("model", "tokens", "method", "dtype")
    for other in results.values():
        if other["way"] == "published" and other["status"] == "timed" and all(other[k] == result[k] for k in same):
            return other
    return None


def step_rows(results: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """A row for each case: ms; memory beyond a forward's, in shares of the weights; times faster than the published way.
    A case without times says why."""
    rows = []
    for name, result in results.items():
        if result["status"] != "timed":
            rows.append([name, reason(result), *[""] * (len(STEP_COLUMNS) - 2)])
            continue
        other, step = published(results, result), result["step"]["median"]
        speed = "" if other is None or other is result else f"{other['step']['median'] / step:.2f}"
        parts = (f"{1e3 * result[part]:,.1f}" for part in ("forwards", "passes", "other"))
        share = f"{result['passes'] / step:.1%}"
        rows.append([name, f"{1e3 * step:,.1f}", *parts, share, f"{result['extra_share']:.1%}", speed])
    return rows


def scaling_rows(results: list[dict[str, Any]]) -> list[Row]:
    """A row for each size; times are compared with those of the smallest of the same type, method and placement."""
    rows, smallest = [], dict[tuple[str, ...], float]()
    for result in sorted(results, key=lambda r: (r["dtype"], r["method"], r["placement"], r["parameters"])):
        key = (result["dtype"], result["method"], result["placement"])
        head = [f"{result['parameters'] / 1e6:,.1f} M", " ".join(key)]
        if result["status"] != "timed":
            rows.append([*head, reason(result), *[""] * (len(SCALING_COLUMNS) - 3)])
            continue
        ns = result["ns_per_parameter"]
        ratio = ns["median"] / smallest.setdefault(key, ns["median"])
        sizes = (_megabytes(result[name]) for name in ("weights_bytes", "extra_bytes"))
        rows.append([*head, f"{ns['median']:.2f}", f"{ns['min']:.2f}, {ns['max']:.2f}", f"{ratio:.2f}", *sizes])
    return rows


def reason(result: Mapping[str, Any]) -> str:
    """Why a case has no times."""
    if result["status"] == "does not fit":
        return f"does not fit: needs {result['needed_bytes'] / 1e9:.1f} GB, {result['free_bytes'] / 1e9:.1f} GB free"
    return "left out: the time was up"
