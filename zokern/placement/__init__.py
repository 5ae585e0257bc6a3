"""Where perturbed weights live during a forward. One file each; each presents theta + eps d, d = sum_k a_k z(seed_k).

inplace: in the weights themselves. No memory; a forward's perturbation and restore each round, so 16-bit weights drift.
    Sensible for float32.
shadow: in a copy of the active parameters, which the module sees while the closure runs. The weights' own storage is
    written by updates alone: restore is free and exact. Costs the memory of the active parameters once more.
stream: as shadow, but one block at a time, written just before the block runs: the memory of the largest block and of
    what lies outside the blocks.
auto: for float32 weights inplace. Where any has 16 bits: stream if the module's blocks are found and it can serve it,
    else shadow; inplace for parameters without a module. What was chosen for 16-bit weights is printed once.

A method with a curvature h asks for `scaled` directions: theta + eps d / sqrt(h).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn

from zokern import _checks
from zokern.optim.update import Ahead, Update
from zokern.placement import stream
from zokern.placement.inplace import InPlace
from zokern.placement.shadow import Shadow
from zokern.placement.stream import Stream
from zokern.sweep import Member, Passes, Terms

PLACEMENTS = ("auto", "inplace", "shadow", "stream")
_told: set[str] = set()


class Placement(Protocol):
    """One step's life: begin, then present and update in any order, then end, which always leaves clean weights."""

    def begin(self, members: Sequence[Member], eps: Tensor, *, scaled: bool) -> None: ...
    def present(self, terms: Terms) -> AbstractContextManager[None]: ...
    def update(
        self,
        update: Update,
        ok: Tensor,
        *,
        rounding_seeds: tuple[int, int] | Tensor | None,
        stochastic: bool,
        ahead: Ahead | None = None,
    ) -> None: ...
    def end(self) -> None: ...
    def memory(self) -> list[Tensor]: ...


def choose(module: nn.Module | None, sixteen_bit: bool) -> tuple[str, str]:
    """What "auto" stands for, and why."""
    if not sixteen_bit:
        return "inplace", "float32 weights round too little to drift"
    if module is None:
        return "inplace", "there is no module to show copies to, so 16-bit weights will drift: pass the nn.Module"
    try:
        stream.refuse(module)
    except ValueError as error:
        return "shadow", f"16-bit weights stay exact; {error}"
    extra = stream.extra_bytes(module) / max(sum(p.nbytes for p in module.parameters()), 1)
    return "stream", f"16-bit weights stay exact, for {extra:.1%} of the model's memory"


def make(
    name: str, module: nn.Module | None, sixteen_bit: bool, passes: Passes, *, pipelined: bool = False
) -> Placement:
    """The placement called `name`; `sixteen_bit` says whether any parameter has a 16-bit type."""
    _checks.check_choice(name, "placement", PLACEMENTS)
    if name in ("shadow", "stream") and module is None:
        raise ValueError(
            f"placement={name!r} has to show the perturbed weights to a module: pass the nn.Module, not its parameters"
        )
    if name == "auto":
        name, reason = choose(module, sixteen_bit)
        if sixteen_bit and name not in _told:
            _told.add(name)
            print(f"zokern: placement='auto' is {name!r} here ({reason})", file=sys.stderr)
    if pipelined and (name == "inplace" or module is None):
        raise ValueError(
            "pipelined=True writes the next perturbation to copies while it updates, and placement='inplace' has none; "
            "use placement='shadow' or 'stream' with an nn.Module"
        )
    if name == "inplace" or module is None:
        return InPlace(passes)
    return Stream(module, passes) if name == "stream" else Shadow(module, passes)
