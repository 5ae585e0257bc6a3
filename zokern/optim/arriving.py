"""What a GPU has counted, on its way to the host: looked at in a later step, so that nobody waits for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zokern.passes.update import CPU


class Arriving:
    """The values of a tensor on a GPU, as they are now in the order of its work."""

    def __init__(self, there: Tensor) -> None:
        self._host = torch.empty(there.shape, dtype=there.dtype, device=CPU, pin_memory=True)
        self._host.copy_(there, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(there.device))

    def values(self) -> Any | None:
        """As `tolist` gives them, once they are here; None before."""
        return self._host.tolist() if self._event.query() else None

    def here(self) -> Tensor | None:
        """On the host, once they are here; None before."""
        return self._host if self._event.query() else None

    def wait(self) -> Tensor:
        self._event.synchronize()
        return self._host
