"""Tables and pictures of the kernel benchmarks, for README.md and docs/benchmarks.md, from results/kernels-*.json."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pages import RESULTS, ROOT

from zokern.bench import plots
from zokern.bench.cases import BENCHMARKS, is_ours

IMAGES = ROOT / "docs" / "images"
QUIET = 2.0  # slowest over fastest round of any way, above which a page says that the run is not to be trusted
HEADLINES = ("axpy, K = 1", "axpy, K = 4", "axpy, K = 16", "axpy, Rademacher", "axpy, stochastic rounding")


def paths(device: str) -> list[Path]:
    """The stored runs of one kind of device, in the order of `zokern bench list`."""
    return [p for name in BENCHMARKS if (p := RESULTS / f"kernels-{name}-{device}.json").is_file()]


def records(device: str) -> list[dict[str, Any]]:
    return [plots.load(path) for path in paths(device)]


def _ours(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for label, way in result["ways"].items():
        if is_ours(label):
            yield label, way


def _cells(way: dict[str, Any], peers: list[str]) -> list[str]:
    times = [f"{way['speedup_over'][peer]:.1f}" if peer in way["speedup_over"] else "-" for peer in peers]
    return [f"{way['ns_per_element']:.3g}", f"{way['gb_per_s']:.3g}", f"{way['share_of_copy']:.0%}", *times]


def _peers(found: list[dict[str, Any]]) -> list[str]:
    ways = [way for record in found for result in record["results"].values() for _, way in _ours(result)]
    return [peer for peer in dict.fromkeys(p for way in ways for p in way["speedup_over"]) if peer != "copy"]


def _run_of(record: dict[str, Any]) -> str:
    settings = record["settings"]
    text = f"{plots.caption(record)}; {settings['elements']:,} weights, medians of {settings['rounds']} rounds"
    text += ("" if record["complete"] else "; the run broke off") + "."
    ways = [way for result in record["results"].values() for way in result["ways"].values()]
    worst = max(way["max"] / way["min"] for way in ways)
    if worst > QUIET:
        text += f" **The machine was not quiet:** times of one way differ by up to {worst:.1f} x; run it again."
    return text


def kernel_headlines() -> str:
    """README's table: axpy on a CPU."""
    found = records("cpu")
    peers = _peers(found)
    dtypes = found[0]["settings"]["dtypes"]
    lines = [
        f"One run on {_run_of(found[0])} For each pass: ns per element, then how many times faster than "
        f"{' / '.join(f'`{peer}`' for peer in peers)}.",
        "",
        "| pass | " + " | ".join(dtypes) + " |",
        "|---|" + "---|" * len(dtypes),
    ]
    results = {title: result for record in found for title, result in record["results"].items()}
    for label in HEADLINES:
        cells = []
        for dtype in dtypes:
            result = results.get(f"{label}, {dtype}")
            if result is None:
                cells.append("-")
                continue
            _, way = next(_ours(result))
            over = way["speedup_over"]  # not every benchmark was run beside every peer
            faster = " / ".join(f"{over[peer]:.1f} x" if peer in over else "-" for peer in peers)
            cells.append(f"{way['ns_per_element']:.2f} ns, {faster}")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kernel_tables(device: str) -> str:
    """docs/benchmarks.md: every case of a kind of device, and the pictures; or that nothing has run."""
    found = records(device)
    if not found:
        return f"**Not yet run on a {device.upper().replace('CUDA', 'GPU')}.**"
    parts = [f"![Roofline of the passes](images/kernels-roofline-{device}.png)"]
    for record, path in zip(found, paths(device), strict=True):
        peers = _peers([record])
        predicted = any("predicted_share" in way for r in record["results"].values() for _, way in _ours(r))
        head = ["pass", "on", "ns/element", "GB/s", "% of copy", *[f"x {peer}" for peer in peers]]
        head += ["predicted"] if predicted else []
        lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for title, result in record["results"].items():
            for label, way in _ours(result):
                cells = [title, label.removeprefix("zokern "), *_cells(way, peers)]
                if predicted:
                    share = way.get("predicted_share")
                    cells.append("-" if share is None else f"{share:.0%}")
                lines.append("| " + " | ".join(cells) + " |")
        name = record["benchmark"].removeprefix("kernels-")
        picture = f"![{name}: share of the copy bandwidth](images/{path.stem}.png)"
        parts.append(
            f"### {name}\n\n{BENCHMARKS[name].about}. {_run_of(record)}\n\n" + "\n".join(lines) + f"\n\n{picture}"
        )
    return "\n\n".join(parts)


def kernels_cpu() -> str:
    return kernel_tables("cpu")


def kernels_gpu() -> str:
    return kernel_tables("cuda")


def draw() -> list[Path]:
    """The pictures of all stored runs, into docs/images."""
    return [path for device in ("cpu", "cuda") if paths(device) for path in plots.draw(paths(device), IMAGES)]
