"""The weights themselves are perturbed, and put back by the pass that updates them.

Every move goes from the state that the weights are in to the state wanted next, so the restore of one probe and the
perturbation of the next are one pass, and so are the last restore and the update: 2n + 1 passes for n samples.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from zokern.contract.rules import RULES
from zokern.passes.spec import PassNumbers, pass_spec
from zokern.passes.update import Seed, Terms, Update, along, packed, perturbation, seed_tensor, sent
from zokern.placement.base import Ahead, Perturbing, Rounding
from zokern.sweep import Passes

# An update of weights that are perturbed where they are restores them in the same pass: its rule then has an A.
RESTORING = {"hizoo": "hizoo_restore"}


class InPlace(Perturbing):
    name = "inplace"

    def __init__(self) -> None:
        super().__init__()
        self.current: dict[Seed, float | Tensor] = {}  # the weights are theta + eps * sum of these, maybe scaled

    def bind(self, module: nn.Module | None, passes: Passes) -> None:
        self.passes = passes

    def present(self, terms: Terms) -> AbstractContextManager[None]:
        """Moves the weights there, where they stay until they are wanted elsewhere."""
        delta: dict[Seed, float | Tensor] = {}
        for seed in {**self.current, **terms}:
            change = terms.get(seed, 0.0) - self.current.get(seed, 0.0)
            if isinstance(change, Tensor) or change != 0.0:
                delta[seed] = change
        if delta:
            numbers = perturbation(self.eps, delta, self.still, self.passes.gate)
            self.passes.run(self.sweep, self.spec, numbers)
            torch.clear_autocast_cache()  # of casts of what the weights were before
        self.current = dict(terms)
        return contextlib.nullcontext()

    def update(self, update: Update, ok: Tensor, rounding: Rounding, ahead: Ahead | None = None) -> None:
        # The weights are w = theta + sum r z, and decay*theta + sum u z = decay*w + sum (u - decay*r) z. A skipped step
        # is the same pass with u = 0, decay = 1 and states left alone, which only restores.
        every = list(dict.fromkeys([*update.seeds, *self.current]))
        idle = {"decay": 1.0, **update.idle}
        shared, coefs, more = dict(update.shared), {}, len(every) - len(update.seeds)
        for name in idle:
            shared[name] = torch.where(ok, shared[name], idle[name])
        for name, value in update.coefs.items():
            coefs[name] = torch.where(ok, value, 0.0)
            if more:
                coefs[name] = torch.cat([coefs[name], value.new_zeros(len(value), more)], dim=1)
        restore = along(self.eps, self.current, every)
        restore = restore if restore.device == ok.device else sent(restore, ok.device)
        coefs["A"] = coefs.get("A", 0.0) - shared["decay"][:, None] * restore
        rule = RULES[RESTORING.get(update.rule, update.rule)]
        spec = pass_spec(rule, self.passes.direction, rounding.name, update.square_of_sum, update.keep_second)
        numbers = PassNumbers(seed_tensor(every), *packed(rule, coefs, shared), rounding.seeds, self.passes.gate)
        self.passes.run(self.sweep, spec, numbers)
        torch.clear_autocast_cache()
        self.current = {}

    def memory(self) -> list[Tensor]:
        """The copies' memory: none."""
        return []

    def end(self) -> None:
        try:
            if self.current:
                self.present({})
        finally:  # where this pass fails, nobody knows where the weights are
            self.current = {}
            self.leave()
