"""Work beside what the closure computes: a side stream for each device, and events by which two streams wait for each
other.

The compute stream is the one that is current where the closure's modules run. Nothing here asks an event or a stream
whether it is done, and the host waits for neither, so that a CUDA graph can hold all of it: within a capture the side
stream forks off by its first wait, and `join` brings it back.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch

Work = Callable[[], None]


class Lane(Protocol):
    """A compute stream and the side stream of one device.

    begin: what the side stream is given from now on waits for all that the compute stream was given before.
    do: gives it work. record: an event behind all that it was given.
    wait: what the compute stream is given from now on waits for the event.
    leave: the compute stream is the current one again, where an exception has come while `do` changed between them.
    """

    def begin(self) -> None: ...
    def do(self, work: Work) -> None: ...
    def record(self) -> Any: ...
    def wait(self, event: Any) -> None: ...
    def leave(self) -> None: ...


class AtOnce:
    """Of a device that has one stream, as a CPU: work is done when it is given, and there is nothing to wait for."""

    def begin(self) -> None:
        pass

    def do(self, work: Work) -> None:
        work()

    def record(self) -> None:
        return None

    def wait(self, event: None) -> None:
        pass

    def leave(self) -> None:
        pass


class CudaLane:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side = torch.cuda.Stream(device)
        self.compute = torch.cuda.current_stream(device)

    def begin(self) -> None:
        self.leave()  # where a closure has caught an exception that came inside `do`
        self.compute = torch.cuda.current_stream(self.device)
        self.side.wait_stream(self.compute)

    def do(self, work: Work) -> None:
        with torch.cuda.stream(self.side):
            work()

    def record(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self.side)
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def leave(self) -> None:
        if torch.cuda.current_stream(self.device) == self.side:
            with torch.cuda.device(self.device):  # set_stream changes the current device too
                torch.cuda.set_stream(self.compute)


def lane_of(device: torch.device) -> Lane:
    return CudaLane(device) if device.type == "cuda" else AtOnce()


Done = list[tuple[Lane, Any]]  # what is to be waited for


class Beside:
    """The lanes of all devices. What was given to them is to be joined before anybody else gets the memory."""

    def __init__(self) -> None:
        self.lanes: dict[torch.device, Lane] = {}
        self.given: dict[Lane, None] = {}  # lanes that have been given work since the last join

    def do(self, devices: Iterable[torch.device], work: Work) -> Done:
        """Work on tensors of these devices, behind all that their compute streams have been given."""
        lanes = [self.lanes.get(device) or self._new(device) for device in devices]
        for lane in lanes:
            self.given[lane] = None  # first, should an exception come in between
            lane.begin()
        for lane in lanes[1:]:
            work = functools.partial(lane.do, work)
        lanes[0].do(work)
        return [(lane, lane.record()) for lane in lanes]

    def _new(self, device: torch.device) -> Lane:
        self.lanes[device] = lane_of(device)
        return self.lanes[device]

    def wait(self, done: Done) -> None:
        for lane, event in done:
            lane.wait(event)

    def join(self) -> None:
        """The compute streams wait for everything that was given; also for what an exception has left half done."""
        for lane in self.given:
            lane.leave()
            lane.wait(lane.record())
        self.given = {}

    def give_up(self) -> None:
        """`join`, where an exception is on its way that says more than one of a stream: of a capture that it has broken,
        which no longer takes events."""
        with contextlib.suppress(RuntimeError):
            self.join()
        self.given = {}
