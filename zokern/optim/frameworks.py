"""What frameworks around a step do that loses work in silence. No framework is imported here."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

import torch

from zokern.optim import causes

CLOSURES = ("lightning.pytorch.loops.optimization.automatic", "pytorch_lightning.loops.optimization.automatic")


def bare(optimizer: Any) -> Any:
    """The optimizer inside the wrappers that accelerate or Lightning put around it."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def refuse_automatic(closure: object) -> None:
    """
    Raises:
        TypeError: for the closure of Lightning's automatic optimization, which runs a backward pass in each forward, also
            where partials are around it.
    """
    inside = [closure]
    while inside:
        one = inside.pop()
        if isinstance(one, functools.partial):
            inside += [one.func, *one.args, *one.keywords.values()]
        elif type(one).__module__ in CLOSURES:
            raise TypeError(causes.AUTOMATIC)


def loses_batches() -> int:
    """accelerate's number of accumulation steps, where its own wrapper makes this step: it hands on the last closure of
    each accumulation alone. Otherwise 0. To be asked inside a step."""
    state = sys.modules.get("accelerate.state")
    shared = {} if state is None else state.GradientState._shared_state
    steps = int(shared.get("plugin_kwargs", {}).get("num_steps") or 1)
    return steps if steps > 1 and any(name == "accelerate.optimizer" for name in _callers()) else 0


def _callers() -> Iterator[str]:
    """The modules of the functions that have led here, the last one first."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        yield frame.f_globals.get("__name__", "")
