"""`zokern bench`: times the kernels and whole steps against their peers, stores one JSON for each run, draws pictures.

The commands import what is heavy themselves, so that --help is quick. Whole steps are in commands_step.py.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from zokern.bench import ABOUT, commands_step, options
from zokern.bench.cases import BENCHMARKS, DEFAULT_DTYPES, DTYPES, cases_of
from zokern.bench.shapes import MIN_ELEMENTS
from zokern.failing import end, fail

if TYPE_CHECKING:
    from zokern.bench.kernels import Settings

OUTPUT = Path("bench-out")
TEACH = """
What the figures mean. A pass must read and write each weight once (and each state that it needs): those bytes over its
time are its **GB/s**. **% of copy** compares them with a plain copy of as many bytes, timed in the same run: 100 % is
memory speed, and a pass cannot do much better. (On a CPU it can a little: a copy into other memory fetches what it
overwrites.) **published** is the way of the released MeZO code in plain torch (draw z, scale it, add it), **foreach** the
same with `torch._foreach_*`, **compiled** the same under torch.compile. **predicted**, on a GPU: what the kernel's
instructions leave of the copy's bandwidth. Machines drift: quote ratios within one run.
"""

app = typer.Typer(
    name="bench",
    invoke_without_command=True,
    rich_markup_mode="markdown",
    help=f"{ABOUT} Without a command: the kernels with their defaults, and pictures.\n{TEACH}",
)
HELP = {
    "names": f"Which benchmarks. Default: all of {', '.join(BENCHMARKS)}.",
    "dtype": f"Number format of the weights, one of {', '.join(DTYPES)}; may be given again. Default: "
    f"{' and '.join(DEFAULT_DTYPES)}.",
    "elements": "Weights of the model, split into tensors as an OPT model's are. Default: 33,554,432 on a CPU; on a GPU "
    "1,073,741,824, or as many as fit.",
    "rounds": "Timed calls of each way, in turn; the median is told. Default: 7 on a CPU, 30 on a GPU.",
    "quick": "A look: an eighth of the weights and 3 rounds.",
    "compiled": "Time torch.compile's version too; compiling takes minutes. Default: on a GPU yes, on a CPU no.",
    "time_limit": "Seconds after which no further pass is begun; what was timed by then is stored. Default: none.",
    "output": "Directory for the JSON files and pictures.",
    "plot": "Draw pictures at the end; needs matplotlib.",
}


@app.callback()
def bench(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        kernels()


@app.command(help="Time single passes.\n" + TEACH)
def kernels(
    names: Annotated[list[str] | None, Argument(help=HELP["names"], metavar="[NAMES]...")] = None,
    device: options.Device = "auto",
    dtype: Annotated[list[str] | None, Option(help=HELP["dtype"])] = None,
    elements: Annotated[int | None, Option(help=HELP["elements"])] = None,
    rounds: Annotated[int | None, Option(help=HELP["rounds"])] = None,
    quick: Annotated[bool, Option("--quick", help=HELP["quick"])] = False,
    compiled: Annotated[bool | None, Option("--compiled/--no-compiled", help=HELP["compiled"])] = None,
    time_limit: Annotated[float | None, Option(help=HELP["time_limit"])] = None,
    output: Annotated[Path, Option("--output", "-o", help=HELP["output"])] = OUTPUT,
    plot: Annotated[bool, Option("--plot/--no-plot", help=HELP["plot"])] = True,
) -> None:
    chosen, dtypes = _chosen(names, dtype)
    _check(elements, rounds, time_limit, output)

    from zokern.bench import kernels as benchmark
    from zokern.bench import plots

    if plot:
        try:
            plots.require()
        except plots.PlotError as error:
            fail(str(error))
    where = options.find_device(device)
    size = elements or benchmark.default_elements(where, chosen, dtypes, quick)
    if problem := benchmark.check_memory(where, chosen, dtypes, size):
        raise options.refuse("--elements", problem)
    settings = benchmark.Settings(
        device=where,
        dtypes=dtypes,
        elements=size,
        rounds=rounds or (benchmark.QUICK_ROUNDS if quick else benchmark.ROUNDS[where.type]),
        compiled=where.type == "cuda" if compiled is None else compiled,
        output=output,
        deadline=None if time_limit is None else time.monotonic() + time_limit,
    )
    _tell(_run(chosen, settings), len(chosen), output if plot else None)


def _chosen(names: list[str] | None, dtype: list[str] | None) -> tuple[list[str], tuple[str, ...]]:
    """Benchmarks (none given: all that have something to time) and dtypes, each once."""
    names, dtypes = list(dict.fromkeys(names or ())), tuple(dict.fromkeys(dtype or DEFAULT_DTYPES))
    for option, given, allowed in (("NAMES", names, BENCHMARKS), ("--dtype", dtypes, DTYPES)):
        for name in given:
            if name not in allowed:
                raise options.refuse(option, f"{name!r} is not one of {', '.join(allowed)}")
    full = [name for name in BENCHMARKS if cases_of([name], dtypes)]
    for name in names:
        if name not in full:
            raise options.refuse("--dtype", f"{name} has nothing to time for {', '.join(dtypes)}; give a 16-bit dtype")
    return names or full, dtypes


def _check(elements: int | None, rounds: int | None, time_limit: float | None, output: Path) -> None:
    if elements is not None and elements < MIN_ELEMENTS:
        raise options.refuse("--elements", f"{elements} is too few; at least {MIN_ELEMENTS}")
    if rounds is not None and rounds < 1:
        raise options.refuse("--rounds", f"{rounds} is too few; at least 1")
    if time_limit is not None and not time_limit > 0:
        raise options.refuse("--time-limit", f"{time_limit} is no time; more than 0 seconds")
    if output.exists() and not output.is_dir():
        raise options.refuse("--output", f"{output} is a file; give a directory")


def _run(names: list[str], settings: Settings) -> list[Path]:
    """Runs the benchmarks with a live bar; the paths of their files."""
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from zokern.bench import kernels as benchmark

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, transient=True) as progress:
            task = progress.add_task("passes", total=len(cases_of(names, settings.dtypes)))
            paths = [benchmark.run(name, settings, progress, lambda *_: progress.advance(task)) for name in names]
    except KeyboardInterrupt:
        end(f"stopped; what is finished is in {settings.output}", 130)
    except torch.OutOfMemoryError as error:
        fail(f"{error}; give fewer --elements. What is finished is in {settings.output}")
    except RuntimeError as error:
        fail(str(error))
    return [path for path in paths if path is not None]


def _tell(paths: list[Path], wanted: int, pictures: Path | None) -> None:
    """Prints the tables of runs and what is not in them, and draws into `pictures`."""
    from rich.console import Console

    from zokern.bench import plots, tables

    console, records = Console(), [plots.load(path) for path in paths]
    if len(records) < wanted or not all(record["complete"] for record in records):
        console.print("--time-limit: not all passes were timed", style="yellow")
    for record in records:
        console.print(tables.kernels(record))
    for reason in dict.fromkeys(reason for record in records for reason in tables.not_predicted(record)):
        console.print(f"no predicted share: {reason}", style="dim")
    for path in paths + (plots.draw(paths, pictures) if pictures else []):
        console.print(f"stored {path}", soft_wrap=True)


@app.command()
def plot(
    files: Annotated[list[Path], Argument(metavar="JSON...", help="Records that `zokern bench` stored.")],
    output: Annotated[Path, Option("--output", "-o", help="Directory for the pictures.")] = OUTPUT,
) -> None:
    """Draw the pictures of stored runs: bars and a roofline of kernels, a step's parts, time over a model's size."""
    from zokern.bench import plots

    try:
        for path in plots.draw(files, output):
            print(path)
    except plots.PlotError as error:
        fail(str(error))


@app.command(name="list")
def list_() -> None:
    """List the kernel benchmarks, and their passes."""
    from rich.console import Console
    from rich.table import Table

    table = Table("benchmark", "what it times", "passes, for each dtype")
    for name, benchmark in BENCHMARKS.items():
        cases = benchmark.cases("bfloat16")
        table.add_row(name, benchmark.about, "\n".join(case.label for case in cases))
    Console().print(table)


app.command()(commands_step.step)
app.command()(commands_step.scaling)
