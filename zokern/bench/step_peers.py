"""Peers of a whole step, written from the methods' descriptions: what a step costs without fused kernels.

MeZO's published order of work: the weights move to theta + eps z, to theta - eps z, and back, each in a sweep of its own;
a fourth sweep updates them; the projected gradient comes to the host by .item(). HiZOO's: the same with z / sqrt(h), h in
the weights' dtype, and a fourth forward after the update, whose loss is only reported.

The sweeps are those of peers.py, so that kernels and steps are compared with the same code: they reseed torch's global
generators, as the released code does. `compiled` alone has its own: peers.py compiles a graph for each group of tensors,
and a model's tensors, which need not come in groups of the same shapes, would soon exceed torch.compile's number of graphs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from zokern.bench import peers

Closure = Callable[[], Tensor]
Factors = tuple[float, float]


class Published:
    """MeZO in its published order. Subclasses say how a sweep is done and what it takes beside the weights."""

    way: peers.Peer = peers.Published()

    def __init__(self, model: nn.Module, lr: float, eps: float = 1e-3, seed: int = 0) -> None:
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.lr, self.eps, self.seed = lr, eps, seed
        self.counters = {"steps": 0, "forwards": 0, "passes": 0}

    @staticmethod
    def needed_bytes(params: Sequence[Tensor]) -> int:
        """What a step takes beside the weights and the activations: z beside its product, or beside the new weights."""
        return 2 * max(p.nbytes for p in params)

    def state_bytes(self) -> int:
        return 0

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor:
        """One step; the first of its losses."""
        plus, projected, _ = self._probe(closure)
        self.pass_(lambda: self.sweep((projected, -self.lr)))
        self.counters["steps"] += 1
        return plus

    def sweep(self, factors: Factors) -> None:
        """Each weight <- weight + (product of factors) z."""
        self.way.axpy(self.params, self.next_seed(), factors)

    def _probe(self, closure: Closure) -> tuple[Tensor, float, Tensor]:
        """Three sweeps and two forwards: loss at theta + eps z, projected gradient, loss at theta - eps z."""
        self.pass_(lambda: self.sweep((1.0, self.eps)))
        plus = self._forward(closure)
        self.pass_(lambda: self.sweep((-2.0, self.eps)))
        minus = self._forward(closure)
        projected = ((plus - minus) / (2 * self.eps)).item()
        self.pass_(lambda: self.sweep((1.0, self.eps)))
        return plus, projected, minus

    def next_seed(self) -> int:
        return self.seed + self.counters["steps"]

    def _forward(self, closure: Closure) -> Tensor:
        self.counters["forwards"] += 1
        return closure()

    def pass_(self, work: Callable[[], None]) -> None:
        work()
        self.counters["passes"] += 1


class Foreach(Published):
    way = peers.Foreach()

    @staticmethod
    def needed_bytes(params: Sequence[Tensor]) -> int:
        return sum(p.nbytes for p in params)  # z of all tensors


def _add_noise(w: Tensor, factor: Tensor) -> None:
    w.add_((torch.randn_like(w, dtype=torch.float32) * factor).to(w.dtype))


@functools.cache
def _fused() -> Callable[[Tensor, Tensor], None]:
    """Compiled once in a process, whatever the number of peers."""
    return torch.compile(_add_noise, dynamic=True)


class Compiled(Published):
    """One graph for tensors of any size: they are flattened, and the factor is a tensor."""

    def sweep(self, factors: Factors) -> None:
        torch.manual_seed(self.next_seed())
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
        here = self._forward(closure)
        plus, projected, minus = self._probe(closure)
        kappa = ((plus + minus - 2 * here).abs() / (2 * self.eps**2)).item()
        a, seed = self.smoothing, self.next_seed()
        self.pass_(lambda: self.way.hizoo(self.params, self.h, seed, projected, self.lr, a * kappa, a))
        self.counters["steps"] += 1
        return self._forward(closure)

    def sweep(self, factors: Factors) -> None:
        """Each weight <- weight + (product of factors) z / sqrt(h)."""
        self.way.scaled_axpy(self.params, self.h, self.next_seed(), factors)

    def state_bytes(self) -> int:
        return sum(h.nbytes for h in self.h)

    @staticmethod
    def needed_bytes(params: Sequence[Tensor]) -> int:
        # h, and for the largest tensor what the update's longest expression holds at once
        return sum(p.nbytes for p in params) + 4 * max(p.nbytes for p in params)


PEERS: dict[str, dict[str, type[Published]]] = {
    "mezo": {"published": Published, "foreach": Foreach, "compiled": Compiled},
    "hizoo": {"published": PublishedHiZOO},
}
