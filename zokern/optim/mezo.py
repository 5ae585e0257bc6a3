"""MeZO (Malladi et al. 2023, arXiv 2305.17333, algorithm 1) with the updates it can be given, and LeZO.

c_k = (L(theta + eps z_k) - L(theta - eps z_k)) / (2 eps), or one-sided (L(theta + eps z_k) - L(theta)) / eps
g = 1/n sum_k c_k z_k;    theta <- (1 - lr*weight_decay) theta - lr * update(g)
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from zokern._checks import ZokernWarning
from zokern.contract.streams import derive_seed
from zokern.kinds import Betas, Choice, Flag, Integer, Number
from zokern.layers import RandomBlocks
from zokern.optim import callers, moments, state, update
from zokern.optim.base import ZerothOrderOptimizer
from zokern.optim.common import NUM_SAMPLES, SCALES
from zokern.optim.drivers import Rounds
from zokern.optim.ledger import Ledger
from zokern.optim.update import Estimate, Rates
from zokern.passes.update import Seed, Update
from zokern.settings import setting

UPDATES = ("sgd", "momentum", "adam", "adamezo", "sign")
STATES = {"momentum": ("m",), "adam": ("m", "v")}
USED_BY = {"betas": ("momentum", "adam", "adamezo"), "delta": ("adam", "adamezo"), "horizon": ("adamezo",)}


class MeZO(ZerothOrderOptimizer):
    """Memory-efficient zeroth-order SGD: two forwards per sample, no gradients, no state.

    Passes over the weights in a step: 2n + 1 (one-sided n + 1). State for each parameter, float32: none, "m" for
    momentum, "m" and "v" for Adam. After a step, `metrics` holds "loss" and "projected_gradient" (the mean of c_k), 0-d
    tensors on the device.
    """

    num_samples: int = NUM_SAMPLES
    one_sided: bool = setting(
        default=False,
        kind=Flag(),
        help="One forward for each direction and one at the weights, n + 1 in all: cheaper for n > 1, biased by "
        "O(eps). Else two for each direction.",
        flags=("--one-sided/--two-sided",),
    )
    rule: str = setting(
        default="sgd",
        kind=Choice(UPDATES),
        help="What is done with the gradient estimate g. sgd: g itself. momentum: m <- betas[0] m + g, as "
        "torch.optim.SGD. adam: its two moments, with bias correction. adamezo: moments made again from the "
        "directions of the last horizon steps (Cai et al. 2026, arXiv 2605.00650), for one sample. sign: the "
        "sign of g.",
        alias="update",
    )
    betas: tuple[float, float] = setting(
        default=(0.9, 0.999),
        kind=Betas(),
        help="Decay of the first and of the second moment.",
        parts={"beta1": "Decay of the first moment", "beta2": "Decay of the second moment"},
    )
    delta: float = setting(
        default=1e-8,
        kind=Number(1e-30, 1e30),
        help="Added to the root of adam's second moment; under the root for adamezo.",
    )
    horizon: int = setting(
        default=10,
        kind=Integer(1, 1 << 20),
        help="Steps whose directions make adamezo's moments, this one counted.",
    )
    scale: str = setting(
        default="paper",
        kind=SCALES,
        help="Of adamezo's steps. released, as in the published code: moments without (1 - b1) and (1 - b2), a factor of "
        "100, and the steps 0 to horizon are sgd's. The same step takes lr = 100 LR sqrt(1 - b2) / (1 - b1), LR the "
        "released code's. Other updates have the released code's lr in any case, and take paper only.",
    )

    def settle(self) -> None:
        if self.rule == "adamezo" and self.num_samples > 1:
            raise ValueError(
                f"num_samples is {self.num_samples}; update='adamezo' works with 1, one direction for each step"
            )
        if self.scale == "released" and self.rule != "adamezo":
            raise ValueError(
                f"scale is 'released', which is for update='adamezo'; with update={self.rule!r} lr is the released code's "
                "already: leave scale out"
            )
        for name, updates in USED_BY.items():
            value = getattr(self, name)
            if self.rule not in updates and value != type(self).settings[name].default:
                warnings.warn(
                    f"{name} is {value}, and update={self.rule!r} does not use it: give update="
                    f"{' or '.join(map(repr, updates))}, or leave {name} out",
                    ZokernWarning,
                    stacklevel=callers.level(),
                )
        self._memory: moments.Memory | None = None
        if self.rule == "adam":
            self._memory = moments.AdamCounts()
        elif self.rule == "adamezo":
            self._memory = moments.AdaMeZOHistory(self.horizon, released=self.scale == "released")

    def states(self) -> state.Spec:
        return dict.fromkeys(STATES.get(self.rule, ()), (torch.float32, 0.0))

    def forwards(self) -> int:
        return self.num_samples + 1 if self.one_sided else 2 * self.num_samples

    def rounds(self) -> Rounds:
        seeds = list(map(self.numbers.seed, range(self.num_samples)))
        if self.one_sided:
            here, *losses = yield [{}, *({seed: 1.0} for seed in seeds)]
            change = [loss - here for loss in losses]
        else:
            losses = yield [{seed: sign} for seed in seeds for sign in (1.0, -1.0)]
            change = [(plus - minus) / 2 for plus, minus in zip(losses[::2], losses[1::2], strict=True)]
        terms: dict[Seed, Tensor] = {seed: g / self.num_samples for seed, g in zip(seeds, change, strict=True)}
        return Estimate(terms, torch.stack(list(terms.values())).sum())

    def _plain(self) -> bool:
        """Whether the current step is sgd's, though adamezo's moments are to come."""
        return self.scale == "released" and (self.horizon == 1 or self._passes.counters.steps <= self.horizon)

    def structure(self) -> Hashable:
        """Of adamezo the number of directions: one with no coefficient would still turn a weight of -0.0 into 0.0."""
        if not isinstance(self._memory, moments.AdaMeZOHistory):
            return super().structure()
        return "plain" if self._plain() else self._memory.directions()

    def why_not_graphed(self) -> str | None:
        if self.layers is not None and self.rule == "adamezo":
            return "layers leaves out other blocks in each step, and update='adamezo' looks back on those of others"
        return super().why_not_graphed()

    def once(self) -> bool:
        """A step of a young run, with fewer directions than all that come later."""
        looks_back = isinstance(self._memory, moments.AdaMeZOHistory) and not self._plain()
        return looks_back and self.structure() != self.horizon

    def captured_tensors(self) -> list[Tensor]:
        return [*super().captured_tensors(), *(() if self._memory is None else self._memory.tensors())]

    def row_key(self, param: Tensor) -> Hashable:
        return self.layers.block_of(param) if self.layers is not None and self.rule in ("adam", "adamezo") else None

    def plain_updates(self) -> bool:
        return self.rule == "sgd"

    def update(self, estimate: Estimate, rates: Rates) -> Update:
        if isinstance(self._memory, moments.AdamCounts):
            return self._memory.update(estimate, rates, self.active.rows, self.betas, self.delta)
        if isinstance(self._memory, moments.AdaMeZOHistory):
            rows, groups = self.active.rows, range(len(self.param_groups))
            whole = [g for g, _ in rows] == list(groups)  # the same numbers, then
            eps = rates.eps if whole else self.numbers.rates([(g, None) for g in groups])[1]
            self._memory.measured(estimate, self.active.dropped, eps)
            if self._plain():
                return update.sgd(estimate, rates)
            return self._memory.update(rates, rows, self.betas, self.delta)
        if self.rule == "momentum":
            return update.momentum(estimate, rates, self.betas[0])
        return update.sign(estimate, rates) if self.rule == "sign" else update.sgd(estimate, rates)

    def note(self, ok: Tensor, ledger: Ledger) -> None:
        if self._memory is not None:
            self._memory.commit(ok, ledger, self.numbers.gate, self.numbers.gates)

    def launched(self, step: int) -> None:
        if self._memory is not None:
            self._memory.launched(derive_seed(self.seed, step, 0), self.dropped(step))

    def history(self) -> list[Any]:
        return [] if self._memory is None else self._memory.save()

    def load_history(self, history: list[Any]) -> None:
        if self._memory is None:
            super().load_history(history)
        else:
            blocks = 0 if self.layers is None else len(self.layers.names)
            self._memory.load(history, len(self.param_groups), blocks)

    def memory(self) -> list[float | Tensor]:
        return [] if self._memory is None else self._memory.numbers()

    def remember(self, step: int, memory: list[float], dropped: set[int], ok: bool) -> None:
        blocks = [None, *range(0 if self.layers is None else len(self.layers.names))]
        if self._memory is not None:
            self._memory.remember(derive_seed(self.seed, step, 0), memory, dropped, blocks, ok)


class LeZO(MeZO):
    """MeZO that leaves out `num_dropped` random transformer blocks in each step: MeZO(layers=RandomBlocks(num_dropped))."""

    def __init__(self, model: nn.Module, lr: float | Tensor, *, num_dropped: int, **options: Any) -> None:
        super().__init__(model, lr, layers=RandomBlocks(num_dropped), **options)
