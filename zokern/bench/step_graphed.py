"""zokern.GraphedStep among the ways of the step benchmark: a whole step, launched as one CUDA graph.

Inside a graph there is no telling forwards from passes, so only the whole step is timed. The batch lies on the device, and
a step copies it into the graph's own, as a loop over batches would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from zokern.bench.models import Work
from zokern.graphs import step as graphed
from zokern.optim import ZerothOrderOptimizer

GRAPHED_WARM_UP = 2  # steps: HELENE's second is of another kind than its first, and is captured when it comes
NEEDS_CUDA = "it replays a CUDA graph, and this run is on {}"


class NotCaptured(RuntimeError):
    """The step could not be captured, for a reason that is not memory."""


class Graphed:
    """An optimizer whose steps are captured at the first one."""

    def __init__(self, optimizer: ZerothOrderOptimizer) -> None:
        self.optimizer = optimizer
        self._graph: graphed.GraphedStep | None = None

    @property
    def counters(self) -> Mapping[str, int]:
        return self.optimizer.counters

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """One step on the closure's batch; the closure must be the same each time."""
        if not isinstance(closure, Work):
            raise TypeError(f"closure must be a zokern.bench.models.Work, got {type(closure).__name__}")
        if self._graph is None:
            try:
                self._graph = graphed.GraphedStep(self.optimizer, closure.loss, closure.batch)
            except RuntimeError as error:
                if isinstance(error.__cause__, torch.OutOfMemoryError):
                    raise error.__cause__ from error
                raise NotCaptured(str(error)) from error
        return self._graph(closure.batch)


def why_not(optimizer: ZerothOrderOptimizer, device: torch.device) -> str | None:
    """What keeps a method's steps from being graphed on `device`."""
    if device.type not in graphed.SUPPORTED:
        return NEEDS_CUDA.format(f"a {device.type.upper()}" if device.type == "cpu" else device)
    return optimizer.why_not_graphed()
