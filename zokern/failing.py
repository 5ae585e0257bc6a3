"""How commands end where the user can mend it."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer


def fail(message: str) -> NoReturn:
    """Says what is wrong; exit code 1."""
    end(f"error: {message}", 1)


def end(message: str, code: int) -> NoReturn:
    """Says why there is no more; 130 is the exit code after Ctrl-C."""
    print(message, file=sys.stderr)
    raise typer.Exit(code) from None
