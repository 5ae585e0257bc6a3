"""What a placement is, zokern's or yours: `placement=` takes a name, or an object that has these methods."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from zokern.contract.rules import RULES
from zokern.passes.spec import AXPY, pass_spec
from zokern.passes.update import CPU, Terms, Update
from zokern.sweep import NOTHING, Passes, Sweep


class Refused(Exception):
    """A placement cannot serve a module or a closure. shadow_serves: with placement="shadow" it would be served."""

    shadow_serves = True


class RefusedCall(Refused, RuntimeError):
    """What the closure does."""


class RefusedModule(Refused, ValueError):
    """What the module is."""


class NotSeen(RefusedCall):
    """What runs does not look at the module's own parameters, so that no copy of them would be seen."""

    shadow_serves = False


@dataclass(frozen=True)
class Rounding:
    """How the update of a step is rounded: "nearest" or "stochastic"; seeds int64 [2], of the weights and of a state."""

    name: str
    seeds: Tensor


@dataclass(frozen=True)
class Ahead:
    """What the next step begins with, as far as it is known: its members, and the direction of its first probe."""

    sweep: Sweep
    terms: Terms


@runtime_checkable
class Placement(Protocol):
    """Where perturbed weights live during a forward. One step's life: begin, then present and update in any order, then
    end, which always leaves clean weights, whatever was raised.

    bind: once, before the first step: the module whose parameters are trained, or None, and what does the passes.
    begin: the step's active parameters; eps float64 [R], a row each; scaled: directions are divided by the root of the
        state "h".
    present: inside, forwards see theta + eps d, d = sum_k a_k z(seed_k) with a_k = terms[seed_k]; {} is theta itself.
        Afterwards weights may still be perturbed: only update and end clean them.
    update: the step's last pass. ok, 0-d bool, on the device of the losses: a step that is not ok moves nothing. The gate
        of the passes is in it already. Once its first launch is made the step counts as done: what can fail comes before.
    end: may be called again, where it has failed.
    memory: what is kept for copies between steps. name: what a journal says of it.
    """

    name: str

    def bind(self, module: nn.Module | None, passes: Passes) -> None: ...
    def begin(self, sweep: Sweep, eps: Tensor, *, scaled: bool) -> None: ...
    def present(self, terms: Terms) -> AbstractContextManager[None]: ...
    def update(self, update: Update, ok: Tensor, rounding: Rounding, ahead: Ahead | None = None) -> None: ...
    def end(self) -> None: ...
    def memory(self) -> list[Tensor]: ...


class Perturbing:
    """What zokern's own placements share: the step that is under way, and the passes that perturb for it."""

    passes: Passes

    def __init__(self) -> None:
        self.sweep = NOTHING
        self.left: object = None  # of a step that could not put everything back
        self.before = weakref.ref(NOTHING)  # the last step's
        self.eps = self.still = torch.empty(0, dtype=torch.float32, device=CPU)
        self._ones: dict[tuple[int, torch.device], Tensor] = {}  # kept: a captured pass goes on reading them
        self.spec = AXPY

    def leave(self) -> None:
        self.before, self.sweep = weakref.ref(self.sweep), NOTHING

    def let_go(self) -> None:
        """Nobody holds a copy any longer: larger ones are to be made."""
        for sweep in (self.before(), self.sweep):
            if sweep is not None:
                sweep.forget()

    def try_again(self) -> None:
        """The step before could not put everything back; it is done now, before anything else."""
        self.end()

    def end(self) -> None:
        raise NotImplementedError

    def begin(self, sweep: Sweep, eps: Tensor, *, scaled: bool) -> None:
        if self.left is not None:
            self.try_again()
        self.sweep, self.eps = sweep, eps
        key = len(eps), eps.device
        if key not in self._ones:
            self._ones[key] = torch.ones(len(eps), 1, dtype=torch.float32, device=eps.device)
        self.still = self._ones[key]
        self.spec = pass_spec(RULES["scaled_axpy" if scaled else "axpy"], self.passes.direction)
