"""The command `zokern`: `finetune`, `bench`, `replay` and more. What is heavy beside PyTorch is imported by the commands,
so that --help does not wait for it.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from zokern.bench.cli import app as bench
from zokern.finetune.methods import LR_OF_UPDATE, METHODS
from zokern.finetune.options import CHOICES, FinetuneError, Options

app = typer.Typer(
    name="zokern",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Zeroth-order fine-tuning of PyTorch models: forward passes only, at the memory of inference.",
)
DEFAULT = Options()


def _option(panel: str, text: str, *names: str, name: str = "") -> Any:
    choices = f" One of: {', '.join(CHOICES[name])}." if name else ""
    return typer.Option(*names, rich_help_panel=panel, help=text + choices)


DATA, METHOD, OWN_SETTINGS, SCHEDULE = "Model and data", "Method", "Settings of some methods", "Schedule"
EVALUATION, OUTPUT, HARDWARE = "Evaluation", "Output", "Hardware"


@app.command()
def info() -> None:
    """Print versions, backends and why one is off, and run the self-check: the same as `python -m zokern`."""
    from zokern import report

    raise typer.Exit(report.main() or 0)


@app.command()
def finetune(
    model: Annotated[
        str,
        _option(
            DATA,
            "What to tune: a directory that save_pretrained wrote, a name of the Hugging Face hub, or demo, a "
            "sentence encoder of 23 million parameters that needs no download.",
        ),
    ] = DEFAULT.model,
    data: Annotated[
        str,
        _option(
            DATA,
            "Texts and labels: a .csv, .tsv or .jsonl file, a data set of the hub (name, or name:configuration), or "
            "docstrings, first sentences of the Python standard library's docstrings with the topic of their "
            "module.",
        ),
    ] = DEFAULT.data,
    objective: Annotated[
        str,
        _option(
            DATA,
            "How the model classifies. similarity: an encoder compares a text with a sentence about each label. "
            "classifier: a classification head. prompt: a language model scores each label's word after the text. "
            "auto goes by the model's configuration and says what it picked.",
            name="objective",
        ),
    ] = DEFAULT.objective,
    text_column: Annotated[str, _option(DATA, "The column that holds the texts.")] = DEFAULT.text_column,
    label_column: Annotated[str, _option(DATA, "The column that holds the labels.")] = DEFAULT.label_column,
    eval_data: Annotated[
        str | None,
        _option(
            DATA,
            "Texts to evaluate on, in any form that --data takes. Default: the validation or test part of a hub "
            "data set, else 20 % of the data, at most 400 texts, each label in its proportion.",
        ),
    ] = DEFAULT.eval_data,
    descriptions: Annotated[
        Path | None,
        _option(DATA, "For similarity: a JSON file {label: sentence}. Default: the label itself is the sentence."),
    ] = DEFAULT.descriptions,
    temperature: Annotated[
        float, _option(DATA, "For similarity: class logits are cosine similarities divided by this (above 0, no unit).")
    ] = DEFAULT.temperature,
    template: Annotated[
        str, _option(DATA, "For prompt: what the model reads before the label's word; {text} stands for the text.")
    ] = DEFAULT.template,
    verbalizers: Annotated[
        Path | None, _option(DATA, "For prompt: a JSON file {label: word}. Default: the label itself is the word.")
    ] = DEFAULT.verbalizers,
    max_length: Annotated[
        int, _option(DATA, "Longer texts are cut to this many tokens; for prompt, the template is counted in.")
    ] = DEFAULT.max_length,
    limit_train: Annotated[
        int | None, _option(DATA, "Train on this many texts at most, each label in its proportion. Default: all.")
    ] = DEFAULT.limit_train,
    limit_eval: Annotated[
        int | None, _option(DATA, "Evaluate on this many texts at most, each label in its proportion. Default: all.")
    ] = DEFAULT.limit_eval,
    method: Annotated[
        str,
        _option(
            METHOD,
            "The zeroth-order method. mezo: two forwards and plain steps. lezo: mezo on random blocks. hizoo: a diagonal "
            "curvature from one forward more. helene: momentum over a curvature with a floor. mezo-gv, mezo-greedy: the "
            "best of several candidate directions. fzoo: random signs, steps scaled by the losses' spread. es: many "
            "directions weighted by reward (here the loss with its sign changed).",
            name="method",
        ),
    ] = DEFAULT.method,
    lr: Annotated[
        float | None,
        _option(
            METHOD,
            "Learning rate, the peak of the schedule. The default suits encoders of some ten million parameters: "
            + ", ".join(f"{name} {entry.lr:g}" for name, entry in METHODS.items())
            + "; with --update "
            + ", ".join(f"{name} {lr:g}" for name, lr in LR_OF_UPDATE.items())
            + ". Billions of parameters want 1e-7 to 1e-6 with mezo.",
        ),
    ] = DEFAULT.lr,
    eps: Annotated[
        float,
        _option(
            METHOD,
            "Radius of the perturbation: losses are taken at weights + eps z and weights - eps z, z of variance 1. "
            "Published: 1e-3.",
        ),
    ] = DEFAULT.eps,
    weight_decay: Annotated[
        float, _option(METHOD, "Decoupled weight decay: each step takes lr x this share off the weights. Published: 0.")
    ] = DEFAULT.weight_decay,
    distribution: Annotated[
        str | None,
        _option(
            METHOD,
            "Distribution of the directions' elements; rademacher is +1 or -1. Default: normal, and rademacher for fzoo.",
            name="distribution",
        ),
    ] = DEFAULT.distribution,
    num_dropped: Annotated[
        int | None,
        _option(
            METHOD,
            "Blocks that a step leaves out, drawn anew each time, with any method: no pass touches them. Default: none; "
            "for lezo three quarters of the blocks, as published.",
        ),
    ] = DEFAULT.num_dropped,
    num_samples: Annotated[
        int | None,
        _option(OWN_SETTINGS, "mezo, lezo, hizoo, helene: directions a step, averaged. Published: 1."),
    ] = DEFAULT.num_samples,
    one_sided: Annotated[
        bool | None,
        _option(
            OWN_SETTINGS,
            "mezo, lezo: one forward for each direction and one at the weights. Default: two for each direction.",
            "--one-sided/--two-sided",
        ),
    ] = DEFAULT.one_sided,
    update: Annotated[
        str | None,
        _option(
            OWN_SETTINGS,
            "mezo, lezo: what is done with the gradient estimate. Default: sgd; adamezo makes Adam's moments again from "
            "the last steps' seeds.",
            name="update",
        ),
    ] = DEFAULT.update,
    beta1: Annotated[
        float | None,
        _option(OWN_SETTINGS, "mezo, lezo, helene: decay of the momentum, in [0, 1). Default: 0.9."),
    ] = DEFAULT.beta1,
    beta2: Annotated[
        float | None,
        _option(
            OWN_SETTINGS,
            "Decay of the second moment (mezo, lezo: 0.999 by default) or of the curvature (helene: 0.99), in [0, 1).",
        ),
    ] = DEFAULT.beta2,
    delta: Annotated[
        float | None,
        _option(OWN_SETTINGS, "mezo, lezo, helene: added to what an update is divided by. Default: 1e-8."),
    ] = DEFAULT.delta,
    horizon: Annotated[
        int | None,
        _option(
            OWN_SETTINGS, "mezo, lezo with --update adamezo: steps whose directions make the moments. Default: 10."
        ),
    ] = DEFAULT.horizon,
    smoothing: Annotated[
        float | None,
        _option(
            OWN_SETTINGS,
            "hizoo: weight of a step's curvature, in [0, 1). Published: 1e-8. mezo-gv, mezo-greedy: turns hizoo's "
            "curvature on, for one forward more. Default: off.",
        ),
    ] = DEFAULT.smoothing,
    curvature_dtype: Annotated[
        str | None,
        _option(
            OWN_SETTINGS,
            "hizoo, mezo-gv, mezo-greedy: storage of the curvature. Default: float32; bfloat16 is rounded stochastically.",
            name="curvature_dtype",
        ),
    ] = DEFAULT.curvature_dtype,
    anneal_steps: Annotated[
        float | None,
        _option(
            OWN_SETTINGS, "helene: steps in which the gradient's weight falls from 1 to beta1. Default: 1000 (ours)."
        ),
    ] = DEFAULT.anneal_steps,
    hessian_interval: Annotated[
        int | None,
        _option(OWN_SETTINGS, "helene: steps from one update of the curvature to the next. Default: 10 (ours)."),
    ] = DEFAULT.hessian_interval,
    gamma: Annotated[
        float | None, _option(OWN_SETTINGS, "helene: factor of the curvature, at least 0. Default: 1 (ours).")
    ] = DEFAULT.gamma,
    floor: Annotated[
        float | None,
        _option(OWN_SETTINGS, "helene: the curvature counts as this much at least (layer-wise clipping). Default: 1."),
    ] = DEFAULT.floor,
    candidates: Annotated[
        int | None,
        _option(
            OWN_SETTINGS,
            "mezo-gv, mezo-greedy: directions tried before one is taken, at least 2. Published: 4. fzoo: directions a "
            "step. Published: 8.",
        ),
    ] = DEFAULT.candidates,
    elite: Annotated[
        float | None,
        _option(OWN_SETTINGS, "mezo-gv: share of the candidates in the better group; both need one. Published: 0.5."),
    ] = DEFAULT.elite,
    num_directions: Annotated[
        int | None, _option(OWN_SETTINGS, "es: directions a step, at least 2. Published: about 30.")
    ] = DEFAULT.num_directions,
    shaping: Annotated[
        str | None,
        _option(OWN_SETTINGS, "es: how rewards become weights. Default: standardised, as published.", name="shaping"),
    ] = DEFAULT.shaping,
    antithetic: Annotated[
        bool | None,
        _option(
            OWN_SETTINGS,
            "es: try every direction both ways, twice the forwards. Default: one way.",
            "--antithetic/--not-antithetic",
        ),
    ] = DEFAULT.antithetic,
    seed: Annotated[
        int,
        _option(
            METHOD,
            "Seed of the directions, of the data order and of a new head. The held-out texts do not depend on it.",
        ),
    ] = DEFAULT.seed,
    rounding: Annotated[
        str,
        _option(
            METHOD,
            "Rounding of updated weights. auto is stochastic for 16-bit weights, where nearest would lose small "
            "updates.",
            name="rounding",
        ),
    ] = DEFAULT.rounding,
    placement: Annotated[
        str,
        _option(
            METHOD,
            "Where the perturbed weights live during a forward: in the weights' own memory, in a copy, which keeps "
            "16-bit weights exact, or (stream) in a copy of one block at a time. auto: inplace for float32.",
            name="placement",
        ),
    ] = DEFAULT.placement,
    pipelined: Annotated[
        bool,
        _option(
            METHOD,
            "Let the pass that updates the weights write the next step's first perturbation too: same bits, a sweep over "
            "memory less. For --placement shadow and stream.",
            "--pipelined",
        ),
    ] = DEFAULT.pipelined,
    backend: Annotated[
        str, _option(METHOD, "What runs the passes over the weights.", name="backend")
    ] = DEFAULT.backend,
    steps: Annotated[int, _option(SCHEDULE, "Optimizer steps.")] = DEFAULT.steps,
    batch_size: Annotated[int, _option(SCHEDULE, "Texts a forward.")] = DEFAULT.batch_size,
    accumulate: Annotated[
        int, _option(SCHEDULE, "Batches a step, averaged under one perturbation: a larger batch in the same memory.")
    ] = DEFAULT.accumulate,
    lr_schedule: Annotated[
        str,
        _option(
            SCHEDULE,
            "Course of the learning rate after the warm-up; linear and cosine fall to 0 at the last step.",
            name="lr_schedule",
        ),
    ] = DEFAULT.lr_schedule,
    warmup_steps: Annotated[
        int, _option(SCHEDULE, "Steps over which the learning rate rises to --lr.")
    ] = DEFAULT.warmup_steps,
    eval_every: Annotated[
        int, _option(EVALUATION, "Steps between evaluations; 0 for before and after only.")
    ] = DEFAULT.eval_every,
    eval_batch_size: Annotated[int, _option(EVALUATION, "Texts a forward in evaluations.")] = DEFAULT.eval_batch_size,
    log_every: Annotated[
        int, _option(EVALUATION, "Steps between lines of metrics.jsonl and updates of the display.")
    ] = DEFAULT.log_every,
    output: Annotated[
        Path, _option(OUTPUT, "Directory for checkpoint/, metrics.jsonl, curves.png and run.json.")
    ] = DEFAULT.output,
    force: Annotated[
        bool,
        _option(OUTPUT, "Replace an earlier run in a directory that is not empty; other files in it stay.", "--force"),
    ] = DEFAULT.force,
    journal: Annotated[
        bool,
        _option(
            OUTPUT,
            "Write journal.zkj: some twenty bytes a step, from which `zokern replay` makes the tuned model again and "
            "--resume goes on.",
            "--journal/--no-journal",
        ),
    ] = DEFAULT.journal,
    resume: Annotated[
        bool,
        _option(
            OUTPUT,
            "Go on with the run in --output, which broke off, from its journal: the same bits as without the break. All "
            "other options are that run's.",
            "--resume",
        ),
    ] = False,
    device: Annotated[
        str, _option(HARDWARE, "cpu, cuda or cuda:N. auto is the first GPU, where there is one.")
    ] = DEFAULT.device,
    dtype: Annotated[
        str,
        _option(
            HARDWARE,
            "Number format of the weights. auto is float32 on a CPU and the checkpoint's own on a GPU.",
            name="dtype",
        ),
    ] = DEFAULT.dtype,
    threads: Annotated[
        int | None, _option(HARDWARE, "CPU threads of torch. Default: as torch chooses.")
    ] = DEFAULT.threads,
) -> None:
    """Fine-tune a Hugging Face model on a text-classification data set, with forward passes only.

    With no options: a sentence encoder learns to sort docstrings by topic, in about two minutes on two cores, offline.
    Ctrl-C stops the run and saves what it has. Exit codes: 0, 1 for an error, 130 after Ctrl-C.
    """
    values = locals()
    options = Options(**{field.name: values[field.name] for field in dataclasses.fields(Options)})
    try:
        if resume:
            options = Options.load(output)
        else:
            options.check()
        from zokern.finetune.run import run

        summary = run(options, resume=resume)
    except FinetuneError as error:
        _fail(str(error))
    except ImportError as error:
        _fail(f'{error}; install what the command needs with: pip install "zokern[finetune]"')
    except KeyboardInterrupt:
        print("stopped before the first step; nothing was saved", file=sys.stderr)
        raise typer.Exit(130) from None
    else:
        if summary.result.interrupted:
            raise typer.Exit(130)


@app.command()
def replay(
    base: Annotated[
        str,
        typer.Argument(
            help="What the run started from: for a run of `zokern finetune` its --model (a directory, hub name, or demo); "
            "else a .safetensors file whose names are the parameters' names."
        ),
    ],
    journal: Annotated[Path, typer.Argument(help="The journal that the run wrote, journal.zkj.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the tuned model goes.")],
    until: Annotated[int | None, typer.Option(help="Do this many of the run's steps. Default: all.")] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify",
            help="Compare hashes: the base with what the run started from, the result with what training had.",
        ),
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    device: Annotated[
        str, typer.Option(help="Where to compute: cpu, cuda or cuda:N. All give the same bits.")
    ] = "auto",
    backend: Annotated[str, typer.Option(help="One of: auto, cuda, triton, cpu, reference.")] = "auto",
) -> None:
    """Make the tuned model of a journal again, bit for bit, from its base model: no data, no forward passes.

    Exit codes: 0, or 1 for an error. Without --no-verify, 0 means that the bits are those of the training.
    """
    from zokern.finetune.rebuild import rebuild
    from zokern.journal import JournalError, tools

    try:
        from rich.progress import Progress

        total = until if until is not None else len(tools.summary(journal)["steps"])
        with Progress(transient=True) as display:
            task = display.add_task("replay", total=total)
            done = rebuild(
                base, journal, output, until=until, verify=verify, force=force, device=device, backend=backend,
                progress=lambda step: display.update(task, completed=step),
            )  # fmt: skip
    except (JournalError, FinetuneError, OSError, RuntimeError) as error:
        _fail(str(error))
    print(f"{done} steps replayed; the model is {output}" + ("" if verify else " (not verified)"))


journals = typer.Typer(no_args_is_help=True, help="Look into journals.")
app.add_typer(journals, name="journal")
app.add_typer(bench, name="bench")


@journals.command()
def show(
    journal: Annotated[Path, typer.Argument(help="A journal.")],
    plot: Annotated[Path | None, typer.Option(help="Also draw loss and lr to this PNG file.")] = None,
) -> None:
    """Say what a journal is of, and draw its curves."""
    from zokern.journal import JournalError, tools

    try:
        found = tools.summary(journal)
    except JournalError as error:
        _fail(str(error))
    header, losses = found["header"], [x for x in found["loss"] if x == x]
    print(
        f"method      {header['method']}, {header['distribution']} noise, seed {header['seed']}, {header['placement']}"
    )
    print(f"options     {', '.join(f'{k} {v}' for k, v in header['options'].items() if v is not None)}")
    print(f"parameters  {found['parameters']:,} in {found['tensors']} tensors; base {header['base']}")
    print(f"steps       {len(found['steps'])} ({found['skipped']} skipped, {found['broken_off']} broken off)")
    if losses:
        print(f"loss        {losses[0]:.4f} -> {losses[-1]:.4f}")
    print(f"size        {found['bytes'] / 1000:,.1f} kB, written by zokern {header['zokern']}")
    if found["torn"]:
        print("end         its last record was cut off while it was written; the steps before it are whole")
    for mark in found["marks"][-1:]:
        print(f"result      after {mark['step']} steps: {mark['hash']}")
    if plot is not None:
        tools.plot(found, plot)
        print(f"plot        {plot}")


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="A journal.")], b: Annotated[Path, typer.Argument(help="Another.")]
) -> None:
    """Say where two runs first differ, and in what: settings, seed, lr, a scalar, the loss.

    Exit codes: 0 if their steps are the same, 1 if they differ, 2 for an error.
    """
    from zokern.journal import JournalError, tools

    try:
        where = tools.first_difference(a, b)
    except JournalError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    print("the runs are the same, step by step" if where is None else f"the runs differ {where}")
    raise typer.Exit(0 if where is None else 1)


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(1)
