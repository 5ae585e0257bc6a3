"""Fewer combinations than the full product, where what a test looks for needs only two values to meet, or none."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from tests import devices
from zokern import backends

Axis = Sequence[Any]


def pairs(*axes: Axis) -> list[tuple[Any, ...]]:
    """Rows in which every two values of two axes meet."""
    every = list(itertools.product(*(range(len(axis)) for axis in axes)))
    left = {pair for row in every for pair in itertools.combinations(enumerate(row), 2)}
    rows = []
    while left:
        best = max(every, key=lambda row: len(left & set(itertools.combinations(enumerate(row), 2))))
        left -= set(itertools.combinations(enumerate(best), 2))
        rows.append(tuple(axis[i] for axis, i in zip(axes, best, strict=True)))
    return rows


def each(*axes: Axis) -> list[tuple[Any, ...]]:
    """Rows in which every value of every axis is."""
    return [tuple(axis[i % len(axis)] for axis in axes) for i in range(max(map(len, axes)))]


def by_backend(*axes: Axis, slow: Any = pairs) -> list[tuple[Any, ...]]:
    """(backend, ...): all combinations, and on a backend whose launch takes seconds `slow` ones."""
    return [
        (backend, *row)
        for backend in backends.BACKENDS
        for row in (slow(*axes) if backend in devices.SLOW else itertools.product(*axes))
    ]


def label(value: object) -> str:
    """For ids."""
    return str(value).removeprefix("torch.")
