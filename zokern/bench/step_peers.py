"""Peers of a whole step, written from the methods' descriptions: what a step costs without fused kernels.

MeZO's published order of work: the weights move to theta + eps z, to theta - eps z, and back, each in a sweep of its own;
a fourth sweep updates them; the projected gradient comes to the host by .item(). Three ways of a sweep:

published  for each tensor z is drawn anew from the reseeded generator, scaled and added out of place
foreach    the same z, all of them at once, added in place by torch._foreach_add_
compiled   for each tensor torch.compile fuses noise of its own with the sum, in place: its generator, so another z

HiZOO's published order: sweeps as the first, with z divided by sqrt(h), h in the weights' dtype, and a fourth forward
after the update, whose loss is only reported.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

Closure = Callable[[], Tensor]


class Peer:
    """MeZO in its published order. Subclasses say how a sweep is done and what it takes beside the weights.

    around: a context that each sweep runs in, for whoever times them.
    """

    def __init__(self, model: nn.Module, lr: float, eps: float = 1e-3, seed: int = 0) -> None:
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.lr, self.eps, self.seed = lr, eps, seed
        self.generator = torch.Generator(self.params[0].device)
        self.around: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
        self.counters = {"steps": 0, "forwards": 0, "passes": 0}

    def sweep(self, seed: int, *factors: float) -> None:
        """Each weight <- weight + (product of factors) z(seed)."""
        raise NotImplementedError

    @staticmethod
    def needed_bytes(params: Sequence[Tensor]) -> int:
        """What a step takes beside the weights and the activations."""
        raise NotImplementedError

    def state_bytes(self) -> int:
        return 0

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor:
        """One step; the first of its losses."""
        seed = self.next_seed()
        self._sweep(seed, 1.0, self.eps)
        plus = self._forward(closure)
        self._sweep(seed, -2.0, self.eps)
        minus = self._forward(closure)
        projected = ((plus - minus) / (2 * self.eps)).item()
        self._sweep(seed, 1.0, self.eps)
        self._sweep(seed, projected, -self.lr)
        self.counters["steps"] += 1
        return plus

    def next_seed(self) -> int:
        return self.seed + self.counters["steps"]

    def _forward(self, closure: Closure) -> Tensor:
        self.counters["forwards"] += 1
        return closure()

    def _sweep(self, seed: int, *factors: float) -> None:
        with self.around():
            self.sweep(seed, *factors)
        self.counters["passes"] += 1

    def draw(self, p: Tensor) -> Tensor:
        return torch.normal(0.0, 1.0, p.shape, generator=self.generator, dtype=p.dtype, device=p.device)


class Published(Peer):
    def sweep(self, seed: int, *factors: float) -> None:
        self.generator.manual_seed(seed)
        for p in self.params:
            z = self.draw(p)
            for factor in factors:
                z = factor * z
            p.data = p.data + z

    @staticmethod
    def needed_bytes(params: Sequence[Tensor]) -> int:
        return 2 * max(p.nbytes for p in params)  # z beside its product, or beside the new weights


class Foreach(Peer):
    def sweep(self, seed: int, *factors: float) -> None:
        self.generator.manual_seed(seed)
        torch._foreach_add_(
            [p.data for p in self.params], [self.draw(p) for p in self.params], alpha=math.prod(factors)
        )

    @staticmethod
    def needed_bytes(params: Sequence[Tensor]) -> int:
        return sum(p.nbytes for p in params)  # z of all tensors


def _add_noise(w: Tensor, factor: Tensor) -> None:
    w.add_((torch.randn_like(w, dtype=torch.float32) * factor).to(w.dtype))


@functools.cache
def _fused() -> Callable[[Tensor, Tensor], None]:
    """Compiled once in a process, whatever the number of peers."""
    return torch.compile(_add_noise, dynamic=True)


class Compiled(Peer):
    """One graph for tensors of any size: they are flattened, and the factor is a tensor. Reseeds torch's own generators."""

    def sweep(self, seed: int, *factors: float) -> None:
        torch.manual_seed(seed)
        add_noise, factor = _fused(), torch.full((), math.prod(factors), device=self.params[0].device)
        for p in self.params:
            add_noise(p.data.view(-1), factor)

    @staticmethod
    def needed_bytes(params: Sequence[Tensor]) -> int:
        return 0


class PublishedHiZOO(Published):
    def __init__(self, model: nn.Module, lr: float, eps: float = 1e-3, seed: int = 0, smoothing: float = 1e-8) -> None:
        super().__init__(model, lr, eps, seed)
        self.smoothing = smoothing
        self.h = [torch.ones_like(p) for p in self.params]

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor:
        """One step; the loss of the weights that it ends with."""
        seed = self.next_seed()
        here = self._forward(closure)
        self._sweep(seed, 1.0, self.eps)
        plus = self._forward(closure)
        self._sweep(seed, -2.0, self.eps)
        minus = self._forward(closure)
        self._sweep(seed, 1.0, self.eps)
        projected = ((plus - minus) / (2 * self.eps)).item()
        kappa = ((plus + minus - 2 * here).abs() / (2 * self.eps**2)).item()
        with self.around():
            self.update(seed, projected, kappa)
        self.counters["passes"] += 1
        self.counters["steps"] += 1
        return self._forward(closure)

    def sweep(self, seed: int, *factors: float) -> None:
        """Each weight <- weight + (product of factors) z(seed) / sqrt(h)."""
        self.generator.manual_seed(seed)
        for p, h in zip(self.params, self.h, strict=True):
            z = self.draw(p)
            for factor in factors:
                z = factor * z
            p.data = p.data + z / torch.sqrt(h)

    def update(self, seed: int, projected: float, kappa: float) -> None:
        """h <- (1 - a) h + a kappa h z^2; weight <- weight - lr c z / sqrt(h), with the new h."""
        self.generator.manual_seed(seed)
        for i, p in enumerate(self.params):
            z = self.draw(p)
            self.h[i] = (1 - self.smoothing) * self.h[i] + kappa * self.smoothing * (self.h[i] * z * z)
            p.data = p.data - self.lr * (projected * z / torch.sqrt(self.h[i]))

    def state_bytes(self) -> int:
        return sum(h.nbytes for h in self.h)

    @staticmethod
    def needed_bytes(params: Sequence[Tensor]) -> int:
        # h, and for the largest tensor what the update's longest expression holds at once
        return sum(p.nbytes for p in params) + 4 * max(p.nbytes for p in params)


PEERS: dict[str, dict[str, type[Peer]]] = {
    "mezo": {"published": Published, "foreach": Foreach, "compiled": Compiled},
    "hizoo": {"published": PublishedHiZOO},
}
