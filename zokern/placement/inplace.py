"""The weights themselves are perturbed, and put back by the pass that updates them.

Every move goes from the state that the weights are in to the state wanted next, so the restore of one probe and the
perturbation of the next are one pass, and so are the last restore and the update: 2n + 1 passes for n samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from zokern.passes import Member, Passes


class InPlace:
    def __init__(self, passes: Passes) -> None:
        self.passes = passes
        self.members: Sequence[Member] = ()
        self.eps = torch.empty(0)
        self.current: dict[int, float] = {}  # the weights are theta + eps * sum of these

    def begin(self, members: Sequence[Member], eps: Tensor) -> None:
        self.members, self.eps, self.current = members, eps, {}

    def _coefs(self, terms: Mapping[int, float], seeds: Sequence[int]) -> Tensor:
        """[G, K]: each group's eps times the terms."""
        row = torch.tensor([terms.get(seed, 0.0) for seed in seeds], dtype=torch.float64)
        return self.eps[:, None] * row

    def _move(self, terms: Mapping[int, float]) -> None:
        delta = {s: terms.get(s, 0.0) - self.current.get(s, 0.0) for s in [*self.current, *terms]}
        seeds = [s for s, a in delta.items() if a != 0.0]
        if seeds:
            self.passes.run(self.members, seeds, self._coefs(delta, seeds))
        self.current = dict(terms)

    @contextlib.contextmanager
    def present(self, terms: Mapping[int, float]) -> Iterator[None]:
        self._move(terms)
        yield

    def update(
        self, seeds: Sequence[int], coefs: Tensor, decays: Tensor, enabled: Tensor, rounding_seed: int | None
    ) -> None:
        # The weights are w = theta + sum r z, and decay*theta + sum u z = decay*w + sum (u - decay*r) z. A skipped step
        # (enabled 0) is the same pass with u = 0 and decay = 1, which only restores.
        every = list(dict.fromkeys([*seeds, *self.current]))
        wanted = torch.zeros(coefs.shape[0], len(every), dtype=torch.float64, device=coefs.device)
        wanted[:, : len(seeds)] = coefs
        restore = self._coefs(self.current, every).to(coefs.device, non_blocking=True)
        ok = enabled.to(torch.bool)
        decays = torch.where(ok, decays, torch.ones_like(decays))
        combined = torch.where(ok, wanted, torch.zeros_like(wanted)) - decays[:, None] * restore
        self.passes.run(self.members, every, combined, decays=decays, rounding_seed=rounding_seed)
        self.current = {}

    def end(self) -> None:
        if self.current:
            self._move({})
        self.members = ()
