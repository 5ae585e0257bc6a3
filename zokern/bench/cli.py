"""`zokern bench`: times the kernels and whole steps against their peers, stores one JSON for each run, draws pictures.

The commands import what is heavy themselves, so that --help is quick. Whole steps are in commands_step.py.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from zokern.bench import commands_step
from zokern.bench.cases import BENCHMARKS, DEFAULT_DTYPES, DTYPES
from zokern.bench.shapes import MIN_ELEMENTS

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
    help="Time the kernels and whole steps on this machine, against a copy and against what PyTorch users write. Without "
    "a command: the kernels with their defaults, and pictures.\n" + TEACH,
)
Names = Annotated[
    list[str] | None,
    typer.Argument(help=f"Which benchmarks. Default: all of {', '.join(BENCHMARKS)}.", metavar="[NAMES]..."),
]
Dtype = Annotated[
    list[str] | None,
    typer.Option(
        help=f"Number format of the weights, one of {', '.join(DTYPES)}; may be given again. Default: "
        f"{' and '.join(DEFAULT_DTYPES)}."
    ),
]
Elements = Annotated[
    int | None,
    typer.Option(
        help="Weights of the model, split into tensors as an OPT model's are. Default: 33,554,432 on a CPU; on a GPU "
        "1,073,741,824, or as many as fit."
    ),
]
Rounds = Annotated[
    int | None,
    typer.Option(help="Timed calls of each way, in turn; the median is told. Default: 7 on a CPU, 30 on a GPU."),
]
Quick = Annotated[bool, typer.Option("--quick", help="A look: an eighth of the weights and 3 rounds.")]
Compiled = Annotated[
    bool | None,
    typer.Option(
        "--compiled/--no-compiled",
        help="Time torch.compile's version too; compiling takes minutes. Default: on a GPU yes, on a CPU no.",
    ),
]
TimeLimit = Annotated[
    float | None,
    typer.Option(help="Seconds after which no further pass is begun; what was timed by then is stored. Default: none."),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Directory for the JSON files and pictures.")]
Plot = Annotated[bool, typer.Option("--plot/--no-plot", help="Draw pictures at the end; needs matplotlib.")]


@app.callback()
def bench(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        run_kernels([])


@app.command(help="Time single passes.\n" + TEACH)
def kernels(
    names: Names = None,
    device: commands_step.Device = "auto",
    dtype: Dtype = None,
    elements: Elements = None,
    rounds: Rounds = None,
    quick: Quick = False,
    compiled: Compiled = None,
    time_limit: TimeLimit = None,
    output: Output = OUTPUT,
    plot: Plot = True,
) -> None:
    run_kernels(
        names or [], device=device, dtypes=dtype, elements=elements, rounds=rounds, quick=quick, compiled=compiled,
        time_limit=time_limit, output=output, plot=plot,
    )  # fmt: skip


@app.command()
def plot(
    files: Annotated[list[Path], typer.Argument(metavar="JSON...", help="Records that `zokern bench` stored.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the pictures.")] = OUTPUT,
) -> None:
    """Draw the pictures of stored runs: bars and a roofline of kernels, a step's parts, time over a model's size."""
    from zokern.bench import plots
    from zokern.bench.canvas import PlotError

    try:
        for path in plots.draw(files, output):
            print(path)
    except PlotError as error:
        _fail(str(error))


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


def run_kernels(
    names: list[str],
    *,
    device: str = "auto",
    dtypes: list[str] | None = None,
    elements: int | None = None,
    rounds: int | None = None,
    quick: bool = False,
    compiled: bool | None = None,
    time_limit: float | None = None,
    output: Path = OUTPUT,
    plot: bool = True,
) -> None:
    """Runs benchmarks by name (none: all), as the command does: progress, JSON files, tables, pictures."""
    names, dtypes = list(dict.fromkeys(names)), list(dict.fromkeys(dtypes or DEFAULT_DTYPES))
    for name in names:
        if name not in BENCHMARKS:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(BENCHMARKS)}", param_hint="NAMES")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise typer.BadParameter(f"{dtype!r} is not one of {', '.join(DTYPES)}", param_hint="--dtype")
    if elements is not None and elements < MIN_ELEMENTS:
        raise typer.BadParameter(f"{elements} is too few; at least {MIN_ELEMENTS}", param_hint="--elements")
    if rounds is not None and rounds < 1:
        raise typer.BadParameter(f"{rounds} is too few; at least 1", param_hint="--rounds")
    if time_limit is not None and not time_limit > 0:
        raise typer.BadParameter(f"{time_limit} is no time; more than 0 seconds", param_hint="--time-limit")
    for name in names:
        if not any(BENCHMARKS[name].cases(dtype) for dtype in dtypes):
            raise typer.BadParameter(
                f"{name} has nothing to time for {', '.join(dtypes)}; give a 16-bit dtype", param_hint="--dtype"
            )
    names = names or [n for n, b in BENCHMARKS.items() if any(b.cases(dtype) for dtype in dtypes)]
    if output.exists() and not output.is_dir():
        raise typer.BadParameter(f"{output} is a file; give a directory", param_hint="--output")

    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from zokern.bench import kernels, plots, tables
    from zokern.bench.canvas import PlotError, require
    from zokern.bench.devices import find_device

    if plot:
        try:
            require()
        except PlotError as error:
            _fail(str(error))
    where = find_device(device)
    size = elements or kernels.default_elements(where, names, dtypes, quick)
    if problem := kernels.check_memory(where, names, dtypes, size):
        raise typer.BadParameter(problem, param_hint="--elements")
    settings = kernels.Settings(
        device=where,
        dtypes=tuple(dtypes),
        elements=size,
        rounds=rounds or (kernels.QUICK_ROUNDS if quick else kernels.ROUNDS[where.type]),
        compiled=where.type == "cuda" if compiled is None else compiled,
        output=output,
        deadline=None if time_limit is None else time.monotonic() + time_limit,
    )
    console, paths = Console(), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            total = sum(len(BENCHMARKS[name].cases(dtype)) for name in names for dtype in dtypes)
            task = progress.add_task("passes", total=total)
            for name in names:
                path = kernels.run(name, settings, progress, lambda *_: progress.advance(task))
                paths += [path] if path else []
    except KeyboardInterrupt:
        print(f"stopped; what is finished is in {output}", file=sys.stderr)
        raise typer.Exit(130) from None
    except torch.OutOfMemoryError as error:
        _fail(f"{error}; give fewer --elements. What is finished is in {output}")
    except RuntimeError as error:
        _fail(str(error))
    if not paths or not all(plots.load(path)["complete"] for path in paths) or len(paths) < len(names):
        console.print("--time-limit: not all passes were timed", style="yellow")
    records = [plots.load(path) for path in paths]
    for record in records:
        console.print(tables.kernels(record))
    for reason in dict.fromkeys(reason for record in records for reason in tables.not_predicted(record)):
        console.print(f"no predicted share: {reason}", style="dim")
    for path in paths + (plots.draw(paths, output) if plot else []):
        console.print(f"stored {path}", soft_wrap=True)


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(1)
