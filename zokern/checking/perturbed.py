"""Shows the closure one perturbed tensor: in place, or as the optimizer's placement shows it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import zokern.placement
from zokern.checking.subject import Tried
from zokern.contract.streams import derive_seed
from zokern.deltas import Delta
from zokern.ops import add_noise_
from zokern.optim import ZerothOrderOptimizer
from zokern.placement import MADE, Forward, Placement
from zokern.sweep import Counters, Member, Passes, Sweep

HOME = Path(zokern.placement.__file__).parent


class Perturbed:
    """theta + size z for one tensor, z that of the run's first direction.

    In place, the tensor is restored from a copy, bit for bit. Another placement writes a copy of its own, and the tensor
    is not touched.
    """

    def __init__(self, optimizer: ZerothOrderOptimizer) -> None:
        self.seed = derive_seed(optimizer.seed, 0, 0)
        self.direction, self.backend = optimizer._passes.direction, optimizer._passes.backend
        self.placement: Placement | None = None  # None where the weights themselves are perturbed
        if optimizer.placement in MADE:
            if optimizer.placement != "inplace":  # another object: what the optimizer's has ready stays so
                cls = MADE[optimizer.placement]
                # One tensor alone may well be in no computation.
                self.placement = cls(proves=False) if cls is Forward else cls()
                self.placement.bind(optimizer.module, Passes(self.direction, self.backend))
        else:
            self.placement = optimizer._placement

    def noisy(self, one: Tried, size: float, out: Tensor | None = None) -> None:
        target = one.tensor.detach()
        add_noise_(
            [target], tensor_ids=[one.tensor_id], seeds=[self.seed], coefs=[size], distribution=self.direction,
            out=None if out is None else [out], backend=self.backend,
        )  # fmt: skip

    def moved(self, one: Tried) -> float:
        """Share of the elements that eps z changes."""
        if isinstance(one.tensor, Delta):
            return 1.0
        there = torch.empty_like(one.tensor.detach())
        self.noisy(one, one.eps, there)
        return float((there != one.tensor).float().mean())

    @contextlib.contextmanager
    def in_place(self, one: Tried, size: float) -> Iterator[None]:
        target = one.tensor.detach()
        copy = target.clone()
        try:
            self.noisy(one, size)
            torch.clear_autocast_cache()  # of casts of what it was before
            yield
        finally:
            one.tensor.detach().copy_(copy)
            torch.clear_autocast_cache()

    @contextlib.contextmanager
    def shown(self, one: Tried, size: float) -> Iterator[None]:
        """As a step shows it."""
        if self.placement is None:
            with self.in_place(one, size):
                yield
            return
        sweep = Sweep([Member(one.tensor, one.tensor_id, 0, one.names[0])])
        with _uncounted(self.placement):
            try:
                self.placement.begin(sweep, torch.tensor([size], dtype=torch.float64, device="cpu"), scaled=False)
                with self.placement.present({self.seed: 1.0}):
                    yield
            finally:
                self.placement.end()


@contextlib.contextmanager
def _uncounted(placement: Placement) -> Iterator[None]:
    """A placement of the user's does its passes with the optimizer's counters."""
    passes = getattr(placement, "passes", None)
    if not isinstance(passes, Passes):
        yield
        return
    kept, passes.counters = passes.counters, Counters()
    try:
        yield
    finally:
        passes.counters = kept


def refused_by(error: BaseException) -> bool:
    """Whether a placement raised it, not what the closure runs."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and Path(traceback.tb_frame.f_code.co_filename).parent == HOME
