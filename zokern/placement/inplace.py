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
from zokern.passes.update import Seed, Terms, Update, along, is_known, packed, perturbation, seed_tensor, sent
from zokern.placement.base import Ahead, Perturbing, Rounding
from zokern.sweep import Passes, Sweep

# An update of weights that are perturbed where they are restores them in the same pass: its rule then has an A.
RESTORING = {"hizoo": "hizoo_restore"}


class InPlace(Perturbing):
    name = "inplace"

    def __init__(self) -> None:
        super().__init__()
        self.current: dict[Seed, float | Tensor] = {}  # the weights are theta + eps * sum of these, maybe scaled
        # Where a pass goes, noted before it, and how many were done then: wherever it breaks off, the weights are found.
        self._heading: tuple[Terms, int] | None = None

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
            torch.clear_autocast_cache()  # of casts of what the weights are still
            self._heading = terms, self.passes.done
            self.passes.run(self.sweep, self.spec, numbers)
        self.current, self._heading = dict(terms), None
        return contextlib.nullcontext()

    def _settle(self) -> None:
        assert self._heading is not None
        self.passes.settle()
        terms, before = self._heading
        self.current, self._heading = self.current if self.passes.done == before else dict(terms), None

    def update(self, update: Update, ok: Tensor, rounding: Rounding, ahead: Ahead | None = None) -> None:
        # The weights are w = theta + sum r z, and decay*theta + sum u z = decay*w + sum (u - decay*r) z. A skipped step
        # is the same pass with u = 0, decay = 1 and states left alone, which only restores.
        every = list(dict.fromkeys([*update.seeds, *self.current]))
        shared, coefs, more = dict(update.shared), dict(update.coefs), len(every) - len(update.seeds)
        if not is_known(ok, self.passes.gate):
            for name, value in {"decay": 1.0, **update.idle}.items():
                shared[name] = torch.where(ok, shared[name], value)
            for name in coefs:
                coefs[name] = torch.where(ok, coefs[name], 0.0)
        if more:
            for name, own in coefs.items():
                coefs[name] = torch.cat([own, own.new_zeros(len(own), more)], dim=1)
        restore = along(self.eps, self.current, every)
        restore = restore if restore.device == ok.device else sent(restore, ok.device)
        coefs["A"] = coefs.get("A", 0.0) - shared["decay"][:, None] * restore
        rule = RULES[RESTORING.get(update.rule, update.rule)]
        spec = pass_spec(rule, self.passes.direction, rounding.name, update.square_of_sum, update.keep_second)
        numbers = PassNumbers(seed_tensor(every), *packed(rule, coefs, shared), rounding.seeds, self.passes.gate)
        torch.clear_autocast_cache()
        self._heading = {}, self.passes.done
        self.passes.run(self.sweep, spec, numbers)
        self.current, self._heading = {}, None

    def memory(self) -> list[Tensor]:
        """The copies' memory: none."""
        return []

    def try_again(self) -> None:
        """Weights that somebody has loaded since are taken as they are, and the others restored; all are taken so where a
        pass broke off between two launches, as some are then in one state and some in another."""
        now = self._versions()
        if self.left != now:
            if self.passes.begun == self.passes.done and isinstance(self.left, list):
                if self._heading is not None:
                    self._settle()  # launches nothing
                pairs = zip(self.sweep, self.left, now, strict=True)
                self.sweep = Sweep([member for member, before, after in pairs if before == after])
            else:
                self.current, self._heading = {}, None
        self.end()

    def end(self) -> None:
        """Restores the weights, wherever they are. Where that fails they are still known to be perturbed: the next step
        tries again, before anything else."""
        try:
            if self._heading is not None:
                self._settle()
            if self.current:
                self.present({})
            self.left = None
        except BaseException:
            self.left = self._versions()
            raise
        self.leave()

    def _versions(self) -> list[tuple[int, int]]:
        """With addresses: torch counts no `p.data = other`."""
        return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.sweep.params]
