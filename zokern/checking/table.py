"""A result as people read it: tables of rich."""

from __future__ import annotations

import io
import re

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from zokern.checking.cost import Cost
from zokern.checking.result import NO_EFFECT, NOT_LOOKED_AT, NOT_TRAINED, REACTS, Result, Row

WIDTH = 118
Key = tuple[str, str, str, bool]


def as_text(result: Result) -> str:
    # In a notebook rich would show the text there, and leave the file empty.
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, force_jupyter=False)
    console.print(rendered(result))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def rendered(result: Result) -> RenderableType:
    head = Text(f"zokern.check: {_head(result)}", style="bold")
    return Group(head, _tensors(result), _verdicts(result), _cost(result.cost, result.placement))


def _tensors(result: Result) -> Table:
    table = Table()
    for name in ("tensors", "dtype", "changed by eps z", "loss"):
        table.add_column(name, no_wrap=name in ("dtype", "changed by eps z"), overflow="fold")
    for (state, dtype, why, suspicious), rows in _grouped(result).items():
        said = f"{state}: {why}" if why else state
        if state == REACTS:
            sizes = [row.size for row in rows if row.size is not None]
            said += f" at {min(sizes):.2g}" + (f" to {max(sizes):.2g}" if max(sizes) > min(sizes) else "")
        elif state == NO_EFFECT:
            said = f"{state} up to {max(row.size or 0.0 for row in rows):.2g}: {why}"
        moved = [row.moved for row in rows if row.moved is not None]
        share = "" if not moved else _share(min(moved), max(moved))
        style = "red" if suspicious else "dim" if state in (NOT_TRAINED, NOT_LOOKED_AT) else ""
        table.add_row(_Names(_names(rows), style), *(Text(text, style=style) for text in (dtype, share, said)))
    return table


class _Names:
    """Lines with names of tensors. One that is too long for its column goes on after a dot, where it has one."""

    def __init__(self, lines: list[str], style: str) -> None:
        self.lines, self.style = lines, style

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        widest = max(map(cell_len, self.lines))
        return Measurement(min(widest, 12), widest).with_maximum(options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.lines:
            yield Text(wrapped(line, options.max_width), style=self.style, overflow="fold")


def wrapped(line: str, width: int) -> str:
    """In lines of `width` cells, each but the last up to a dot or a blank; a part that is longer stays whole."""
    done = [""]
    for part in re.findall(r"[^. ]*[. ]?", line):
        if done[-1].strip() and cell_len(done[-1] + part.rstrip()) > width:
            done.append("  ")
        done[-1] += part
    return "\n".join(one.rstrip() for one in done)


def _head(result: Result) -> str:
    at = "" if result.looked_at == result.trainable else f" of {result.trainable}"
    return (
        f"{result.looked_at}{at} tensors perturbed, eps {result.eps:g}, placement {result.placement}, "
        f"{result.forwards} forwards in {result.seconds:.1f} s"
    )


def _share(low: float, high: float) -> str:
    return f"{low:.0%}" if f"{low:.0%}" == f"{high:.0%}" else f"{low:.0%} to {high:.0%}"


def _grouped(result: Result) -> dict[Key, list[Row]]:
    """Rows of which the same is said, faults first, then reactions."""
    found: dict[Key, list[Row]] = {}
    for row in result.rows:
        dtype = str(row.dtype).removeprefix("torch.")
        found.setdefault((row.state, dtype, row.why, row.suspicious), []).append(row)
    order = (REACTS, NO_EFFECT, NOT_TRAINED, NOT_LOOKED_AT)
    return {key: found[key] for key in sorted(found, key=lambda key: (not key[3], order.index(key[0])))}


def _names(rows: list[Row]) -> list[str]:
    """Names that differ in numbers alone are one: layers.*.key.bias (12)."""
    patterns: dict[str, list[str]] = {}
    for row in rows:
        name = " = ".join(row.names)
        patterns.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    shown = [f"{pattern} ({len(names)})" if len(names) > 1 else names[0] for pattern, names in patterns.items()]
    most = 12 if rows[0].suspicious else 6
    return shown[:most] + ([f"and {len(shown) - most} kinds more"] if len(shown) > most else [])


def _verdicts(result: Result) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_row("", "loss", f"{result.loss:.6g}" + (", the same bits twice" if result.same_twice else ""))
    for one in result.verdicts:
        style = "red" if one.suspicious else ""
        table.add_row(*(Text(text, style=style) for text in ("!" if one.suspicious else "", one.subject, one.text)))
    table.add_row(
        "", "verdict", Text("nothing suspicious was seen" if result.ok else "something is likely wrong: see above")
    )
    return table


def _cost(cost: Cost, placement: str) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column()
    passes = ", ".join(f"{count:.3g} ({name})" for name, count in cost.passes.items())
    memory = ", ".join(
        f"{name} {'cannot serve this model' if size is None else f'{size / 1e6:,.1f} MB'}"
        for name, size in cost.memory.items()
    )
    table.add_row("a step", f"{cost.method}: {cost.forwards} forwards, about {cost.seconds:.3g} s of forwards here")
    table.add_row("", f"passes over the weights: {passes}")
    table.add_row("", f"memory beside the forward: {memory}")
    sizes = f"trainable weights {cost.weights / 1e6:,.1f} MB, optimizer states {cost.states / 1e6:,.1f} MB"
    table.add_row("", f"{sizes}; placement here: {placement}")
    return table
