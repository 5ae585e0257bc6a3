"""Times MeZO steps along low-rank directions inside the forward against dense steps, and against the forwards alone.

    python -m benchmarks.lowrank.speed                          # the demo's model, three shapes of a batch, two threads
    python -m benchmarks.lowrank.speed --shapes 16x32 --rank 4 --rounds 41

All candidates of a shape take turns in one run on one model: two forwards as they are, a dense step in place, a dense step
with copies (shadow), a step of this rank in place, and one of placement="forward". What is told is the median over
the rounds of each candidate's time over the forwards' of the same round. Stores benchmarks/results/lowrank-speed-cpu.json.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import track

import zokern
from benchmarks import study
from benchmarks.parts import load, made_on, table
from zokern.bench import models
from zokern.bench.record import store

SHAPES = ["16x32", "4x16", "2x16", "1x8"]
FORWARDS = "two forwards"
LR, EPS = 1e-7, 1e-3


def candidates(
    model: torch.nn.Module, closure: Callable[[], torch.Tensor], rank: int
) -> dict[str, Callable[[], object]]:
    def step(**settings: object) -> Callable[[], object]:
        opt = zokern.MeZO(model, LR, eps=EPS, **settings)
        return lambda: opt.step(closure)

    def forwards() -> None:
        with torch.no_grad():
            closure()
            closure()

    low = zokern.LowRank(rank)
    return {
        FORWARDS: forwards,
        "dense, inplace": step(placement="inplace"),
        "dense, shadow": step(placement="shadow"),
        "low rank, inplace": step(placement="inplace", distribution=low),
        "low rank, forward": step(placement="forward", distribution=low),
    }


def measure(name: str, shape: str, rank: int, rounds: int) -> dict[str, dict[str, float]]:
    """{candidate: seconds of a call, its time over the forwards' and over the dense step's of the same round: medians}."""
    model = models.build(name, torch.float32, torch.device("cpu"))
    rows, length = map(int, shape.split("x"))
    calls = candidates(model, models.closure(name, model, rows, length, torch.device("cpu")), rank)
    seconds: dict[str, list[float]] = {label: [] for label in calls}
    for number in track(range(rounds + 2), description=f"{name}, {shape}", transient=True):
        for label, call in calls.items():
            start = time.perf_counter()
            call()
            if number > 1:  # the first two warm up
                seconds[label].append(time.perf_counter() - start)

    def over(label: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[label], seconds[other], strict=True))

    return {
        label: {
            "seconds": statistics.median(own),
            "over_forwards": over(label, FORWARDS),
            "faster_than_dense": over("dense, inplace", label),
        }
        for label, own in seconds.items()
    }


def main() -> None:
    parser = study.parser(
        __doc__, model=("demo", f"one of {', '.join(models.MODELS)}"), shapes=(SHAPES, "rows x tokens of a batch"),
        rank=(1, "of the directions"), rounds=(31, "timed, of each candidate"), threads=(2, "of torch"),
    )  # fmt: skip
    args = parser.parse_args()
    if args.model not in models.MODELS:
        parser.error(f"--model is {args.model!r}; it takes {', '.join(models.MODELS)}")
    if args.rounds < 1 or args.threads < 1 or args.rank < 1:
        parser.error("--rounds, --threads and --rank must be at least 1")
    torch.set_num_threads(args.threads)
    results = {shape: measure(args.model, shape, args.rank, args.rounds) for shape in args.shapes}
    Console().print(_rows(results), highlight=False)
    settings = {"model": args.model, "rank": args.rank, "rounds": args.rounds, "lr": LR, "eps": EPS}
    print("stored in", store("lowrank-speed", torch.device("cpu"), settings, results, args.output).name)


def _rows(results: dict[str, dict[str, dict[str, float]]]) -> str:
    rows = [
        [shape.replace("x", " x "), label, f"{one['over_forwards']:.2f}", f"{one['faster_than_dense']:.2f}"]
        for shape, found in results.items()
        for label, one in found.items()
    ]
    return table(["rows x tokens", "", "over two forwards", "times faster than dense, in place"], rows)


def speed_part() -> str:
    run = load("lowrank-speed-cpu.json")
    head = f"{made_on(run)}; float32, rank {run['settings']['rank']}, medians of {run['settings']['rounds']} rounds."
    return f"{head}\n\n{_rows(run['results'])}"


PAGES = {"docs/lowrank.md": {"speed": speed_part}}

if __name__ == "__main__":
    main()
