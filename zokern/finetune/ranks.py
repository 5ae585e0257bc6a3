"""Several processes of one run, under torchrun: who this one is, what it does of a step, and how all of them end as one.

The first rank prints, evaluates and writes; the others keep silent and have what they need from it. torch is imported where
there are several processes only.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from zokern.finetune.options import FinetuneError, Options

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
WAYS = ("data", "directions")
TOGETHER = 5.0  # seconds that a rank which failed gives the first to say why
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


@dataclass
class Team:
    """The ranks of a run. group, store: torch.distributed's, for what is said beside the steps; None for one process."""

    rank: int = 0
    size: int = 1
    group: Any = None
    store: Any = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def start(self) -> str:
        """How the command is started."""
        return "zokern" if self.size == 1 else f"torchrun --nproc-per-node {self.size} -m zokern"

    def check(self, options: Options, *, resume: bool = False) -> None:
        """Raises FinetuneError where --parallel does not go with the processes that there are."""
        way = options.parallel
        if self.size > 1 and way is None and resume:
            raise FinetuneError(
                f"--resume: the run in {options.output} is one of a single process; leave out torchrun, with which there "
                f"are {self.size}"
            )
        if self.size > 1 and way is None:
            raise FinetuneError(
                f"this is a run of {self.size} processes, and nothing says what they share: give --parallel data (each "
                "rank takes its part of every batch) or --parallel directions (all take the same batch, each a share of "
                "the directions)"
            )
        if way is not None and way not in WAYS:
            raise FinetuneError(f"--parallel is {way!r}; allowed for the command: {' or '.join(WAYS)}")
        if way is not None and self.size == 1 and not resume and "RANK" not in os.environ:
            raise FinetuneError(
                f"--parallel {way} is for several processes, and this is one: start them with torchrun --nproc-per-node 2 "
                f"-m zokern finetune ... --parallel {way}, or leave it out"
            )
        if way == "data" and options.batch_size < self.size:
            raise FinetuneError(
                f"--batch-size is {options.batch_size}, which --parallel data splits, and there are {self.size} ranks; "
                f"give at least {self.size}"
            )

    def described(self, options: Options) -> str:
        """For people."""
        if options.parallel == "directions":
            return f"{self.size}, each with a share of a step's directions, on the same batch"
        sizes = [len(self._part(range(options.batch_size), rank)) for rank in range(self.size)]
        each = f"{sizes[0]}" if len(set(sizes)) == 1 else f"{sizes[0]} or {sizes[-1]}"
        return f"{self.size}, each with {each} of the {options.batch_size} of a batch"

    def local(self, device: str) -> str:
        """The device of this rank, where the option names none: by LOCAL_RANK. Raises FinetuneError where it names one."""
        if self.size == 1 or device == "cpu":
            return device
        import torch

        if device not in ("auto", "cuda"):
            raise FinetuneError(f"--device is {device!r}, and each of {self.size} ranks has its own; take cuda or cpu")
        if device == "auto" and not torch.cuda.is_available():
            return device
        local = int(os.environ.get("LOCAL_RANK", self.rank))
        if (there := torch.cuda.device_count()) <= local:
            raise FinetuneError(
                f"this machine shows {there} CUDA devices to torch, and {local + 1} ranks or more run on it; start fewer, "
                "or take --device cpu"
            )
        return f"cuda:{local}"

    # ------------------------------------------------------------------------------------------------------------ a step

    def share(self, draws: Sequence[list[int]], options: Options) -> tuple[list[list[int]], list[float] | None]:
        """This rank's micro-batches of a step's, and their weights: None where all ranks have as much."""
        if self.size == 1 or options.parallel != "data":
            return list(draws), None
        own = [self._part(draw, self.rank) for draw in draws]
        even = options.batch_size % self.size == 0
        return own, None if even else [float(len(part)) for part in own]

    def _part(self, draw: Sequence[int], rank: int) -> list[int]:
        """A rank's part of a batch; the first ones have one more where it does not go in equal parts."""
        size, more = divmod(len(draw), self.size)
        begin = rank * size + min(rank, more)
        return list(draw[begin : begin + size + (rank < more)])

    # --------------------------------------------------------------------------------------------------------- beside it

    def every(self, own: T) -> list[T]:
        """One object of each rank, on all. Raises RankError where one is lost."""
        if self.size == 1:
            return [own]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        with self._lost():
            dist.all_gather_object(found, own, group=self.group)
        return found

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first rank makes, on all; the others wait, however long that takes. Where it fails, all do.

        Raises:
            KeyboardInterrupt: where the first rank was stopped.
            RankError: on the others, for what else it has raised, or where a rank is lost.
        """
        if self.size == 1:
            return make()
        if not self.first:
            kind, value = self._sent(None)
            if kind == "stopped":
                raise KeyboardInterrupt
            if kind == "mended":
                raise FinetuneError(value)
            if kind == "raised":
                from zokern.distributed.exchange import RankError

                raise RankError(value)
            return value  # type: ignore[no-any-return]
        try:
            made = make()
        except BaseException as error:
            kind, said = "raised", f"rank 0 raised {type(error).__name__}: {error}"
            if isinstance(error, KeyboardInterrupt):
                kind = "stopped"
            elif isinstance(error, FinetuneError):
                kind, said = "mended", str(error)
            from zokern.distributed.exchange import RankError

            with contextlib.suppress(RankError):  # its own error says more
                self._sent((kind, said))
            raise
        self._sent(("made", made))
        return made

    def _sent(self, value: Any) -> Any:
        import torch.distributed as dist

        box = [value]
        with self._lost():
            dist.broadcast_object_list(box, src=0, group=self.group, device=_cpu())
        return box[0]

    @contextlib.contextmanager
    def _lost(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            from zokern.distributed.exchange import RankError

            raise RankError(f"a rank was lost (torch: {str(error).strip().splitlines()[0][:200]})") from error

    # ------------------------------------------------------------------------------------------------------------ the end

    def note(self, error: BaseException) -> None:
        """This rank has failed alone: the first one will say so."""
        if self.size > 1 and not self.first:
            what = str(error) if isinstance(error, FinetuneError) else f"{type(error).__name__}: {error}"
            self.store.set("failed", f"rank {self.rank}: {what}")

    def noted(self) -> str:
        """What a rank has said before it left; "" for nothing."""
        if self.size == 1 or not self.store.check(["failed"]):
            return ""
        return bytes(self.store.get("failed")).decode(errors="replace")

    def end(self, code: int) -> int:
        """This rank is done, or has failed; returns the code of the whole. A rank that ended before the first one would
        have torchrun end that."""
        if self.first:
            self.store.set("ended", str(code))
            return code
        limit = time.monotonic() + (TOGETHER if code else 1e7)
        with _deaf():
            while time.monotonic() < limit:
                try:
                    if self.store.check(["ended"]):
                        return int(self.store.get("ended")) or code
                except (RuntimeError, ValueError):  # the first rank is gone, and the store with it
                    break
                time.sleep(0.02)
        return code or 1


def _cpu() -> torch.device:
    import torch

    return torch.device("cpu")


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Signals are for the first rank, which is to end; the system's last one ends this process anyway."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
        raise FinetuneError(
            f"the {os.environ['WORLD_SIZE']} processes do not find each other ({str(error).strip().splitlines()[0]}); "
            "start them with torchrun"
        ) from error
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
