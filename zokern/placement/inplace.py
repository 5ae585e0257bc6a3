"""The weights themselves are perturbed, and put back by the pass that updates them.

Every move goes from the state that the weights are in to the state wanted next, so the restore of one probe and the
perturbation of the next are one pass, and so are the last restore and the update: 2n + 1 passes for n samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from zokern.optim.update import Ahead, Update
from zokern.sweep import Member, Numbers, Passes, Seed, Terms, perturbation, sent


class InPlace:
    def __init__(self, passes: Passes) -> None:
        self.passes = passes
        self.members: Sequence[Member] = ()
        self.eps = torch.empty(0)
        self.rule = "axpy"
        self.current: dict[Seed, float | Tensor] = {}  # the weights are theta + eps * sum of these, maybe scaled

    def begin(self, members: Sequence[Member], eps: Tensor, *, scaled: bool) -> None:
        self.members, self.eps, self.current = members, eps, {}
        self.rule = "scaled_axpy" if scaled else "axpy"

    def _move(self, terms: Terms) -> None:
        delta = {s: terms.get(s, 0.0) - self.current.get(s, 0.0) for s in [*self.current, *terms]}
        seeds = [s for s, a in delta.items() if isinstance(a, Tensor) or a != 0.0]
        if seeds:
            self.passes.run(self.members, Numbers(seeds, {"A": perturbation(self.eps, delta, seeds)}, rule=self.rule))
            torch.clear_autocast_cache()  # of casts of what the weights were before
        self.current = dict(terms)

    @contextlib.contextmanager
    def present(self, terms: Terms) -> Iterator[None]:
        self._move(terms)
        yield

    def update(
        self,
        update: Update,
        ok: Tensor,
        *,
        rounding_seeds: tuple[int, int] | Tensor | None,
        stochastic: bool,
        ahead: Ahead | None = None,
    ) -> None:
        # The weights are w = theta + sum r z, and decay*theta + sum u z = decay*w + sum (u - decay*r) z. A skipped step
        # is the same pass with u = 0, decay = 1 and states left alone, which only restores.
        every = list(dict.fromkeys([*update.seeds, *self.current]))
        shared = {
            name: torch.where(ok, value, 1.0 if name == "decay" else update.idle[name])
            if name == "decay" or name in update.idle
            else value
            for name, value in update.shared.items()
        }
        coefs = {name: value.new_zeros(value.shape[0], len(every)) for name, value in update.coefs.items()}
        for name, value in update.coefs.items():
            coefs[name][:, : len(update.seeds)] = torch.where(ok, value, 0.0)
        restore = sent(perturbation(self.eps, self.current, every), ok.device)
        coefs["A"] = coefs.get("A", 0.0) - shared["decay"][:, None] * restore
        self.passes.run(
            self.members,
            Numbers(
                every,
                coefs,
                shared,
                "hizoo_restore" if update.rule == "hizoo" else update.rule,
                rounding_seeds,
                stochastic,
                update.square_of_sum,
                update.keep_second,
            ),
        )
        torch.clear_autocast_cache()
        self.current = {}

    def memory(self) -> list[Tensor]:
        """The copies' memory: none."""
        return []

    def end(self) -> None:
        if self.current:
            self._move({})
        self.members = ()
