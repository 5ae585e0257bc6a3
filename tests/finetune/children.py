"""Runs of the command in processes of their own, forked from this one, so that they can be killed or run out of disk."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch._dynamo  # noqa: F401 - once, and not in each child at its first step
from torch.distributed import run as torchrun
from torch.distributed.launcher.api import elastic_launch
from typer.main import get_command

from zokern.cli import app

_listening: dict[int, threading.Thread] = {}  # to the children, by process
CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


def fork(run: Callable[[], object], said: Path) -> int:
    """The process that runs a function; what it prints goes to the file `said`. Its exit code is that of the command."""
    sys.stdout.flush()
    reading, writing = os.pipe()  # a file could be too large for the child
    child = os.fork()
    if child:
        os.close(writing)
        _listening[child] = threading.Thread(target=_listen, args=[reading, said])
        _listening[child].start()
        return child
    code = 99
    try:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        os.close(writing)
        sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = sys.__stderr__ = open(2, "w", closefd=False)  # noqa: SIM115
        try:
            run()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _listen(reading: int, said: Path) -> None:
    with os.fdopen(reading, "rb") as pipe:
        said.write_bytes(pipe.read())


def command(*arguments: object) -> Callable[[], object]:
    """`zokern` with these arguments."""
    return lambda: get_command(app).main([str(a) for a in arguments], prog_name="zokern")


def launched(run: Callable[[], object]) -> Callable[[], object]:
    """torchrun's own launcher, as its command line sets it up, but that it forks two ranks that have imported already what
    this process has; each joins the group that the launcher's variables name."""

    def rank() -> None:
        try:
            run()
        except SystemExit as end:
            if end.code:
                raise

    def late(*_: object) -> None:
        raise TimeoutError("the ranks were not done after 100 s")  # the launcher ends them

    def launch() -> None:
        signal.signal(signal.SIGALRM, late)
        signal.alarm(100)
        standalone = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", "one"]
        given = [*standalone, "--nproc-per-node", "2", "--monitor-interval", "0.1", "a program"]
        config = torchrun.config_from_args(torchrun.parse_args(given))[0]
        config.start_method = "fork"
        elastic_launch(config, rank)()

    return launch


def ended(child: int) -> int:
    """The exit code; minus the signal's number where one ended it."""
    return _coded(child, os.waitpid(child, 0)[1])


def _coded(child: int, status: int) -> int:
    _listening.pop(child).join()
    return os.waitstatus_to_exitcode(status)


def killed_after(run: Callable[[], object], said: Path, seconds: float) -> int:
    """Kills the process after some seconds, unless it has ended."""
    child, deadline = fork(run, said), time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return _coded(child, status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return ended(child)


def killed_at(run: Callable[[], object], said: Path, output: Path, number: int) -> int:
    """Kills the process before its change of that number to a file or a directory in `output`."""

    def counted() -> None:
        left = number

        def look(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event not in CHANGES or (event == "open" and not isinstance(arguments[2], int)):
                return
            if event == "open" and not int(str(arguments[2])) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
            if str(arguments[0]).startswith(str(output)):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(look)
        run()

    return ended(fork(counted, said))


def limited(run: Callable[[], object], said: Path, size: int) -> int:
    """No file can be longer than `size` bytes, as on a disk that is full."""

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        run()

    return ended(fork(full, said))
