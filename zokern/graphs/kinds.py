"""The graphs of a GraphedStep: one for each kind of step and batch, as many as may be kept, the longest unused one goes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from zokern._checks import ZokernWarning
from zokern.graphs.cuda import Graph
from zokern.graphs.telling import Telling
from zokern.optim.base import ZerothOrderOptimizer
from zokern.optim.parameters import Active
from zokern.placement.ready import Copies

MOST = 8
REMEMBERED = 256  # kinds whose graphs were let go


@dataclass
class Captured:
    """kind: of the step and its batches. batches, weights: what its launches read. held: all else that they do, to keep it
    from being freed. cost: what a step adds to the counters."""

    kind: Any
    graph: Graph
    batches: Sequence[Any]
    weights: Tensor | None
    telling: Telling
    cost: dict[str, int]
    active: Active
    held: object
    copies: Copies  # that a launch fills for the next step


@dataclass
class Graphs:
    """captures: how many graphs were made; let_go: how many of them were let go again."""

    most: int = MOST
    captures: int = 0
    let_go: int = 0
    kept: list[Captured] = field(default_factory=list)  # the last used one at the end
    gone: list[Any] = field(default_factory=list)
    told: bool = False

    def find(self, kind: Any) -> Captured | None:
        last = len(self.kept) - 1
        for at in range(last, -1, -1):
            if self.kept[at].kind == kind:
                if at != last:
                    self.kept.append(self.kept.pop(at))
                return self.kept[-1]
        return None

    def make_room(self, kind: Any) -> None:
        """For one more, before it is captured: so that its memory may be what another one had."""
        if kind in self.gone and not self.told:
            self.told = True
            warnings.warn(
                "GraphedStep captures a step again whose graph it had let go, as there are more kinds of steps and batches "
                f"than max_graphs={self.most}: pad the batches to few lengths, or give a larger max_graphs",
                ZokernWarning,
                stacklevel=4,
            )
        while len(self.kept) >= self.most:
            oldest = self.kept.pop(0)
            self.let_go += 1
            if oldest.kind not in self.gone:
                self.gone = [*self.gone, oldest.kind][-REMEMBERED:]

    def add(self, one: Captured) -> None:
        self.kept.append(one)
        self.captures += 1


class Layout(NamedTuple):
    """What captured launches have read once and for all. of_run: where its tensors are, and how they are grouped; copies:
    where the placement's are, which eager steps may make anew."""

    of_run: object
    copies: object


def layout_of(optimizer: ZerothOrderOptimizer) -> Layout:
    groups = [
        [(p.data_ptr(), p.requires_grad, p.shape, p.dtype) for p in group["params"]] for group in optimizer.param_groups
    ]
    copies = dict.fromkeys(t.data_ptr() for t in optimizer._placement.memory())
    kept = [t.data_ptr() for t in optimizer.captured_tensors()]
    return Layout((optimizer.seed, groups, [at for at in kept if at not in copies]), list(copies))
