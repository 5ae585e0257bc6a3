"""Where perturbed weights live during a forward. One file each; each presents theta + eps d, d = sum_k a_k z(seed_k).

inplace: in the weights themselves. Least memory; a forward's perturbation and restore each round, so 16-bit weights
    drift. Sensible for float32.
shadow: in a copy of the active parameters, which the module sees while the closure runs. The weights' own storage is
    written by updates alone: restore is free and exact. Costs the memory of the active parameters once more.
auto: shadow if any active parameter has 16 bits and the optimizer was given an nn.Module; inplace otherwise.

A method with a curvature h asks for `scaled` directions: theta + eps d / sqrt(h).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn

from zokern import _checks
from zokern.optim.update import Update
from zokern.passes import Member, Passes, Terms
from zokern.placement.inplace import InPlace
from zokern.placement.shadow import Shadow

PLACEMENTS = ("auto", "inplace", "shadow")


class Placement(Protocol):
    """One step's life: begin, then present and update in any order, then end, which always leaves clean weights."""

    def begin(self, members: Sequence[Member], eps: Tensor, *, scaled: bool) -> None: ...
    def present(self, terms: Terms) -> AbstractContextManager[None]: ...
    def update(
        self, update: Update, ok: Tensor, *, rounding_seeds: tuple[int, int] | None, stochastic: bool
    ) -> None: ...
    def end(self) -> None: ...


def make(name: str, module: nn.Module | None, sixteen_bit: bool, passes: Passes) -> Placement:
    """The placement called `name`; `sixteen_bit` says whether any parameter has a 16-bit type."""
    _checks.check_choice(name, "placement", PLACEMENTS)
    if name == "shadow" and module is None:
        raise ValueError(
            "placement='shadow' has to show the perturbed weights to a module: pass the nn.Module instead of its parameters"
        )
    if name == "shadow" or (name == "auto" and sixteen_bit and module is not None):
        assert module is not None
        return Shadow(module, passes)
    return InPlace(passes)
