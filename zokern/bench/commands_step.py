"""The commands `zokern bench step` and `zokern bench scaling`: options, their checks, progress, a table.

Lists are given with commas. A value that cannot be is refused before anything is built, by the name of its option.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from zokern.bench.devices import find_device
from zokern.bench.models import MODELS
from zokern.bench.step_options import (
    choices,
    gigabytes,
    limits,
    output_path,
    refuse,
)
from zokern.bench.step_options import (
    sizes as parse_sizes,
)
from zokern.bench.step_options import (
    tokens as parse_tokens,
)
from zokern.optim import METHODS

PLACEMENTS = ("auto", "inplace", "shadow", "stream")
WAYS = (*PLACEMENTS, "shadow-pipelined", "stream-pipelined")
DTYPES = ("float32", "bfloat16", "float16")

Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N. auto is the first GPU, where there is one.")]
Placements = Annotated[
    str,
    typer.Option(
        help="Where perturbed weights live, a list of: auto, inplace, shadow, stream. auto is inplace for float32 and, "
        "for 16-bit weights, the exact placement of least memory."
    ),
]
TimeLimit = Annotated[
    float | None,
    typer.Option(
        help="Seconds after which no further case begins. What was left out is listed in the file. Default: no limit."
    ),
]
MemoryLimit = Annotated[
    float | None,
    typer.Option(help="GB that a case may take; more is recorded as 'does not fit'. Default: what is free."),
]


def _show(run: Any, visits: int, columns: Sequence[str], rows_of: Any, notes_of: Any) -> None:
    """Runs with a live bar that names the case at work, then prints the table and what is not in it."""
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    console = Console()
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("", total=visits)
        run.tick = lambda name: progress.update(bar, description=name, advance=1)
        results = run.run()
    table = Table(title=f"{run.device}, {run.budget.seconds:.0f} s", box=None, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=column in columns[:2], justify="left" if column == "case" else "right")
    for row in rows_of(results):
        table.add_row(*row)
    console.print(table)
    for line in notes_of(results):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"stored in {run.path}", highlight=False, soft_wrap=True)


def step(
    model: Annotated[
        str | None,
        typer.Option(
            help=f"Shapes to build with random weights, a list of: {', '.join(MODELS)}. Default: demo,opt-125m on a CPU, "
            "opt-1.3b on a GPU."
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help=f"A list of: {', '.join(METHODS)}, or all, with their defaults. Default: mezo,hizoo on a CPU, all "
            "on a GPU."
        ),
    ] = None,
    placements: Annotated[
        str,
        typer.Option(help=f"A list of: {', '.join(WAYS)}. The last two share a sweep between one step and the next."),
    ] = "auto",
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Batches as rows x tokens a row, a list. Default: 16x32 on a CPU, 16x32,16x256,8x1024 on a GPU."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help=f"Of the weights: {', '.join(DTYPES)}. auto: float32 on a CPU, bfloat16 on a GPU.")
    ] = "auto",
    device: Device = "auto",
    rounds: Annotated[
        int | None, typer.Option(help="Timed visits to each case, which take turns. Default: 5 on a CPU, 10 on a GPU.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps timed in a row in each visit, after one to warm up.")] = 2,
    peers: Annotated[
        bool,
        typer.Option("--peers/--no-peers", help="Time the published order of work too, and it with torch._foreach."),
    ] = True,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Time the published order under torch.compile too (slow on a CPU).")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A first look: one small model, mezo, 16x32 tokens, 2 rounds, unless given.")
    ] = False,
    time_limit: TimeLimit = None,
    memory_limit: MemoryLimit = None,
    output: Annotated[Path | None, typer.Option(help="Default: step-<device>.json in this directory.")] = None,
) -> None:
    """Time whole optimizer steps on real shapes, split into forwards, passes over the weights and everything else.

    Memory is what a step takes beyond a forward, as a share of the weights. Peers are plain PyTorch in the published
    order of work; what to quote are ratios within one run.
    """
    chosen = find_device(device)
    cpu = chosen.type == "cpu"
    names = choices(model or ("demo" if quick else "demo,opt-125m") if cpu else model or "opt-1.3b", "--model", MODELS)
    wanted = choices(methods or ("mezo" if quick else "mezo,hizoo" if cpu else "all"), "--methods", METHODS)
    shapes = parse_tokens(tokens or ("16x32" if quick or cpu else "16x32,16x256,8x1024"), names)
    of_weights = choices("float32" if cpu else "bfloat16", "--dtype", DTYPES)
    if dtype != "auto":
        of_weights = choices(dtype, "--dtype", DTYPES)
    if len(of_weights) != 1:
        raise refuse("--dtype", "one is needed; make a run for each")
    where = choices(placements, "--placements", WAYS)
    limits(rounds, steps, time_limit, memory_limit)
    path = output_path(output, "step", chosen)

    from zokern.bench import step_cases, step_tables
    from zokern.bench.step import Run

    settings = step_cases.Settings(
        names, wanted, where, shapes, of_weights[0], str(chosen), rounds or (2 if quick else 5 if cpu else 10), steps,
        peers, compiled, time_limit, gigabytes(memory_limit),
    )  # fmt: skip
    run = Run(settings, path)
    columns = step_tables.STEP_COLUMNS
    _show(run, run.visits, columns, step_tables.step_rows, lambda r: step_tables.step_notes(r, run.not_timed))


def scaling(
    sizes: Annotated[
        str | None,
        typer.Option(
            help="Parameters of the models, a list; k, M and G are thousand, million and billion. "
            "Default: 10M,30M,100M,300M,1G."
        ),
    ] = None,
    dtypes: Annotated[
        str, typer.Option(help=f"Types of the weights, a list of: {', '.join(DTYPES)}.")
    ] = "float32,bfloat16",
    methods: Annotated[str, typer.Option(help=f"A list of: {', '.join(METHODS)}, or all.")] = "mezo",
    placements: Placements = "auto",
    device: Device = "auto",
    rounds: Annotated[int | None, typer.Option(help="Timed visits to each size, which take turns. Default: 5.")] = None,
    steps: Annotated[int, typer.Option(help="Steps timed in a row in each visit.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="A first look: 1M,10M and 2 rounds, unless given.")] = False,
    time_limit: TimeLimit = None,
    memory_limit: MemoryLimit = None,
    output: Annotated[Path | None, typer.Option(help="Default: scaling-<device>.json in this directory.")] = None,
) -> None:
    """Time a step's passes for a parameter on models from ten million to a billion parameters, with their memory.

    The models are tensors in the shapes of a transformer, and their forward computes nothing: what is left of a step are
    its passes. Time for a parameter should not depend on the size.
    """
    chosen = find_device(device)
    counts = parse_sizes(sizes or ("1M,10M" if quick else "10M,30M,100M,300M,1G"))
    types = choices(dtypes, "--dtypes", DTYPES)
    wanted, where = choices(methods, "--methods", METHODS), choices(placements, "--placements", PLACEMENTS)
    limits(rounds, steps, time_limit, memory_limit)
    path = output_path(output, "scaling", chosen)

    from zokern.bench import scaling as benchmark
    from zokern.bench import step_tables

    settings = benchmark.Settings(
        counts,
        types,
        wanted,
        where,
        str(chosen),
        rounds or (2 if quick else 5),
        steps,
        time_limit,
        gigabytes(memory_limit),
    )
    visits = len(counts) * len(types) * len(wanted) * len(where) * settings.rounds
    columns, rows, notes = step_tables.SCALING_COLUMNS, step_tables.scaling_rows, step_tables.scaling_notes
    _show(benchmark.Run(settings, path), visits, columns, rows, notes)
