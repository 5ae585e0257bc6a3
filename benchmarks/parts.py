"""What pages are made with: stored runs, the parts between their markers, tables, pictures."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zokern.bench import model
from zokern.bench.plots import INK
from zokern.bench.record import RESULTS

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
Record = Mapping[str, Any]
Pages = Mapping[str, Mapping[str, Callable[[], str]]]  # {page, from the root: {marker: what lies between}}
WHOLE = ""  # a marker's name, for a file that is made from its first line to its last
EARLIER = ("h200",)  # folders of RESULTS with the runs of a GPU that was measured before


def load(name: str) -> dict[str, Any]:
    """A stored run, by the name of its file."""
    run: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return run


def gpus() -> dict[str, Path]:
    """{name of a GPU: the folder of its runs}, that of RESULTS itself first."""
    found: dict[str, Path] = {}
    for folder in (RESULTS, *(RESULTS / name for name in EARLIER)):
        for path in sorted(folder.glob("kernels-*-cuda.json")):
            found.setdefault(short_gpu(json.loads(path.read_text())), folder)
    return found


def short_gpu(run: Record) -> str:
    """ "H100" of a run on an NVIDIA H100 80GB HBM3; the whole name of a GPU that zokern/bench/model.py does not know."""
    name: str = run["machine"]["gpu"]
    try:
        return model.short_name(name)
    except ValueError:
        return name


def fill(page: str, text: str, parts: Mapping[str, str]) -> str:
    """`text` with what lies between each `<!-- name: begin -->` and `<!-- name: end -->` made anew."""
    for name, content in parts.items():
        if name == WHOLE:
            return content
        pattern = rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)"
        text, count = re.subn(pattern, lambda m, c=content: f"{m[1]}{c}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{page} needs one pair of markers '<!-- {name}: begin -->' and '<!-- {name}: end -->'")
    return text


def write(page: str, parts: Mapping[str, Callable[[], str]], *, check: bool) -> bool:
    """Makes a page's parts anew; whether it was as it is to be. check: change nothing."""
    path = ROOT / page
    old = path.read_text()
    new = fill(page, old, {name: make() for name, make in parts.items()})
    if new != old and not check:
        path.write_text(new)
    return new == old


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, tight: bool = False) -> str:
    """In Markdown. tight: how the line below the head is spaced, which is to stay as it is in a page."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|" if tight else f"| {' | '.join(['---'] * len(head))} |")
    return "\n".join(lines)


def signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def made_on(run: Record) -> str:
    """The processor or GPU and the versions of a run."""
    m = run["machine"]
    threads = f"{m.get('threads')} thread{'' if m.get('threads') == 1 else 's'}"
    where = m.get("gpu") or f"{threads} of an {m['processor']} ({m['instruction_sets'][0]})"
    return (
        f"One run on {where}, torch {m['torch']}, transformers {m['transformers']}, {run['date'][:10]}, "
        f"commit {run['commit'][:12]}"
    )


# ------------------------------------------------------------------------------------------------------------ pictures


def panels(columns: int, width: float, height: float, dpi: int = 110) -> tuple[Any, list[Any]]:
    """A figure and its axes, side by side. Not by pyplot, whose state is global."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def plain(axes: Any, **ticks: Any) -> None:
    """Lines across, no frame above and to the right."""
    axes.grid(axis="y", color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, **ticks)


def save(figure: Any, name: str, **how: Any) -> None:
    """Writes docs/images/NAME.png, whole or not at all."""
    temporary = IMAGES / f"{name}.tmp.png"
    figure.savefig(temporary, **how)
    os.replace(temporary, IMAGES / f"{name}.png")
