"""Something happens in a call of a function, counted from 1: how tests break runs off at a place."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def at_call(where: tuple[object, str], at: int, do: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the at-th call of a function does its work."""
    owner, name = where
    plain, calls = getattr(owner, name), [0]

    def call(*arguments: object, **named: object) -> object:
        calls[0] += 1
        if calls[0] == at:
            do()
        return plain(*arguments, **named)

    monkeypatch.setattr(owner, name, call)
