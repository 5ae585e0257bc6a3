"""Side streams for the tests of prefetch=True, in the place of a device's (zokern.placement.beside.lane_of).

`Recording` does what the side stream is given at once, which is as early as events allow; `Late` does its passes when the
compute stream waits for them, and those that nothing waits for never. Both write down who waits for whom, and what nothing
keeps from being done too early: before the compute stream is done with what it reads or writes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import zokern
from tests.models import Toy
from zokern.placement import beside
from zokern.sweep import Passes


class Recording:
    """Does the work when it is given, as early as events allow. log: (stream, action), also of blocks and updates."""

    def __init__(self, device: torch.device) -> None:
        self.log: list[tuple[str, str]] = []
        self.begun = -1  # how much of the compute stream's work the side stream waits for
        self.compute = 0  # how much that one was given
        self.inside = False
        self.events = 0
        self.waited = -1  # the last event of the side stream that the compute stream has waited for
        self.unordered: list[str] = []  # work that nothing keeps from being done too early or too late

    def begin(self) -> None:
        self.log.append(("side", "waits for compute"))
        self.begun = self.compute

    def do(self, work: Callable[[], None]) -> None:
        self.log.append(("side", "fills"))
        if self.begun != self.compute:
            self.unordered.append("a fill that does not wait for what the compute stream was given")
        self.events += 1
        self.inside = True
        try:
            work()
        finally:
            self.inside = False

    def record(self) -> int:
        self.log.append(("side", f"records {self.events}"))
        return self.events

    def wait(self, event: int) -> None:
        self.log.append(("compute", f"waits for {event}"))
        self.waited = max(self.waited, event)

    def leave(self) -> None:
        self.log.append(("compute", "joins"))

    def pass_over(self, work: Callable[[], None]) -> None:
        """Of those that the side stream is given."""
        work()

    @property
    def in_flight(self) -> int:
        """Fills that the compute stream has not waited for."""
        return self.events - max(self.waited, 0)

    def given(self, what: str) -> None:
        """The compute stream is given something."""
        self.log.append(("compute", what))
        self.compute += 1


class Late(Recording):
    """queue: passes that are yet to be done, with the event behind each."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.queue: list[tuple[int, Callable[[], None]]] = []

    def pass_over(self, work: Callable[[], None]) -> None:
        self.queue.append((self.events, work))

    def wait(self, event: int) -> None:
        super().wait(event)
        while self.queue and self.queue[0][0] <= event:
            self.queue.pop(0)[1]()

    def leave(self) -> None:
        super().leave()
        self.queue.clear()


def use(monkeypatch: pytest.MonkeyPatch, kind: type[Recording]) -> list[Recording]:
    """From now on placements get lanes of this kind, which are listed; they see every pass that is done over weights."""
    made: list[Recording] = []

    def lane(device: torch.device) -> Recording:
        made.append(kind(device))
        return made[-1]

    monkeypatch.setattr(beside, "lane_of", lane)
    for name in ("run", "chain"):
        original = getattr(Passes, name)

        def noted(self: Passes, *args: Any, _original: Any = original, **named: Any) -> None:
            do = functools.partial(_original, self, *args, **named)
            if any(one.inside for one in made):
                next(one for one in made if one.inside).pass_over(do)
                return
            updates = named.get("out") is None
            for one in made:
                if updates and one.in_flight:
                    one.unordered.append("an update while a fill is in flight")
                one.given("updates" if updates else "perturbs")
            do()

        monkeypatch.setattr(Passes, name, noted)
    return made


def look_at(model: Toy, lanes: list[Recording]) -> None:
    """The lanes see the embedding run, and each block that a step moves."""
    own = [block.gain for block in model.layers]

    def ended(module: nn.Module, what: str) -> None:
        if module is model.embedding or all(module.gain is not p for p in own):
            for one in lanes:
                one.given(what)

    model.embedding.register_forward_hook(lambda module, *_: ended(module, "embeds"))
    for i, block in enumerate(model.layers):
        block.register_forward_hook(lambda module, *_, i=i: ended(module, f"runs {i}"))


def lanes_of(monkeypatch: pytest.MonkeyPatch, kind: type[Recording] | None) -> list[Recording]:
    return [] if kind is None else use(monkeypatch, kind)


def settled(lanes: list[Recording]) -> None:
    for one in lanes:
        assert not one.unordered
        assert not one.in_flight


def prefetching(model: nn.Module, **options: Any) -> Any:
    return zokern.MeZO(model, **{"lr": 1e-2, "eps": 1e-2, "placement": "stream", "prefetch": True, **options})
