"""Runs a long command and says what it is at: its name, the time so far, its last line. All of its output goes to a file.

python tools/tell.py --log build/setup.log "PyTorch" pip install torch

On a terminal that is one line, which changes; elsewhere a line a minute. Where the command fails, the end of its output
follows, and the exit code is the command's. Needs Python alone: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import os
import re
import selectors
import shutil
import subprocess
import sys
import time
from pathlib import Path

SHOWN = 60  # lines of a command that failed
EVERY = 60.0  # seconds between two lines where there is no terminal


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


class Said:
    """What a command has printed: its lines, and what it is at."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.at, self._rest = "", b""

    def add(self, block: bytes) -> None:
        *whole, self._rest = re.split(rb"\r?\n|\r", self._rest + block)
        for line in whole:
            self._line(line.decode(errors="replace").rstrip())

    def end(self) -> None:
        self.add(b"\n")

    def _line(self, line: str) -> None:
        if not line:
            return
        if found := re.fullmatch(r"Progress (\d+) of (\d+)", line):  # pip's, with --progress-bar raw
            done, whole = (int(part) / 1e6 for part in found.groups())
            file = next((one for one in reversed(self.lines) if "Downloading" in one), "").strip().partition(" (")[0]
            self.at = f"{file}, {done:.0f} of {whole:.0f} MB".removeprefix(", ")
        else:
            self.at = line.strip()
            self.lines.append(line)


def tell(name: str, command: list[str], log: Path, last: int = 0) -> int:
    """The command's exit code; 130 after Ctrl-C."""
    terminal, begun, shown = sys.stdout.isatty(), time.monotonic(), time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    said = Said()
    if not terminal:
        print(f"{name} ...", flush=True)
    with log.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        except OSError as error:
            print(f"{name}: {command[0]} cannot be run: {error}", flush=True)
            return 127
        assert child.stdout is not None
        with selectors.DefaultSelector() as ready:
            ready.register(child.stdout, selectors.EVENT_READ)
            try:
                while True:
                    if ready.select(0.2):
                        if not (block := os.read(child.stdout.fileno(), 1 << 16)):
                            break
                        file.write(block)
                        said.add(block)
                    now = time.monotonic()
                    if now - shown >= (0.2 if terminal else EVERY):
                        shown = now
                        show(f"{name}: {clock(now - begun)}  {said.at}", terminal)
                code = child.wait()
            except KeyboardInterrupt:  # the command has had it too
                child.wait()
                code = 130
        said.end()
    if terminal:
        print("\r\x1b[2K", end="")
    took = clock(time.monotonic() - begun)
    for line in said.lines[-(last if code == 0 else SHOWN) :] if last or code else []:
        print(line)
    if code == 0:
        print(f"{name}: done in {took}", flush=True)
        return 0
    print(f"{name}: ended with exit code {code} after {took}. All of its output: {log}", flush=True)
    return code


def show(line: str, terminal: bool) -> None:
    if terminal:
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\x1b[2K{line[:width]}", end="", flush=True)
    else:
        print(line, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, required=True, help="the file that all output is added to")
    parser.add_argument(
        "--last", type=int, default=0, metavar="N", help="lines that are shown at its end, if it succeeds"
    )
    parser.add_argument("name", help="what is shown")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what is run, with its arguments")
    given = parser.parse_args()
    if not given.command:
        parser.error("give a command after the name")
    sys.exit(tell(given.name, given.command, given.log, given.last))
