"""Command lines that files of this repository contain, parsed by zokern's own CLI: options and types, nothing is run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def parse(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The name of the command that `zokern` would run, and its parameters; fails as the CLI would."""
    import typer

    from zokern.cli import app

    command, rest = typer.main.get_command(app), list(arguments)
    while hasattr(command, "commands"):
        _, command, rest = command.resolve_command(typer.Context(command), rest)
    return command.name, command.make_context(command.name, rest).params
