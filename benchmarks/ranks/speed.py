"""Two ranks of one thread each beside one process of two threads with twice the batch, and what an exchange takes.

    python -m benchmarks.ranks.speed                      # the demo's model, 2 x (8 x 32) rows x tokens, dense and forward
    python -m benchmarks.ranks.speed --rows 4 --windows 9

Three processes take turns in one run: the two ranks, parallel="data", each with half of the rows; and one process alone
with all of them. A window is 8 steps; what is told is the median over the windows of one's steps a second over the other's
in the same window. An exchange is timed alone too, where no rank waits for another's forward, and counted. Stores
benchmarks/results/ranks-speed-cpu.json.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from torch.distributed import FileStore  # type: ignore[attr-defined]

import zokern
from benchmarks import study
from benchmarks.parts import load, made_on, table
from zokern.bench import models
from zokern.bench.record import store

RANKS, WINDOW, EXCHANGES = 2, 8, 200
LR, EPS = 1e-7, 1e-3
WAYS: Mapping[str, Mapping[str, Any]] = {
    "dense, inplace": {"placement": "inplace"},
    "low rank, forward": {"placement": "forward", "distribution": zokern.LowRank(1)},
}


def work(rank: int | None, folder: str, name: str, rows: int, length: int, pipe: Connection) -> None:
    """One process: a rank, or None for the one that is alone. Does what it is told, and says how long it took."""
    torch.set_num_threads(RANKS if rank is None else 1)
    warnings.filterwarnings("ignore", "(?s).*was changed between two steps")
    if rank is not None:
        dist.init_process_group("gloo", store=FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    model = models.build(name, torch.float32, torch.device("cpu"))
    closure = models.closure(name, model, rows if rank is not None else RANKS * rows, length, torch.device("cpu"))
    ranks: dict[str, Any] = {"process_group": None} if rank is None else {"parallel": "data"}
    opts = {way: zokern.MeZO(model, LR, eps=EPS, **settings, **ranks) for way, settings in WAYS.items()}
    while (told := pipe.recv()) is not None:
        if told == "exchange":
            pipe.send(_exchange())
            continue
        start = time.perf_counter()
        for _ in range(WINDOW):
            opts[told].step(closure)
        pipe.send(time.perf_counter() - start)


def _exchange() -> float:
    """Seconds of one, the median of many that follow each other."""
    opt = zokern.MeZO(torch.nn.Linear(1, 1), LR, parallel="data", process_group="auto")
    ranks = opt._take_part()
    assert ranks is not None
    ranks.most = 2
    seconds = []
    for _ in range(EXCHANGES):
        start = time.perf_counter()
        ranks.exchange.gather(torch.from_numpy(ranks.header(0, 0)), 60.0, "a benchmark")
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(name: str, rows: int, length: int, windows: int) -> dict[str, dict[str, float]]:
    server, found = multiprocessing.get_context("spawn"), {}
    with tempfile.TemporaryDirectory() as folder:
        pipes: dict[int | None, Connection] = {}
        processes = []
        for rank in (*range(RANKS), None):
            pipes[rank], theirs = server.Pipe()
            processes.append(server.Process(target=work, args=(rank, folder, name, rows, length, theirs), daemon=True))
            processes[-1].start()
        several = [pipes[rank] for rank in range(RANKS)]

        def turn(pipes: list[Connection], what: str) -> float:
            for pipe in pipes:
                pipe.send(what)
            return max(pipe.recv() for pipe in pipes)

        for way in WAYS:
            seconds: list[tuple[float, float]] = []
            for number in track(range(-1, windows), description=way, transient=True):
                one, other = turn([pipes[None]], way), turn(several, way)
                if number >= 0:  # the first warms up
                    seconds.append((one / WINDOW, other / WINDOW))
            found[way] = {
                "alone": statistics.median(one for one, _ in seconds),
                "ranks": statistics.median(other for _, other in seconds),
                "steps_a_second": statistics.median(one / other for one, other in seconds),
            }
        exchange = turn(several, "exchange")
        for way in WAYS:
            found[way] |= {"exchange": exchange, "exchange_share": exchange / found[way]["ranks"]}
        for pipe in pipes.values():
            pipe.send(None)
        for process in processes:
            process.join()
    return found


def main() -> None:
    parser = study.parser(
        __doc__, model=("demo", f"one of {', '.join(models.MODELS)}"), rows=(8, "of a rank's batch"),
        length=(32, "tokens of a row"), windows=(9, f"of {WINDOW} steps, timed"),
    )  # fmt: skip
    args = parser.parse_args()
    if args.model not in models.MODELS:
        parser.error(f"--model is {args.model!r}; it takes {', '.join(models.MODELS)}")
    if min(args.rows, args.length, args.windows) < 1:
        parser.error("--rows, --length and --windows must be at least 1")
    results = measure(args.model, args.rows, args.length, args.windows)
    Console().print(_rows(results), highlight=False)
    settings = {"model": args.model, "rows": args.rows, "length": args.length, "windows": args.windows}
    path: Path = store("ranks-speed", torch.device("cpu"), settings, results, args.output)
    print("stored in", path.name)


def _rows(results: Mapping[str, Mapping[str, float]]) -> str:
    rows = [
        [way, f"{one['steps_a_second']:.2f}", f"{1e6 * one['exchange']:.0f} us", f"{one['exchange_share']:.1%}"]
        for way, one in results.items()
    ]
    return table(["", "steps a second, over one process", "an exchange", "of a step"], rows)


def part() -> str:
    run = load("ranks-speed-cpu.json")
    of = run["settings"]
    head = (
        f"{made_on(run)}; float32, two ranks of one thread with {of['rows']} x {of['length']} rows x tokens each beside "
        f"one process of two threads with {RANKS * of['rows']} x {of['length']}; medians of {of['windows']} windows of "
        f"{WINDOW} steps."
    )
    return f"{head}\n\n{_rows(run['results'])}"


PAGES = {"docs/distributed.md": {"speed": part}}

if __name__ == "__main__":
    main()
