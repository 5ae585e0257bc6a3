"""A device whose numbers come late, on the CPU: every tensor counts as far away, copies arrive when a test lets them."""

from __future__ import annotations

import pytest
from torch import Tensor

from zokern.journal import behind
from zokern.optim import told


class Late:
    """Stands for Arriving. polls: how often any of them is asked before it is here; None: it never comes by itself."""

    polls: int | None = 2
    copies = 0
    waits = 0
    asked = 0

    def __init__(self, there: Tensor) -> None:
        self.values, self.since = there.clone(), self.asked
        type(self).copies += 1

    def here(self) -> Tensor | None:
        type(self).asked += 1
        return self.values if self.polls is not None and self.asked - self.since > self.polls else None

    def wait(self) -> Tensor:
        type(self).waits += 1
        return self.values


def on_a_late_device(patch: pytest.MonkeyPatch, polls: int | None = 2) -> type[Late]:
    """From now on, journals are of such a device. Returns a class that counts copies and waits."""
    kind: type[Late] = type("Late", (Late,), {"polls": polls, "copies": 0, "waits": 0, "asked": 0})
    patch.setattr(told, "is_far", lambda t: True)
    patch.setattr(told, "is_here", lambda event: False)
    patch.setattr(behind, "Arriving", kind)
    return kind
