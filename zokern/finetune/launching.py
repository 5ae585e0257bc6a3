"""Several processes of the command, as torchrun starts them: how they find each other, and end as one."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import sys
import traceback
from collections.abc import Callable, Iterator

from zokern.finetune.options import FinetuneError, Options
from zokern.finetune.ranks import Team

_runs = itertools.count()  # of this process: all ranks do the same ones
_team: Team | None = None


def launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    world = os.environ.get("WORLD_SIZE", "")
    return "RANK" in os.environ and world.isdigit() and int(world) > 1


def check(options: Options) -> None:
    """As `options.check()`, before anything is loaded. Where the results go is looked at on the first rank alone."""
    if launched() and os.environ["RANK"] != "0":
        options.check_stored()
    else:
        options.check()


def restarted(options: Options) -> bool:
    """Whether torchrun (--max-restarts) has started the processes again, and the run that broke off can go on. What is in
    --output is that run's, as it had to be empty before; with --force it may be an earlier one's."""
    if options.force or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return False
    there = [options.output / name for name in ("options.json", "journal.zkj")]
    return (_team or Team()).from_first(lambda: all(path.is_file() and path.stat().st_size > 0 for path in there))


def join(device: str = "auto") -> Team:
    """The ranks of this run; torch.distributed is initialised where a launcher has started several processes and nobody has
    done it. Raises FinetuneError where they do not find each other."""
    import torch.distributed as dist

    if not launched() and not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return Team()
    import torch

    try:
        if not dist.is_initialized():
            on_gpus = device != "cpu" and torch.cuda.is_available()
            # torchrun (2.13) has one store for all its restarts, where the ranks of an earlier one would be found.
            store, rank, size = next(dist.rendezvous("env://", timeout=datetime.timedelta(minutes=10)))  # type: ignore[attr-defined]
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"attempt_{attempt}", store)  # type: ignore[attr-defined]
            backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30), group_desc="zokern finetune")
    except (RuntimeError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise FinetuneError(f"the ranks do not find each other ({why}); start them with torchrun") from error
    store = dist.PrefixStore(f"zokern/finetune/{next(_runs)}", dist.distributed_c10d._get_default_store())  # type: ignore[attr-defined]
    return Team(dist.get_rank(), dist.get_world_size(), group, store)


@contextlib.contextmanager
def joined(device: str) -> Iterator[Team]:
    """The ranks of a run; inside `end_together` those of the command."""
    team = _team or join(device)
    try:
        yield team
    except BaseException as error:
        from zokern.distributed.exchange import RankError

        if not isinstance(error, RankError | KeyboardInterrupt):
            team.note(error)
        raise


def end_together(run: Callable[[], None], device: str, exit: type[Exception]) -> None:
    """The command on this rank: the first speaks, all end with its exit code. exit: what `run` ends with, and its code."""
    global _team
    code, error = 1, None
    _team = team = join(device)
    try:
        with contextlib.nullcontext() if team.first else _silent():
            run()
        code = 0
    except exit as ended:
        code = int(getattr(ended, "exit_code", 1))
    except BaseException as raised:
        error = raised
        if team.first:
            traceback.print_exc()
        if not team.first:
            _tell_launcher(raised)
    finally:
        _team = None
    code = team.end(code)
    if code:
        raise exit(code) from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def _tell_launcher(error: BaseException) -> None:
    """torchrun shows what a rank has raised in its own summary, with the traceback, where the rank writes it down."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ and isinstance(error, Exception):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        with contextlib.suppress(OSError):
            get_error_handler().record_exception(error)
    sys.stderr.flush()
