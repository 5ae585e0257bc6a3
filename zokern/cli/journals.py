"""`zokern replay`, `diff` and `journal`: a tuned model made again, and looks into journals."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from zokern.failing import end, fail

app = typer.Typer(no_args_is_help=True, help="Look into journals.")


def replay(
    base: Annotated[
        str,
        typer.Argument(
            help="What the run started from: for a run of `zokern finetune` its --model, as it was given there; "
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
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace an earlier model there, when the new one is complete; nothing else."),
    ] = False,
    device: Annotated[
        str, typer.Option(help="Where to compute: cpu, cuda or cuda:N. All give the same bits.")
    ] = "auto",
    backend: Annotated[str, typer.Option(help="One of: auto, cuda, triton, cpu, reference.")] = "auto",
) -> None:
    """Make the tuned model of a journal again, bit for bit, from its base model: no data, no forward passes.

    Exit codes: 0, 1 for an error, 2 for a wrong command line. Without --no-verify and --until, 0 means that the bits are
    those of the training: a journal that was cut off is refused. With --until that holds where the journal has a hash;
    where it has none, a warning says so.
    """
    from rich.progress import Progress

    from zokern._checks import ZokernWarning
    from zokern.finetune import failures
    from zokern.finetune.rebuild import rebuild
    from zokern.journal import JournalError, tools

    before = _identity(output)
    try:
        steps = tools.summary(journal)["steps"]
        total = until if until is not None else steps[-1] + 1 if steps else None
        with Progress(transient=True) as display, warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always", ZokernWarning)
            task = display.add_task("replay", total=total)
            done = rebuild(
                base, journal, output, until=until, verify=verify, force=force, device=device, backend=backend,
                progress=lambda step: display.update(task, completed=step),
            )  # fmt: skip
    except (JournalError, ValueError, OSError, RuntimeError) as error:
        fail(failures.reason(error) or str(error))
    except ImportError as error:
        fail(f'{error}; install what the command needs with: pip install "zokern[finetune]"')
    except KeyboardInterrupt:
        end(f"stopped; {output} is {'as it was' if _identity(output) == before else 'the new model, whole'}", 130)
    for one in noted:
        print(f"note: {one.message}")
    place = f"in {output}/" if output.is_dir() else str(output)
    print(f"{done} steps replayed; the model is {place}" + ("" if done.verified else " (not verified)"))


def show_lines(found: dict[str, Any]) -> list[str]:
    """What `zokern journal show` says of a summary (zokern.journal.tools)."""
    from zokern.journal.tools import printable

    header, losses = found["header"], [x for x in found["loss"] if x == x]
    options = ", ".join(f"{k} {v}" for k, v in header["options"].items() if v is not None)
    lines = [
        f"method      {header['method']}, {header['distribution']} noise, seed {header['seed']}, {header['placement']}",
        f"options     {options}",
        f"parameters  {found['parameters']:,} in {found['tensors']} tensors; base {header['base']}",
        f"steps       {len(found['steps'])} ({found['skipped']} skipped, {found['broken_off']} broken off)"
        + (f", {found['folds']} fold{'s' * (found['folds'] > 1)} by hand" if found["folds"] else ""),
        *([f"loss        {losses[0]:.4f} -> {losses[-1]:.4f}"] if losses else []),
        f"size        {found['bytes'] / 1000:,.1f} kB, format {found['version']}, "
        f"written by zokern {header.get('zokern', '(not said)')}",
        f"state       {found['state']}" + (f": {found['explained']}" if found["explained"] else ""),
        *[f"result      after {mark.step} steps: {mark.hash}" for mark in found["marks"][-1:]],
    ]
    return [printable(line) for line in lines]


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file or directory it is now."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


@app.command()
def show(
    journal: Annotated[Path, typer.Argument(help="A journal.")],
    plot: Annotated[Path | None, typer.Option(help="Also draw loss and lr to this PNG file.")] = None,
) -> None:
    """Say what a journal is of, in which state it is, and draw its curves.

    Exit codes: 0, 1 for an error or a journal that is damaged, 2 for a wrong command line. What can be read is shown.
    """
    from zokern.journal import JournalError, tools

    try:
        found = tools.summary(journal)
    except JournalError as error:
        fail(str(error))
    for line in show_lines(found):
        print(line)
    if plot is not None:
        try:
            tools.plot(found, plot)
        except (OSError, ValueError, ImportError) as error:  # ValueError: a kind of picture that there is not
            fail(f"--plot {str(plot)!r} cannot be drawn ({error})")
        print(f"plot        {plot}")
    if found["wrong"]:
        fail(found["wrong"])


def diff(
    a: Annotated[Path, typer.Argument(help="A journal.")], b: Annotated[Path, typer.Argument(help="Another.")]
) -> None:
    """Say where two runs first differ, and in what: settings, seed, lr, a scalar, the loss.

    Exit codes: 0 if their steps are the same, 1 if they differ, 2 for an error or a wrong command line.
    """
    from zokern.journal import JournalError, tools

    try:
        where = tools.first_difference(a, b)
    except JournalError as error:
        end(f"error: {error}", 2)
    print("the runs are the same, step by step" if where is None else f"the runs differ {where}")
    raise typer.Exit(0 if where is None else 1)
