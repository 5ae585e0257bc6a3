"""The command `zokern`: `finetune`, `bench`, `replay` and more. What is heavy, PyTorch above all, is imported by the
commands that use it, so that --help does not wait for it.
"""

from __future__ import annotations

import importlib
from typing import Any

import typer
from typer.core import TyperGroup

from zokern import bench as measuring
from zokern.cli import journals
from zokern.cli.printing import plain_warnings, spell_out
from zokern.cli.waiting import spin_briefly

LATE = {"finetune": "zokern.cli.tuning", "bench": "zokern.bench.cli"}  # the modules whose `app` these commands are


class Late(TyperGroup):
    """Loads a command of LATE when it is called. Until then a command without options stands for it, with its help."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        spell_out()
        if name == "finetune":  # `bench` tells what torch does by itself
            spin_briefly()
        if name in LATE:
            command = typer.main.get_command(importlib.import_module(LATE[name]).app)
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        with plain_warnings():
            return super().invoke(ctx)


app = typer.Typer(
    name="zokern",
    cls=Late,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Zeroth-order fine-tuning of PyTorch models: forward passes only, at the memory of inference. Exit codes: 0, 1 "
    "for an error, 2 for a wrong command line; the help of a command has its others.",
)


@app.command()
def info() -> None:
    """Print versions, backends and why one is off, and run the self-check: the same as `python -m zokern`."""
    from zokern import report

    raise typer.Exit(report.main() or 0)


@app.command()
def finetune() -> None:
    """Fine-tune a Hugging Face model with forward passes only: to classify texts, choose among candidates, or answer.

    With no options: a sentence encoder learns to sort docstrings by topic, in about two minutes on two cores, offline.
    Several processes: torchrun --nproc-per-node 2 -m zokern finetune ... --parallel data (or directions).
    Ctrl-C, SIGTERM and SIGHUP stop the run and save what it has. --check looks at model and loss first. Exit codes: 0, 1
    for an error or what --check finds wrong, 2 for a wrong command line, 130 after Ctrl-C, 143 after SIGTERM, 129 after
    SIGHUP.
    """
    raise AssertionError("zokern.cli.tuning is called instead")


app.command()(journals.replay)
app.command()(journals.diff)
app.add_typer(journals.app, name="journal")
app.add_typer(typer.Typer(help=measuring.ABOUT), name="bench")
