"""A piece of work on a device as a CUDA graph, and what a capture that breaks leaves to be put back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Graph(Protocol):
    """A piece of work on a device that can be done again."""

    def warm_up(self, work: Callable[[], None]) -> None: ...
    def capture(self, work: Callable[[], None]) -> None: ...
    def launch(self) -> None: ...


class CudaGraph:
    """On a side stream, as captures have to be; graphs of one step share `pool`."""

    def __init__(self, device: torch.device, pool: Any) -> None:
        self.device, self.pool = device, pool
        self.stream = torch.cuda.Stream(device)
        self.graph = torch.cuda.CUDAGraph()

    def warm_up(self, work: Callable[[], None]) -> None:
        """What comes after it on the stream of the caller finds it done, also where it raises: it puts weights back."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(self.stream):
                work()
        finally:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def capture(self, work: Callable[[], None]) -> None:
        """Raises what broke the capture. torch.cuda.graph alone would say that it cannot end, and leave a lot behind."""
        broke: BaseException | None = None
        with torch.cuda.stream(self.stream):  # left whatever happens
            try:
                with torch.cuda.graph(
                    self.graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
                ):
                    try:
                        work()
                    except BaseException as first:
                        broke = first
                        raise
            except BaseException as last:
                self._clean_up()
                broke = broke or last
        if broke is not None:
            try:
                raise broke  # not where `last` is handled, which would hold on to it
            finally:
                broke = None  # this frame, too, is held by it, with all tensors of the step

    def _clean_up(self) -> None:
        """Where a capture could not end: what torch.cuda.graph would have put back."""
        try:
            end_recording(self.device, self.pool)
        except RuntimeError:  # it is not recording: the capture had ended
            return
        _broken.append(self.graph)
        # Until a capture succeeds, PyTorch's generator believes that one is under way, and eager dropout is an error.
        with contextlib.suppress(RuntimeError):
            number = torch.zeros((), device=self.device)
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.stream, capture_error_mode="thread_local"):
                number.fill_(1.0)

    def launch(self) -> None:
        self.graph.replay()


# PyTorch's allocator of pinned memory goes on asking a graph whose capture could not end, and there is no call that stops
# it: such a graph must not be freed.
_broken: list[torch.cuda.CUDAGraph] = []


def end_recording(device: torch.device, pool: Any) -> None:
    """The allocator takes no more memory from `pool`, and frees it once no graph needs it."""
    torch._C._cuda_endAllocateToPool(device.index, pool)
    torch._C._cuda_releasePool(device.index, pool)


def new_graph(device: torch.device, pool: Any) -> Graph:
    return CudaGraph(device, pool)
