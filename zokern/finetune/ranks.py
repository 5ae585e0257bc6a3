"""Several processes of one run: who this one is, what it does of a step, what they tell each other beside the steps.

The first rank prints, evaluates and writes; the others keep silent and have what they need from it. torch is imported where
there are several processes only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from zokern.finetune.options import FinetuneError, Options

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
WAYS = ("data", "directions")
TOGETHER = 5.0  # seconds that a rank which failed gives the first to say why


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
