"""The order in which blocks are called in a forward, as far as the last one tells."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class Order(Generic[T]):
    """known: of the last forward that was complete. called: in this one so far."""

    def __init__(self, known: Iterable[T] = ()) -> None:
        self.known = list(known)
        self.called: list[T] = []
        self._at = 0  # of `known`: what is expected

    def begin(self) -> None:
        self.called, self._at = [], 0

    @property
    def next(self) -> T | None:
        return self.known[self._at] if self._at < len(self.known) else None

    def call(self, one: T) -> None:
        """It is called. Where another was expected, the order goes on after its next call in the last forward, or its
        first: others were left out, or a loop is longer."""
        self.called.append(one)
        if self.next is not one:
            later = range(self._at + 1, len(self.known))
            places = (i for places in (later, range(len(self.known))) for i in places if self.known[i] is one)
            self._at = next(places, len(self.known))
        self._at += 1

    def learn(self) -> None:
        """The forward is complete."""
        self.known = self.called
        self.begin()

    def rounds(self, every: list[T]) -> int:
        """How often the last forward went through all of these in this order, one after another; 0 if it did otherwise."""
        times = len(self.known) // len(every) if every else 0
        return times if self.known == every * times else 0
