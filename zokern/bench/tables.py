"""A run of kernel benchmarks as a table for the terminal, from its JSON: a row for each way of each case."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def kernels(record: Mapping[str, Any]) -> Table:
    """ns per element, (max - min) / median, GB/s of the bytes that the pass must move, share of the copy's GB/s.

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
        for i, (label, way) in enumerate(result["ways"].items()):
            spread = (way["max"] - way["min"]) / way["median"]
            cells = [f"  {label}", f"{way['ns_per_element']:.3g}", f"{spread:.0%}"]
            cells += [f"{way['gb_per_s']:.3g}", f"{way['share_of_copy']:.1%}"]
            if predicted:
                share = way.get("predicted_share")
                cells.append("" if share is None else f"{share:.0%}")
            for peer in peers:
                cells.append(f"{way['speedup_over'][peer]:.2f}" if label.startswith("zokern") else "")
            table.add_row(*cells, end_section=i + 1 == len(result["ways"]))
    return table


def not_predicted(record: Mapping[str, Any]) -> list[str]:
    """The reasons why some of our ways have no predicted share, each once."""
    ways = [way for r in record["results"].values() for way in r["ways"].values()]
    return list(dict.fromkeys(way["not_predicted"] for way in ways if "not_predicted" in way))
