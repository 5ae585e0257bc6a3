"""What a run shows while it runs: a live panel on a terminal, a plain line every so often elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from zokern.tasks.metrics import METRICS


@dataclasses.dataclass
class Status:
    """The figures of the moment. loss is smoothed; accuracy is the last evaluation's metric; memory is in bytes.
    projected_gradient: None where the method measures no slope; it is not shown then."""

    step: int = 0
    loss: float = float("nan")
    projected_gradient: float | None = float("nan")
    accuracy_before: float = float("nan")
    accuracy: float = float("nan")
    memory: int = 0
    skipped: int = 0


class Shown:
    """A stream that a run can lose: where nothing can be written, as after a terminal was closed, the run goes on. What its
    encoding lacks is spelt out."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()


class Display:
    """Use as a context; call `update` at each step that is logged. `steps_per_second` covers the last updates only."""

    def __init__(self, console: Console, total: int, title: str, metric: str = "accuracy") -> None:
        self.metric = metric
        self.console = console
        self.total = total
        self.title = title
        self.status = Status()
        self._marks: list[tuple[float, int]] = []
        self._live = Live(console=console, get_renderable=self._panel, refresh_per_second=4, transient=False)

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def begin(self, step: int) -> None:
        """The steps begin now, after `step` of them."""
        self._marks = [(time.perf_counter(), step)]

    def update(self, status: Status) -> None:
        """Show `status` from now on."""
        self.status = status
        self._marks = [*self._marks, (time.perf_counter(), status.step)][-20:]
        if not self.console.is_terminal:
            self.note(self._line())

    def assessed(self, step: int, status: Status, loss: float) -> None:
        """The metric of `status`, and the loss of the same texts, after a step: elsewhere than in the panel a line."""
        self.status = status
        if not self.console.is_terminal:
            name = self._name()
            self.note(f"step {step}/{self.total}, held-out {name} {self._figures()[name]}, loss {loss:.4f}")

    def finish(self, status: Status) -> None:
        """The last state of the live panel; plain lines have said it already."""
        self.status = status

    def note(self, text: str) -> None:
        """A line that stays."""
        say(self.console, text)

    def steps_per_second(self) -> float:
        """Speed over the last updates; 0 before the second one."""
        (begun, first), (ended, last) = self._marks[0], self._marks[-1]
        return (last - first) / (ended - begun) if last > first and ended > begun else 0.0

    def _name(self) -> str:
        return self.metric.replace("_", " ")

    def _figures(self) -> dict[str, str]:
        now, speed = self.status, self.steps_per_second() if self._marks else 0.0
        slope = now.projected_gradient
        return {
            "loss": f"{now.loss:.4f}",
            **({} if slope is None else {"projected gradient": f"{slope:+.3g}"}),
            self._name(): changed(self.metric, now.accuracy_before, now.accuracy),
            "speed": f"{speed:.2f} steps/s",
            "memory": f"{now.memory / 2**20:,.0f} MiB",
            "time left": clock((self.total - now.step) / speed) if speed else "?",
        }

    def _skipped(self) -> str:
        return f"{self.status.skipped} steps skipped: the loss was not finite" if self.status.skipped else ""

    def _line(self) -> str:
        moving = {name: value for name, value in self._figures().items() if name != self._name()}
        parts = [f"step {self.status.step}/{self.total}", *(f"{name} {value}" for name, value in moving.items())]
        return ", ".join(parts + ([self._skipped()] if self.status.skipped else []))

    def _panel(self) -> RenderableType:
        table = Table.grid(padding=(0, 3))
        figures = self._figures()
        for name in figures:
            table.add_column(min_width=max(9, len(name)))
        table.add_row(*(Text(name, style="dim") for name in figures))
        table.add_row(*(Text(value, style="bold") for value in figures.values()))
        head = Table.grid(expand=True)
        head.add_column(width=16)
        head.add_column(ratio=1)
        head.add_row(f"step {self.status.step}/{self.total}", ProgressBar(total=self.total, completed=self.status.step))
        parts: list[RenderableType] = [head, table]
        if self.status.skipped:
            parts.append(Text(self._skipped(), style="yellow"))
        return Panel(
            Group(*parts), title=self.title, title_align="left", subtitle="Ctrl-C stops and saves", padding=(0, 1)
        )


def say(console: Console, text: str) -> None:
    """A line as it stands."""
    console.print(text, highlight=False, soft_wrap=True, markup=False, emoji=False)


def measured(metric: str, value: float) -> str:
    """A metric's value: those of zokern in per cent, others as they are."""
    return percent(value) if metric in METRICS else f"{value:.4g}"


def changed(metric: str, before: float, now: float) -> str:
    """A metric's value and its change: '52.7 % (+1.2)'."""
    change = f"{100 * (now - before):+.1f}" if metric in METRICS else f"{now - before:+.4g}"
    return f"{measured(metric, now)} ({change})"


def percent(share: float) -> str:
    """0.5273 -> '52.7 %'."""
    return f"{100 * share:.1f} %"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
