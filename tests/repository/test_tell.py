"""tools/tell.py: what a set-up shows while it runs, and what is left of one that fails."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "tell.py"


def run(folder: Path, *command: str, name: str = "PyTorch") -> subprocess.CompletedProcess[str]:
    told = [sys.executable, str(TOOL), "--log", str(folder / "logs" / "setup.log"), name, *command]
    return subprocess.run(told, capture_output=True, text=True, timeout=60)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_all_of_it_goes_to_the_file_and_the_end_of_it_is_told(tmp_path: Path) -> None:
    done = run(tmp_path, *python("import sys; print('one'); print('two', file=sys.stderr)"))
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"PyTorch \.\.\.\nPyTorch: done in 0:0\d\n", done.stdout)
    run(tmp_path, *python("print('three')"))
    lines = (tmp_path / "logs" / "setup.log").read_text().splitlines()
    assert [line for line in lines if not line.startswith("$ ")] == ["one", "two", "three"]
    assert sum(line.startswith(f"$ {sys.executable} -c") for line in lines) == 2


def test_a_command_that_fails_shows_its_end_and_where_the_rest_is(tmp_path: Path) -> None:
    done = run(tmp_path, *python("for i in range(100): print('line', i)\nraise SystemExit(3)"))
    assert done.returncode == 3
    lines = done.stdout.splitlines()
    assert lines[1:-1] == [f"line {i}" for i in range(40, 100)]
    assert re.fullmatch(
        rf"PyTorch: ended with exit code 3 after 0:0\d. All of its output: {tmp_path}/logs/setup.log", lines[-1]
    )


def test_the_end_of_one_that_succeeds_is_shown_where_it_is_asked_for(tmp_path: Path) -> None:
    told = [
        sys.executable,
        str(TOOL),
        "--log",
        str(tmp_path / "log"),
        "--last",
        "2",
        "tests",
        *python("print('a\\nb\\nc')"),
    ]
    done = subprocess.run(told, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[1:3] == ["b", "c"]


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    done = run(tmp_path, "no-such-command-at-all")
    assert done.returncode == 127
    assert "PyTorch: no-such-command-at-all cannot be run" in done.stdout


def test_on_a_terminal_it_is_one_line_with_the_size_of_downloads(tmp_path: Path) -> None:
    code = "import time\nprint('  Downloading torch-2.13.whl (189 MB)', flush=True)\n"
    code += "print('Progress 45000000 of 189000000', flush=True)\ntime.sleep(1)"
    ours, theirs = pty.openpty()
    told = [sys.executable, str(TOOL), "--log", str(tmp_path / "log"), "PyTorch", *python(code)]
    child = subprocess.Popen(told, stdout=theirs, env={**os.environ, "COLUMNS": "70"})
    os.close(theirs)
    said = b""
    while True:
        try:
            block = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not block:
            break
        said += block
    assert child.wait() == 0
    text = said.decode()
    assert "Downloading torch-2.13.whl, 45 of 189 MB" in text
    assert text.count("\n") == 1
    assert text.rstrip().endswith("done in 0:01") or text.rstrip().endswith("done in 0:02")
