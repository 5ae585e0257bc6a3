"""Functions run by several processes at once, which are one gloo group on the loopback interface.

The processes come from a server that has imported torch and zokern already and started no thread, so one costs some ten
milliseconds. A function is one of a module's own, and takes what can be pickled.
"""

from __future__ import annotations

import datetime
import faulthandler
import gc
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]

from tests.methods import build
from tests.waste import no_seeds_of_what_is_not_there

# What a step and this module import besides: else each process would, for most of its time.
BESIDES = ("zokern.backends.cpu", "zokern.backends.factored", "zokern.backends.transfer", "tests.distributed.ranks")
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "torch._dynamo",
        "zokern.journal",
        "zokern._C",
        *BESIDES,
    ]
)


class Outcome(NamedTuple):
    """What became of a rank. value: what its function returned. error: the exception's class and text, "" for none. where:
    its traceback, "" where the process ended without a word. code: of the process; minus the signal that ended it. seconds:
    that it took, by its own clock where it had a word."""

    value: Any
    error: str
    where: str
    code: int | None
    seconds: float


def _rank(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world: int,
    store: str,
    timeout: float,
    join: bool,
    pipe: Connection,
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    no_seeds_of_what_is_not_there()
    gc.freeze()  # a Trainer collects garbage at each train(), for long among what the server imported
    faulthandler.enable()  # a rank that a signal ends says where it was
    if join:
        meeting, patience = FileStore(store, world), datetime.timedelta(seconds=timeout)
        dist.init_process_group("gloo", store=meeting, rank=rank, world_size=world, timeout=patience)
        # A rank whose function raises at once would end, and close its connections, while others still connect.
        meeting.set(f"joined {rank}", "")
        meeting.wait([f"joined {other}" for other in range(world)], patience)
    try:
        _send(pipe, (function(*args), "", "", time.monotonic()))
    except BaseException as error:
        # Its own clock, which is the machine's: whoever watches may see several at once, or the later one first.
        ended = time.monotonic()
        _send(pipe, (None, f"{type(error).__name__}: {error}", traceback.format_exc(), ended))
    else:
        # Until every rank's is there, and the pipe closed: one that has made a group and is done with it would end, and
        # close its connections, while others still connect to it.
        pipe.poll(None)
    finally:
        pipe.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def _send(pipe: Connection, found: tuple[Any, str, str, float]) -> None:
    """Tensors by value: a pipe's own way shares their memory, which is gone with the process that has it."""
    pipe.send_bytes(pickle.dumps(found))


def outcomes(
    world: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0, limit: float = 100.0, join: bool = True
) -> list[Outcome]:
    """function(*args) on each rank of a group of `world`; each gets its rank from torch.distributed.

    timeout: of the group's collectives, in seconds. limit: after which the processes are killed, and the test fails.
    join: into a group; else each does that itself.
    """
    began = time.monotonic()
    found: list[list[Any]] = [[None, "", ""]] * world
    ends = [began] * world
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        pipes: list[Connection] = []
        processes = []
        for rank in range(world):
            ours, theirs = _server.Pipe()
            process = _server.Process(
                target=_rank, args=(function, args, rank, world, store, timeout, join, theirs), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            left = dict(zip(pipes, range(world), strict=True))
            while left:
                ready = wait(list(left), timeout=max(began + limit - time.monotonic(), 0.0))
                if not ready:
                    pytest.fail(f"ranks {sorted(left.values())} of {function.__name__} were not done after {limit:g} s")
                for pipe in [pipe for pipe in left if pipe in ready]:
                    rank = left.pop(pipe)
                    try:
                        *found[rank], ends[rank] = pickle.loads(pipe.recv_bytes())
                    except EOFError:
                        found[rank], ends[rank] = [None, "the process ended", ""], time.monotonic()
            for pipe in pipes:
                pipe.close()
            for process in processes:
                process.join(max(began + limit - time.monotonic(), 0.1))
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                    process.join()
    return [Outcome(*found[rank], processes[rank].exitcode, ends[rank] - began) for rank in range(world)]


def run(
    world: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0, limit: float = 100.0, join: bool = True
) -> list[Any]:
    """What the function returned on each rank; fails with the traceback of each that raised."""
    found = outcomes(world, function, *args, timeout=timeout, limit=limit, join=join)
    failed = [rank for rank, outcome in enumerate(found) if outcome.error]
    if failed:
        # The first to fail first: what it says is the cause, and the others' lost connections come of it. One that ended
        # without a word is before all: its connections close before its pipe does.
        failed.sort(key=lambda rank: (found[rank].where != "", found[rank].seconds))
        pytest.fail("\n".join(_told(rank, world, found[rank]) for rank in failed))
    return [outcome.value for outcome in found]


def _told(rank: int, world: int, one: Outcome) -> str:
    ended = f"{one.error}, after {one.seconds:.1f} s, exit code {one.code}"
    return f"rank {rank} of {world}: {ended}\n{one.where}"


def alone(cls: Any, *args: Any, **options: Any) -> Any:
    """An optimizer whose closure gives the same losses on every rank, so that none is exchanged."""
    return cls(*args, process_group=None, **options)


def build_alone(case: Any, params: Any, **options: Any) -> Any:
    """tests.methods.build, likewise."""
    return build(case, params, process_group=None, **options)
