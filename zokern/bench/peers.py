"""What PyTorch users write, to time against: each method's passes in plain torch, written from its equations.

published   one tensor after the other; z is drawn, multiplied and added, and every intermediate result is stored
foreach     torch._foreach_*: in place, a list of tensors at a time, z of all of them stored
compiled    the arithmetic of `published`, in place, under torch.compile, which fuses it with a Philox of its own

All take lists of tensors (parameters too) and reseed torch's global generators by `seed`, as the released code does, so
that the same seed gives the same z. States are lists like the tensors', changed in place (`published` replaces its
entries). Intermediates have torch's promoted dtype; what is stored has the dtype that it had.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from zokern.bench import equations
from zokern.bench.equations import HeleneSettings


class Peer(Protocol):
    """w: weights; h, m: states. c is the projected gradient; each method is one way to do one pass."""

    name: str

    def axpy(self, w: Sequence[Tensor], seed: int, factors: tuple[float, float], distribution: str = "normal") -> None:
        """w + (first * z) * second: the released code multiplies by the direction and by eps, one after the other."""

    def scaled_axpy(self, w: Sequence[Tensor], h: list[Tensor], seed: int, factors: tuple[float, float]) -> None:
        """HiZOO's probe: w + (first * z) * second / sqrt(h)."""

    def hizoo(self, w: Sequence[Tensor], h: list[Tensor], seed: int, c: float, lr: float, ak: float, a: float) -> None:
        """HiZOO's update: h' = (1 - a) h + ak h z^2, ak = a * kappa; w - lr * c*z / sqrt(h')."""

    def helene(
        self, w: Sequence[Tensor], m: list[Tensor], h: list[Tensor], seed: int, c: float, lr: float, s: HeleneSettings
    ) -> None:
        """m' = beta1 m + alpha c z; h' = beta2 h + b z^2; w - lr * m' / (gamma max(h', floor) + delta)."""


class Published:
    name = "published"

    @torch.no_grad()
    def axpy(self, w: Sequence[Tensor], seed: int, factors: tuple[float, float], distribution: str = "normal") -> None:
        torch.manual_seed(seed)
        for p in w:
            p.data = equations.axpy(p.data, equations.draw(p, distribution), *factors)

    @torch.no_grad()
    def scaled_axpy(self, w: Sequence[Tensor], h: list[Tensor], seed: int, factors: tuple[float, float]) -> None:
        torch.manual_seed(seed)
        for p, x in zip(w, h, strict=True):
            p.data = equations.scaled_axpy(p.data, x, equations.draw(p), *factors).to(p.dtype)

    @torch.no_grad()
    def hizoo(self, w: Sequence[Tensor], h: list[Tensor], seed: int, c: float, lr: float, ak: float, a: float) -> None:
        torch.manual_seed(seed)
        for i, (p, x) in enumerate(zip(w, h, strict=True)):
            new, curvature = equations.hizoo(p.data, x, equations.draw(p), c, lr, ak, a)
            p.data, h[i] = new.to(p.dtype), curvature.to(x.dtype)

    @torch.no_grad()
    def helene(
        self, w: Sequence[Tensor], m: list[Tensor], h: list[Tensor], seed: int, c: float, lr: float, s: HeleneSettings
    ) -> None:
        torch.manual_seed(seed)
        for i, p in enumerate(w):
            new, momentum, curvature = equations.helene(p.data, m[i], h[i], equations.draw(p), c, lr, s.alpha, s.b, s)
            p.data, m[i], h[i] = new.to(p.dtype), momentum.to(m[i].dtype), curvature.to(h[i].dtype)


class Foreach:
    name = "foreach"

    @staticmethod
    def _draw(w: Sequence[Tensor], seed: int, distribution: str = "normal") -> list[Tensor]:
        torch.manual_seed(seed)
        if distribution == "normal":
            return [torch.randn_like(p.data) for p in w]
        z = [torch.randint(0, 2, p.shape, dtype=p.dtype, device=p.device) for p in w]
        torch._foreach_mul_(z, 2)
        torch._foreach_sub_(z, 1)
        return z

    @torch.no_grad()
    def axpy(self, w: Sequence[Tensor], seed: int, factors: tuple[float, float], distribution: str = "normal") -> None:
        torch._foreach_add_(list(w), self._draw(w, seed, distribution), alpha=factors[0] * factors[1])

    @torch.no_grad()
    def scaled_axpy(self, w: Sequence[Tensor], h: list[Tensor], seed: int, factors: tuple[float, float]) -> None:
        z = self._draw(w, seed)
        torch._foreach_div_(z, torch._foreach_sqrt(h))
        torch._foreach_add_(list(w), z, alpha=factors[0] * factors[1])

    @torch.no_grad()
    def hizoo(self, w: Sequence[Tensor], h: list[Tensor], seed: int, c: float, lr: float, ak: float, a: float) -> None:
        z = self._draw(w, seed)
        change = torch._foreach_mul(z, z)
        torch._foreach_mul_(change, ak)
        torch._foreach_sub_(change, a)
        torch._foreach_addcmul_(h, h, [x.to(y.dtype) for x, y in zip(change, h, strict=True)])
        torch._foreach_div_(z, torch._foreach_sqrt(h))
        torch._foreach_add_(list(w), z, alpha=-lr * c)

    @torch.no_grad()
    def helene(
        self, w: Sequence[Tensor], m: list[Tensor], h: list[Tensor], seed: int, c: float, lr: float, s: HeleneSettings
    ) -> None:
        z = self._draw(w, seed)
        torch._foreach_mul_(m, s.beta1)
        torch._foreach_add_(m, z, alpha=s.alpha * c)
        torch._foreach_mul_(z, z)
        torch._foreach_mul_(h, s.beta2)
        torch._foreach_add_(h, z, alpha=s.b)
        below = torch._foreach_clamp_min(h, s.floor)
        torch._foreach_mul_(below, s.gamma)
        torch._foreach_add_(below, s.delta)
        torch._foreach_div_(below, -lr)  # w + m / (below / -lr)
        torch._foreach_add_(list(w), torch._foreach_div(m, below))


class Compiled:
    """Scalars reach the compiled functions as tensors, so that a new step's do not compile anew. Compiles on first use.

    group: tensors that make one graph, 0 for all. A model's block is a good group: all blocks share a graph. Each graph
        takes seconds to compile, and one of hundreds of tensors takes minutes.
    """

    name = "compiled"

    def __init__(self, group: int = 0) -> None:
        self._group = group
        self._functions: dict[str, Callable[..., None]] = {}

    @torch.no_grad()
    def _run(
        self, name: str, seed: int, numbers: Sequence[float], lists: Sequence[Sequence[Tensor]], *rest: object
    ) -> None:
        if name not in self._functions:
            # fullgraph also makes it an error, not plain torch, when there are too many graphs of one function.
            self._functions[name] = torch.compile(equations.IN_PLACE[name], dynamic=False, fullgraph=True)
        torch.manual_seed(seed)
        w = lists[0]
        # A fill on the device: copying from the host would wait for it.
        scalars = [torch.full((), value, device=w[0].device) for value in numbers]
        step = self._group or len(w)
        for start in range(0, len(w), step):
            group = [[t.data for t in tensors[start : start + step]] for tensors in lists]
            self._functions[name](scalars, *group, *rest)

    def axpy(self, w: Sequence[Tensor], seed: int, factors: tuple[float, float], distribution: str = "normal") -> None:
        self._run("axpy", seed, factors, (w,), distribution)

    def scaled_axpy(self, w: Sequence[Tensor], h: list[Tensor], seed: int, factors: tuple[float, float]) -> None:
        self._run("scaled_axpy", seed, factors, (w, h))

    def hizoo(self, w: Sequence[Tensor], h: list[Tensor], seed: int, c: float, lr: float, ak: float, a: float) -> None:
        self._run("hizoo", seed, (c, lr, ak, a), (w, h))

    def helene(
        self, w: Sequence[Tensor], m: list[Tensor], h: list[Tensor], seed: int, c: float, lr: float, s: HeleneSettings
    ) -> None:
        fixed = HeleneSettings(0.0, s.beta1, s.beta2, 0.0, s.gamma, s.floor, s.delta)
        self._run("helene", seed, (c, lr, s.alpha, s.b), (w, m, h), fixed)


def peers(*, compiled: bool, group: int = 0) -> list[Peer]:
    """All peers, or all but the compiled one."""
    return [Published(), Foreach(), *([Compiled(group)] if compiled else [])]
