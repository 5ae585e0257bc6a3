"""Times MeZO steps along low-rank directions inside the forward against dense steps, and against the forwards alone.

    python -m benchmarks.lowrank.speed                          # the demo's model, four shapes of a batch, two threads
    python -m benchmarks.lowrank.speed --shapes 16x32 --rank 4 --windows 9

All candidates of a shape take turns in one run on one model: two forwards as they are, a dense step in place, a dense step
with copies (shadow), a step of this rank in place, one of placement="forward", and one whose updates are folded every 8
steps. A window is 8 rounds, so that each has one fold. What is told is the median over the windows of each candidate's time
over the forwards' of the same window. Stores benchmarks/results/lowrank-speed-cpu.json.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import track

import zokern
from benchmarks import study
from benchmarks.parts import load, made_on, short_gpu, table
from zokern.bench import models
from zokern.bench.record import store

SHAPES = ["16x32", "4x16", "2x16", "1x8"]
FORWARDS, DENSE = "two forwards", "dense, inplace"
WINDOW = 8  # rounds; and steps to a fold
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
        DENSE: step(placement="inplace"),
        "dense, shadow": step(placement="shadow"),
        "low rank, inplace": step(placement="inplace", distribution=low),
        "low rank, forward": step(placement="forward", distribution=low),
        "low rank, forward, folded": step(placement="forward", distribution=low, fold_every=WINDOW),
    }


def measure(name: str, shape: str, rank: int, windows: int) -> dict[str, dict[str, float]]:
    """{candidate: seconds of a call, its time over the forwards' and over the dense step's of the same window: medians}."""
    model = models.build(name, torch.float32, torch.device("cpu"))
    rows, length = map(int, shape.split("x"))
    calls = candidates(model, models.closure(name, model, rows, length, torch.device("cpu")), rank)
    seconds: dict[str, list[float]] = {label: [0.0] * windows for label in calls}
    for number in track(range(-WINDOW, windows * WINDOW), description=f"{name}, {shape}", transient=True):
        for label, call in calls.items():
            start = time.perf_counter()
            call()
            if number >= 0:  # the first window warms up
                seconds[label][number // WINDOW] += time.perf_counter() - start

    def over(label: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[label], seconds[other], strict=True))

    return {
        label: {
            "seconds": statistics.median(own) / WINDOW,
            "over_forwards": over(label, FORWARDS),
            "faster_than_dense": over(DENSE, label),
        }
        for label, own in seconds.items()
    }


def main() -> None:
    parser = study.parser(
        __doc__, model=("demo", f"one of {', '.join(models.MODELS)}"), shapes=(SHAPES, "rows x tokens of a batch"),
        rank=(1, "of the directions"), windows=(7, "of 8 rounds, timed"), threads=(2, "of torch"),
    )  # fmt: skip
    args = parser.parse_args()
    if args.model not in models.MODELS:
        parser.error(f"--model is {args.model!r}; it takes {', '.join(models.MODELS)}")
    if args.windows < 1 or args.threads < 1 or args.rank < 1:
        parser.error("--windows, --threads and --rank must be at least 1")
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", "(?s).*was changed between two steps")  # by the other candidates
    results = {shape: measure(args.model, shape, args.rank, args.windows) for shape in args.shapes}
    Console().print(_rows(results), highlight=False)
    settings = {"model": args.model, "rank": args.rank, "windows": args.windows, "lr": LR, "eps": EPS}
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
    of = f"rank {run['settings']['rank']}, medians of {run['settings']['windows']} windows of {WINDOW} rounds"
    head = f"{made_on(run)}; float32, {of}."
    return f"{head}\n\n{_rows(run['results'])}"


MEASURED = ("step-cuda-opt-13b.json", "opt-13b 16x256"), ("step-cuda-opt-13b-16x40.json", "opt-13b 16x40")


def pays_part() -> str:
    """What is left of dense steps that were measured, without passes that low-rank directions do not need."""
    rows, runs = [], []
    for name, case in MEASURED:
        run = load(name)
        one = run["results"][f"{case} mezo inplace"]
        step, passes = one["step"]["median"], one["passes"]
        update = passes / one["passes_per_step"]
        lengths = math.prod(map(int, one["tokens"].split("x")))
        faster = [f"{step / (step - passes + left):.2f}" for left in (update, update / WINDOW)]
        rows.append([f"{lengths:,}", f"{1e3 * step:.0f} ms", f"{1e3 * passes:.0f} ms", *faster])
        runs.append(run)
    head = (
        f"OPT-13B on the {short_gpu(runs[0])}, bfloat16: a MeZO step in place, measured, and times faster, predicted:"
    )
    columns = ["tokens a direction", "dense step", "of which passes", "low rank, forward", "and folded"]
    return f"{head}\n\n{table(columns, rows)}"


def memory_part() -> str:
    """Beside inference, as `zokern bench step` has measured it."""
    results = load("step-cpu.json")["results"]
    told = [
        f"{results[f'{case} mezo forward']['extra_share']:.1%} of the weights of {name}, and "
        f"{results[f'{case} mezo forward-folds']['extra_share']:.1%} while the updates of {WINDOW} steps wait"
        for case, name in (("demo 16x32", "the demo's model"), ("opt-125m 16x32", "OPT-125M"))
    ]
    return f"[Measured](steps.md) for MeZO and rank 1: {'; '.join(told)}."


PAGES = {"docs/lowrank.md": {"speed": speed_part, "pays": pays_part, "memory": memory_part}}

if __name__ == "__main__":
    main()
