"""Worker processes side by side: what they say is added up, shown, and printed where something is wrong."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from . import build
from .target import Target

SAID = 8  # lines of what is wrong with one case
console = Console(soft_wrap=True)
Event = dict[str, Any]
Events = queue.Queue[tuple["Worker", Event | None]]  # None: it has ended


@dataclass
class Worker:
    """A process with a share of a target's cases."""

    target: Target
    command: list[str]
    total: int | None = None  # cases; None until it says so
    done: int = 0
    process: subprocess.Popen[str] | None = None
    text: list[str] = field(default_factory=list)  # what it says that is no event, as of a crash


def run(workers: list[Worker], jobs: int, until: float | None) -> None:
    """All of them, `jobs` at once; what is wrong is printed as it comes. Those that are left share the time that is."""
    events: Events = queue.Queue()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bars: dict[str, TaskID] = {}
        waiting, running = list(workers), 0
        try:
            while waiting or running:
                while waiting and running < jobs:
                    share = (until - time.monotonic()) / -(-len(waiting) // jobs) if until is not None else None
                    worker = waiting.pop(0)
                    if worker.target.name not in bars:
                        bars[worker.target.name] = progress.add_task(worker.target.name, total=None)
                    start(worker, events, share)
                    running += 1
                worker, event = events.get()
                if event is None:
                    running -= 1
                    finish(worker)
                else:
                    take(worker, event)
                mine = [w for w in workers if w.target is worker.target]
                total = None if any(w.total is None for w in mine) else sum(w.total or 0 for w in mine)
                progress.update(bars[worker.target.name], completed=sum(w.done for w in mine), total=total)
        finally:
            for w in workers:
                if w.process is not None and w.process.poll() is None:
                    w.process.kill()


def start(worker: Worker, events: Events, seconds: float | None) -> None:
    command = [*worker.command, *([] if seconds is None else ["--seconds", str(max(seconds, 0))])]
    worker.process = process = subprocess.Popen(
        command, cwd=build.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            events.put((worker, event_of(line)))
        process.wait()
        events.put((worker, None))

    threading.Thread(target=read, daemon=True).start()


def event_of(line: str) -> Event:
    try:
        event = json.loads(line)
    except json.JSONDecodeError:
        event = None
    return event if isinstance(event, dict) else {"text": line.rstrip()}


def take(worker: Worker, event: Event) -> None:
    target = worker.target
    if "text" in event:
        worker.text.append(event["text"])
    elif "total" in event:
        worker.total = event["total"]
    elif "case" in event:
        worker.done += 1
        target.cases += 1
        target.seconds += event["seconds"]
        if event["wrong"]:
            tell(target, event["case"], event["wrong"])
    else:
        worker.done += event["left"]
        target.left += event["left"]
        target.sizes |= event["sizes"]
        for name, blocks in event["covered"].items():
            target.covered.setdefault(name, set()).update(blocks)
        target.kernels = event["kernels"]
        for text in event["unset"]:
            tell(target, f"registers of {text}", [])


def finish(worker: Worker) -> None:
    """A worker that has not done its share is wrong, with what it said last."""
    assert worker.process is not None
    status = worker.process.returncode
    if status or worker.done != worker.total:
        what = f"a worker ended with status {status} after {worker.done} of {worker.total} cases"
        tell(worker.target, what, worker.text[-SAID:])


def tell(target: Target, case: str, wrong: list[str]) -> None:
    target.wrong[case] = wrong
    console.print(f"[red]WRONG[/]  {target.name}  {escape(case)}")
    for line in wrong[:SAID]:
        console.print(f"        {escape(line)}")
