"""Tables of runs, from their JSON, for the terminal; those of whole steps as rows of text too, for docs/steps.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from rich.table import Table

from zokern.bench.split import PARTS

NOTHING: Mapping[str, str] = MappingProxyType({})
Row = list[str]
STEP_COLUMNS = ("case", "step, ms", "forwards", "passes", "other", "share", "memory", "speed-up")
SCALING_COLUMNS = ("parameters", "case", "ns each", "fastest, slowest", "ratio", "weights, MB", "beside, MB")


def kernels(record: Mapping[str, Any]) -> Table:
    """A row for each way of each case: ns per element, (max - min) / median, GB/s of the bytes that the pass must move,
    share of the copy's GB/s.

    Columns "x <peer>": the peer's time over ours.
    """
    results = record["results"]
    peers = [label for label in next(iter(results.values()))["ways"] if not label.startswith("zokern")]
    peers.remove("copy")
    ours = [way for r in results.values() for label, way in r["ways"].items() if label.startswith("zokern")]
    predicted = any("predicted_share" in way for way in ours)
    table = Table(title=f"{record['benchmark']}, {record['settings']['elements']:,} elements in the model")
    table.add_column("pass", min_width=27)
    columns = ["ns/elem", "spread", "GB/s", "% copy", *(["predicted"] if predicted else [])]
    for column in [*columns, *(f"x {peer}" for peer in peers)]:
        table.add_column(column, justify="right", no_wrap=True)
    for title, result in results.items():
        table.add_row(title, style="bold")
        for label, way in result["ways"].items():
            spread = (way["max"] - way["min"]) / way["median"]
            cells = [f"  {label}", f"{way['ns_per_element']:.3g}", f"{spread:.0%}"]
            cells += [f"{way['gb_per_s']:.3g}", f"{way['share_of_copy']:.1%}"]
            if predicted:
                cells.append(f"{way['predicted_share']:.0%}" if "predicted_share" in way else "")
            if label.startswith("zokern"):
                cells += [f"{way['speedup_over'][peer]:.2f}" for peer in peers]
            table.add_row(*cells)
        table.add_section()
    return table


def not_predicted(record: Mapping[str, Any]) -> list[str]:
    """The reasons why some of our ways have no predicted share, each once."""
    ways = [way for r in record["results"].values() for way in r["ways"].values()]
    return list(dict.fromkeys(way["not_predicted"] for way in ways if "not_predicted" in way))


def steps(title: str, columns: Sequence[str], rows: Sequence[Row]) -> Table:
    """Of whole steps: rows made below."""
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=column in columns[:2], justify="left" if column == "case" else "right")
    for row in rows:
        table.add_row(*row)
    return table


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


def scaling_rows(results: Sequence[Mapping[str, Any]]) -> list[Row]:
    """A row for each size with times, compared with those of the smallest of the same type, method and placement."""
    rows, smallest = [], dict[str, float]()
    for result in sorted(results, key=lambda r: (r["dtype"], r["method"], r["placement"], r["parameters"])):
        if result["status"] == "timed":
            size, case = _size_and_case(result)
            ns = result["ns_per_parameter"]
            ratio = ns["median"] / smallest.setdefault(case, ns["median"])
            bytes_ = (f"{result[name] / 1e6:,.1f}" for name in ("weights_bytes", "extra_bytes"))
            rows.append(
                [size, case, f"{ns['median']:.2f}", f"{ns['min']:.2f}, {ns['max']:.2f}", f"{ratio:.2f}", *bytes_]
            )
    return rows


def _size_and_case(result: Mapping[str, Any]) -> tuple[str, str]:
    """Of a row of `scaling`."""
    return f"{result['parameters'] / 1e6:,.1f} M", " ".join(result[key] for key in ("dtype", "method", "placement"))


def step_notes(results: Mapping[str, Mapping[str, Any]], not_timed: Mapping[str, str] = NOTHING) -> list[str]:
    """A line for each way that the run had not (way: why), and for each case without times."""
    notes = [f"{way}: not timed: {why}" for way, why in not_timed.items()]
    return notes + [f"{name}: {_reason(r)}" for name, r in results.items() if r["status"] != "timed"]


def scaling_notes(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each size without times."""
    return [f"{' '.join(_size_and_case(r))}: {_reason(r)}" for r in results if r["status"] != "timed"]


def _reason(result: Mapping[str, Any]) -> str:
    if result["status"] == "does not fit":
        return f"does not fit: {_memory(result)}"
    return f"not captured: {result['why']}" if result["status"] == "not captured" else "left out: the time was up"


def _memory(result: Mapping[str, Any]) -> str:
    """Of a case that does not fit. Older files have what was computed of a case that was tried as "needed_bytes", too."""
    free, computed = result["free_bytes"], result.get("computed_bytes", result.get("needed_bytes"))
    if "computed_bytes" not in result and computed > free:
        texts = ([f"{number / 1e9:.{digits}f} GB" for number in (computed, free)] for digits in range(1, 10))
        needs, has = next(pair for pair in texts if pair[0] != pair[1])  # to a byte, if that is all that is lacking
        return f"needs {needs}, {has} free"
    told = (
        f"tried, and needs more than the {free / 1e9:.1f} GB that were free: its tensors take {computed / 1e9:.1f} GB"
    )
    held = f", and torch held {result['held_bytes'] / 1e9:.1f} GB when it got no more" if "held_bytes" in result else ""
    return told + held
