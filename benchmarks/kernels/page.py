"""Tables and pictures of the kernel benchmarks, for docs/benchmarks.md, from results/kernels-*.json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.kernels import targets
from benchmarks.parts import IMAGES, RESULTS, Record, table
from zokern.bench import plots
from zokern.bench.cases import BENCHMARKS, is_ours

QUIET = 2.0  # slowest over fastest round of any way, above which a page says that the run is not to be trusted
HEADLINES = ("axpy, K = 1", "axpy, K = 4", "axpy, K = 16", "axpy, Rademacher", "axpy, stochastic rounding",
             "HiZOO update, h float32", "HELENE update")  # fmt: skip


def paths(device: str) -> dict[str, Path]:
    """The stored runs of one kind of device, by benchmark, in the order of `zokern bench list`."""
    found = {name: RESULTS / f"kernels-{name}-{device}.json" for name in BENCHMARKS}
    return {name: path for name, path in found.items() if path.exists()}


def _results(found: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """The cases of several runs, by their titles."""
    return {title: result for record in found for title, result in record["results"].items()}


def _ours(result: Record) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((label, way) for label, way in result["ways"].items() if is_ours(label))


def over_peers(result: Record, way: Record, on_gpu: bool) -> dict[str, float]:
    """How many times faster than each peer a way is, where that is a figure of kernels.

    A GPU's queue holds about a thousand. A peer that launches more in a call waits for Python: two runs of the same commit
    then differ by up to 1.6 x, where others differ by 4 %.
    """
    case, over = result["case"], {peer: times for peer, times in way["speedup_over"].items() if peer != "copy"}
    if not on_gpu:
        return over
    sweeps = case["seeds"] * case["stages"]
    queued = {"foreach"} if sweeps <= 4 else set()
    plain = case["rule"] == "axpy" and case["distribution"] == "normal"
    queued |= {"published", "compiled"} if sweeps == 1 and plain else set()
    return {peer: times for peer, times in over.items() if peer in queued}


def _peers(found: Iterable[Record]) -> list[str]:
    ways = [way for result in _each(found) for _, way in _ours(result)]
    return [peer for peer in dict.fromkeys(p for way in ways for p in way["speedup_over"]) if peer != "copy"]


def _each(found: Iterable[Record]) -> Iterator[Record]:
    return (result for record in found for result in record["results"].values())


def _told(result: Record, on_gpu: bool) -> Iterator[Record]:
    """The ways whose times a page tells of: ours, the copy's, those of the peers in its tables."""
    peers = {peer for _, way in _ours(result) for peer in over_peers(result, way, on_gpu)}
    return (way for label, way in result["ways"].items() if is_ours(label) or label == "copy" or label in peers)


def _run_of(record: Record) -> str:
    settings = record["settings"]
    text = f"{plots.caption(record)}; {settings['elements']:,} weights, medians of {settings['rounds']} rounds"
    text += ("" if record["complete"] else "; the run broke off") + "."
    worst = max(
        way["max"] / way["min"] for result in _each([record]) for way in _told(result, "gpu" in record["machine"])
    )
    if worst > QUIET:
        text += f" **The machine was not quiet:** times of one way differ by up to {worst:.1f} x; run it again."
    return text


def _compiled(device: str) -> dict[str, float]:
    """How many times faster than torch.compile's kernels a pass is, by its title: of the suite's run beside them."""
    stored = _results(plots.load(path) for path in sorted((RESULTS / "compiled").glob(f"kernels-*-{device}.json")))
    over = {title: over_peers(r, next(_ours(r))[1], on_gpu=device == "cuda") for title, r in stored.items()}
    return {title: times["compiled"] for title, times in over.items() if "compiled" in times}


def kernel_headlines() -> str:
    """The short table of passes: on a GPU where one was measured, else on a CPU."""
    device = "cuda" if paths("cuda") else "cpu"
    found, compiled = [plots.load(path) for path in paths(device).values()], _compiled(device)
    peers = [*dict.fromkeys([*_peers(found), *(["compiled"] if compiled else [])])]
    results = _results(found)
    dtypes = [d for d in ("bfloat16", "float32") if any(title.endswith(f", {d}") for title in results)]

    def cell(title: str) -> str:
        if title not in results:
            return "-"
        _, way = next(_ours(results[title]))
        over = {"compiled": compiled[title]} if title in compiled else {}
        over |= over_peers(results[title], way, on_gpu=device == "cuda")  # not every benchmark ran beside every peer
        faster = " / ".join(f"{over[peer]:.1f} x" if peer in over else "-" for peer in peers)
        return f"{way['ns_per_element']:.2g} ns, {way['share_of_copy']:.0%}, {faster}"

    rows = [[label, *(cell(f"{label}, {dtype}") for dtype in dtypes)] for label in HEADLINES]
    runs = " `compiled` is a run of its own." if compiled else ""
    return (
        f"{_run_of(found[0])}{runs} For each pass: ns per element, the share of the bandwidth of a copy, then how many "
        f"times faster than {' / '.join(f'`{peer}`' for peer in peers)}.\n\n{table(['pass', *dtypes], rows, tight=True)}"
    )


def _table(record: Record, path: Path) -> str:
    """A run's cases, and its picture."""
    peers, rows = _peers([record]), []
    predicted = any("predicted_share" in way for r in _each([record]) for _, way in _ours(r))
    head = ["pass", "on", "ns/element", "GB/s", "% of copy", *[f"x {peer}" for peer in peers]]
    for title, result in record["results"].items():
        for label, way in _ours(result):
            over = over_peers(result, way, "gpu" in record["machine"])
            cells = [title, label.removeprefix("zokern "), f"{way['ns_per_element']:.3g}", f"{way['gb_per_s']:.3g}"]
            cells += [f"{way['share_of_copy']:.0%}", *(f"{over[p]:.1f}" if p in over else "-" for p in peers)]
            if predicted:
                share = way.get("predicted_share")
                cells.append("-" if share is None else f"{share:.0%}")
            rows.append(cells)
    name = record["benchmark"].removeprefix("kernels-")
    told = table(head + ["predicted"] * predicted, rows, tight=True)
    return f"{told}\n\n![{name}: share of the copy bandwidth](images/{path.stem}.png)"


def kernel_tables(device: str) -> str:
    """docs/benchmarks.md: every case of a kind of device, and the pictures; or that nothing has run."""
    if not paths(device):
        return f"**Not yet run on a {device.upper().replace('CUDA', 'GPU')}.**"
    parts = [f"![Roofline of the passes](images/kernels-roofline-{device}.png)"]
    for name, path in paths(device).items():
        record = plots.load(path)
        parts.append(f"### {name}\n\n{BENCHMARKS[name].about}. {_run_of(record)}\n\n{_table(record, path)}")
    return "\n\n".join(parts)


def kernels_cpu() -> str:
    return kernel_tables("cpu")


def kernels_gpu() -> str:
    return kernel_tables("cuda")


def draw() -> None:
    for device in ("cpu", "cuda"):
        if found := paths(device):
            plots.draw(list(found.values()), IMAGES)


PAGES = {
    "docs/benchmarks.md": {
        "kernels": kernel_headlines, "kernels-cpu": kernels_cpu, "kernels-gpu": kernels_gpu,
        "targets": targets.table_of_targets,
    },
}  # fmt: skip
