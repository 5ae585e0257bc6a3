"""The commands `zokern bench step` and `zokern bench scaling`: options, progress, a table.

A value that cannot be is refused before anything is built, by the name of its option (options.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from zokern.bench import options
from zokern.bench.cases import DTYPES
from zokern.bench.models import MODELS
from zokern.optim import METHODS
from zokern.placement import PLACEMENTS

if TYPE_CHECKING:
    from zokern.bench.step import Turns

WAYS = (
    *PLACEMENTS,
    "forward-folds",
    "forward-batched",
    "shadow-pipelined",
    "stream-pipelined",
    "stream-prefetch",
    "inplace-journal",
    "shadow-journal",
)
HELP = {
    "time_limit": "Seconds after which no further case begins. What was left out is listed in the file. Default: no "
    "limit.",
    "memory_limit": "GB that a case may take; more is recorded as 'does not fit'. Default: what is free.",
}
STEP = HELP | {
    "model": f"Shapes to build with random weights, a list of: {', '.join(MODELS)}. Default: demo,opt-125m on a CPU, "
    "opt-1.3b on a GPU.",
    "methods": f"A list of: {', '.join(METHODS)}, or all, with their defaults. Default: mezo,hizoo on a CPU, all on a "
    "GPU.",
    "placements": f"A list of: {', '.join(WAYS)}. forward goes along directions of rank 1; forward-folds adds the updates "
    "of 8 steps to the weights by one pass; forward-batched evaluates all probes of a round in one forward. The "
    "pipelined ones share a sweep between one step and the next; stream-prefetch writes a block's copy while the "
    "block before runs. The last two write a journal, and so does a graph beside them then.",
    "tokens": "Batches as rows x tokens a row, a list. Default: 16x32 on a CPU, 16x32,16x256,8x1024 on a GPU.",
    "dtype": f"Of the weights: {', '.join(DTYPES)}. auto: float32 on a CPU, bfloat16 on a GPU.",
    "rounds": "Timed visits to each case, which take turns. Default: 5 on a CPU, 10 on a GPU.",
    "steps": "Steps timed in a row in each visit, after one to warm up.",
    "peers": "Time the published order of work too, and it with torch._foreach.",
    "compiled": "Time the published order under torch.compile too (slow on a CPU).",
    "quick": "A first look: one small model, mezo, 16x32 tokens, 2 rounds, unless given.",
    "output": "Default: step-<device>.json in this directory.",
}
SCALING = HELP | {
    "sizes": "Parameters of the models, a list; k, M and G are thousand, million and billion. Default: "
    "10M,30M,100M,300M,1G.",
    "dtypes": f"Types of the weights, a list of: {', '.join(DTYPES)}.",
    "methods": f"A list of: {', '.join(METHODS)}, or all.",
    "placements": f"Where perturbed weights live, a list of: {', '.join(PLACEMENTS)}. auto is inplace for float32 and, for "
    "16-bit weights, the exact placement of least memory.",
    "rounds": "Timed visits to each size, which take turns. Default: 5.",
    "steps": "Steps timed in a row in each visit.",
    "quick": "A first look: 1M,10M and 2 rounds, unless given.",
    "output": "Default: scaling-<device>.json in this directory.",
}


def _show(run: Turns, columns: Sequence[str], rows_of: Any, notes_of: Any) -> None:
    """Runs with a live bar that names the case at work, then prints the table and what is not in it."""
    from rich.console import Console
    from rich.progress import Progress

    from zokern.bench import tables

    console = Console()
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("", total=run.visits)
        run.tick = lambda name: progress.update(bar, description=name, advance=1)
        results = run.run()
    console.print(tables.steps(f"{run.device}, {run.budget.seconds:.0f} s", columns, rows_of(results)))
    for line in [*notes_of(results), f"stored in {run.path}"]:
        console.print(line, highlight=False, soft_wrap=True)


def step(
    model: Annotated[str | None, Option(help=STEP["model"])] = None,
    methods: Annotated[str | None, Option(help=STEP["methods"])] = None,
    placements: Annotated[str, Option(help=STEP["placements"])] = "auto",
    tokens: Annotated[str | None, Option(help=STEP["tokens"])] = None,
    dtype: Annotated[str, Option(help=STEP["dtype"])] = "auto",
    device: options.Device = "auto",
    rounds: Annotated[int | None, Option(help=STEP["rounds"])] = None,
    steps: Annotated[int, Option(help=STEP["steps"])] = 2,
    peers: Annotated[bool, Option("--peers/--no-peers", help=STEP["peers"])] = True,
    compiled: Annotated[bool, Option("--compiled", help=STEP["compiled"])] = False,
    quick: Annotated[bool, Option("--quick", help=STEP["quick"])] = False,
    time_limit: Annotated[float | None, Option(help=STEP["time_limit"])] = None,
    memory_limit: Annotated[float | None, Option(help=STEP["memory_limit"])] = None,
    output: Annotated[Path | None, Option(help=STEP["output"])] = None,
) -> None:
    """Time whole optimizer steps on real shapes, split into forwards, passes over the weights and everything else.

    Memory is what a step takes beyond a forward, as a share of the weights. Peers are plain PyTorch in the published
    order of work; what to quote are ratios within one run.
    """
    chosen, choices = options.find_device(device), options.choices
    cpu = chosen.type == "cpu"
    names = choices(model or ("demo" if quick else "demo,opt-125m") if cpu else model or "opt-1.3b", "--model", MODELS)
    wanted = choices(methods or ("mezo" if quick else "mezo,hizoo" if cpu else "all"), "--methods", METHODS)
    shapes = options.tokens(tokens or ("16x32" if quick or cpu else "16x32,16x256,8x1024"), names)
    types = choices(("float32" if cpu else "bfloat16") if dtype == "auto" else dtype, "--dtype", DTYPES)
    if len(types) != 1:
        raise options.refuse("--dtype", "one is needed; make a run for each")
    where = choices(placements, "--placements", WAYS)
    limits = options.limits(rounds, 2 if quick else 5 if cpu else 10, steps, time_limit, memory_limit)
    path = options.output_path(output, "step", chosen)

    from zokern.bench import tables
    from zokern.bench.step import Run
    from zokern.bench.step_cases import Settings

    settings = Settings(names, wanted, where, shapes, types[0], peers, compiled, device=str(chosen), **limits)
    run = Run(settings, path)
    _show(run, tables.STEP_COLUMNS, tables.step_rows, lambda results: tables.step_notes(results, run.not_timed))


def scaling(
    sizes: Annotated[str | None, Option(help=SCALING["sizes"])] = None,
    dtypes: Annotated[str, Option(help=SCALING["dtypes"])] = "float32,bfloat16",
    methods: Annotated[str, Option(help=SCALING["methods"])] = "mezo",
    placements: Annotated[str, Option(help=SCALING["placements"])] = "auto",
    device: options.Device = "auto",
    rounds: Annotated[int | None, Option(help=SCALING["rounds"])] = None,
    steps: Annotated[int, Option(help=SCALING["steps"])] = 1,
    quick: Annotated[bool, Option("--quick", help=SCALING["quick"])] = False,
    time_limit: Annotated[float | None, Option(help=SCALING["time_limit"])] = None,
    memory_limit: Annotated[float | None, Option(help=SCALING["memory_limit"])] = None,
    output: Annotated[Path | None, Option(help=SCALING["output"])] = None,
) -> None:
    """Time a step's passes for a parameter on models from ten million to a billion parameters, with their memory.

    The models are tensors in the shapes of a transformer, and their forward computes nothing: what is left of a step are
    its passes. Time for a parameter should not depend on the size.
    """
    chosen, choices = options.find_device(device), options.choices
    counts = options.sizes(sizes or ("1M,10M" if quick else "10M,30M,100M,300M,1G"))
    types = choices(dtypes, "--dtypes", DTYPES)
    wanted, where = choices(methods, "--methods", METHODS), choices(placements, "--placements", PLACEMENTS)
    limits = options.limits(rounds, 2 if quick else 5, steps, time_limit, memory_limit)
    path = options.output_path(output, "scaling", chosen)

    from zokern.bench import tables
    from zokern.bench.scaling import Run, Settings

    run = Run(Settings(counts, types, wanted, where, device=str(chosen), **limits), path)
    _show(run, tables.SCALING_COLUMNS, tables.scaling_rows, tables.scaling_notes)
