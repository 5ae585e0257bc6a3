"""How commands end where the user can mend it."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer


def fail(message: str) -> NoReturn:
    """Says what is wrong; exit code 1."""
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(1)
