"""What the command itself prints: warnings without the code that warns, and exit codes in its help."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
from typer.testing import CliRunner

from zokern import ZokernWarning
from zokern.cli import app
from zokern.cli.printing import plain_warnings

WARNS = """
import warnings, zokern
from zokern import report
from zokern.cli import app

def main():
    warnings.warn("a step moves much", zokern.ZokernWarning, stacklevel=3)
    warnings.warn("of another", UserWarning)
    raise SystemExit(3)

report.main = main
app(["info"])
"""


def test_a_warning_is_one_line_without_code() -> None:
    done = subprocess.run([sys.executable, "-c", WARNS], capture_output=True, text=True, check=False)
    first, *rest = done.stderr.splitlines()
    assert (done.returncode, first) == (3, "WARNING: a step moves much"), done.stderr
    assert "UserWarning: of another" in rest[0]
    assert "a step moves much" not in done.stdout


def test_formats_are_put_back() -> None:
    before = warnings.formatwarning
    with plain_warnings():
        assert warnings.formatwarning("x", ZokernWarning, "a.py", 1) == "WARNING: x\n"
        assert warnings.formatwarning("x", UserWarning, "a.py", 1) == before("x", UserWarning, "a.py", 1)
    with pytest.raises(KeyError), plain_warnings():
        raise KeyError
    assert warnings.formatwarning is before


@pytest.mark.parametrize(
    "command", [[], ["finetune"], ["replay"], ["diff"], ["journal", "show"]], ids=lambda command: " ".join(command)
)
def test_the_help_has_the_exit_code_of_a_wrong_command_line(command: list[str]) -> None:
    said = " ".join(CliRunner().invoke(app, [*command, "--help"]).output.split())
    assert "Exit codes: 0" in said
    assert "2 for " in said
    assert "wrong command line" in said
    assert CliRunner().invoke(app, [*command, "--no-such-option"]).exit_code == 2
