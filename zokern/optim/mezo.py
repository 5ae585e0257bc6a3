"""MeZO (Malladi et al. 2023, arXiv 2305.17333, algorithm 1) with the updates it can be given, and LeZO.

c_k = (L(theta + eps z_k) - L(theta - eps z_k)) / (2 eps), or one-sided (L(theta + eps z_k) - L(theta)) / eps
g = 1/n sum_k c_k z_k;    theta <- (1 - lr*weight_decay) theta - lr * update(g)
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from zokern import _checks
from zokern.contract.streams import derive_seed
from zokern.layers import RandomBlocks
from zokern.optim import moments, update
from zokern.optim.base import ZerothOrderOptimizer
from zokern.optim.drivers import Rounds
from zokern.optim.update import Estimate, Rates
from zokern.passes.update import Seed, Update

UPDATES = ("sgd", "momentum", "adam", "adamezo", "sign")
STATES = {"momentum": ("m",), "adam": ("m", "v")}


class MeZO(ZerothOrderOptimizer):
    """Memory-efficient zeroth-order SGD: two forwards per sample, no gradients, no state.

    Args:
        params: an nn.Module (recommended: its trainable parameters, with names and ids that survive freezing), or
            what torch's optimizers take: tensors, (name, tensor) pairs, or groups with their own lr, eps, weight_decay.
        lr: learning rate. Published: 1e-6 or 1e-7 (all parameters), 1e-4 (LoRA).
        eps: perturbation radius, > 0. Published: 1e-3 (LoRA 1e-2, prefix tuning 1e-1).
        weight_decay: decoupled, as in AdamW. Published: 0.
        num_samples: directions averaged in a step, n >= 1; 2n forwards, and one update pass for all.
        one_sided: c from one forward per sample and one at theta, n + 1 in all: cheaper for n > 1, biased by O(eps).
        update: what is done with g. "sgd": g itself. "momentum": m <- betas[0] m + g, as torch.optim.SGD. "adam": its two
            moments, with bias correction. "adamezo": moments from the directions of the last `horizon` steps, made again
            (Cai et al. 2026, arXiv 2605.00650). "sign": the sign of g.
        betas: decay of the first and of the second moment, in [0, 1).
        delta: added to the root of Adam's second moment; under the root for "adamezo". At least 1e-30.
        horizon: steps that "adamezo" looks back on, >= 1, this one counted.
        distribution: "normal", or "rademacher" for random signs.
        seed: of the run, in [0, 2^63): direction k of step t has the seed derive_seed(seed, t, k).
        rounding: of the update. "auto": to nearest for float32, stochastic for 16-bit weights.
        placement: where the perturbed weights live during a forward: "inplace", "shadow", "stream", or "auto", which is
            exact for 16-bit weights (zokern.placement).
        pipelined: for shadow and stream: the pass that updates the weights also writes the next step's first perturbation,
            as far as there is room for it, with the same bits as without. Between steps, change weights by operations
            that autograd sees (not through .data), or the copy would be of what they were.
        layers: RandomBlocks(num_dropped) leaves out that many transformer blocks in each step (LeZO).
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Passes over the weights in a step: 2n + 1 (one-sided n + 1). State for each parameter, float32: none, "m" for
    momentum, "m" and "v" for Adam. After a step, `metrics` holds "loss" and "projected_gradient" (the mean of c_k), 0-d
    tensors on the device.

    Raises:
        TypeError, ValueError: naming the argument, or the parameter, and the remedy.
    """

    def __init__(
        self,
        params: object,
        lr: float | Tensor,
        *,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        num_samples: int = 1,
        one_sided: bool = False,
        update: str = "sgd",
        betas: tuple[float, float] = (0.9, 0.999),
        delta: float = 1e-8,
        horizon: int = 10,
        distribution: str = "normal",
        seed: int = 0,
        rounding: str = "auto",
        placement: str = "auto",
        pipelined: bool = False,
        layers: RandomBlocks | None = None,
        backend: str = "auto",
    ) -> None:
        self.num_samples = _checks.check_integer(num_samples, "num_samples", 1, 1 << 20)
        self.one_sided = _checks.check_flag(one_sided, "one_sided")
        self.rule = _checks.check_choice(update, "update", UPDATES)
        self.betas = _checks.check_betas(betas)
        self.delta = _checks.check_number(delta, "delta", 1e-30, 1e30)
        if self.rule == "adamezo" and self.num_samples > 1:
            raise ValueError(
                f"num_samples is {num_samples}; update='adamezo' works with 1, one direction for each step"
            )
        self.horizon = _checks.check_integer(horizon, "horizon", 1, 1 << 20)
        self._memory: moments.Memory | None = None
        if self.rule == "adam":
            self._memory = moments.AdamCounts()
        elif self.rule == "adamezo":
            self._memory = moments.AdaMeZOHistory(horizon)
        super().__init__(
            params,
            {"lr": lr, "eps": eps, "weight_decay": weight_decay},
            distribution=distribution,
            seed=seed,
            rounding=rounding,
            placement=placement,
            pipelined=pipelined,
            layers=layers,
            backend=backend,
            options={
                "num_samples": num_samples,
                "one_sided": one_sided,
                "update": update,
                "betas": list(self.betas),
                "delta": delta,
                "horizon": horizon,
            },
            states=dict.fromkeys(STATES.get(update, ()), (torch.float32, 0.0)),
        )

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

    def why_not_graphed(self) -> str | None:
        if isinstance(self._memory, moments.AdaMeZOHistory):
            return "update='adamezo' looks back on other steps each time"
        return super().why_not_graphed()

    def captured_tensors(self) -> list[Tensor]:
        counts = self._memory.counts.values() if isinstance(self._memory, moments.AdamCounts) else ()
        return [*super().captured_tensors(), *counts]

    def row_key(self, param: Tensor) -> Hashable:
        return self.layers.block_of(param) if self.layers is not None and self.rule in ("adam", "adamezo") else None

    def update(self, estimate: Estimate, rates: Rates) -> Update:
        if isinstance(self._memory, moments.AdamCounts):
            return self._memory.update(estimate, rates, self.active.rows, self.betas, self.delta)
        if isinstance(self._memory, moments.AdaMeZOHistory):
            eps = torch.tensor([float(group["eps"]) for group in self.param_groups], dtype=torch.float64)
            rows, dropped = self.active.rows, set(self.active.dropped)
            return self._memory.update(estimate, rates, rows, self.betas, self.delta, dropped, eps)
        if self.rule == "momentum":
            return update.momentum(estimate, rates, self.betas[0])
        return update.sign(estimate, rates) if self.rule == "sign" else update.sgd(estimate, rates)

    def applied(self, ok: Tensor) -> None:
        if self._memory is not None:
            self._memory.commit(ok)

    def history(self) -> list[Any]:
        return [] if self._memory is None else self._memory.save()

    def load_history(self, history: list[Any]) -> None:
        if self._memory is not None:
            self._memory.load(history)

    def memory(self) -> list[float]:
        return [] if self._memory is None else self._memory.numbers()

    def remember(self, step: int, memory: list[float], dropped: set[int], ok: bool) -> None:
        blocks = [None, *range(0 if self.layers is None else len(self.layers.names))]
        if self._memory is not None:
            self._memory.remember(derive_seed(self.seed, step, 0), memory, dropped, blocks, ok)


class LeZO(MeZO):
    """MeZO that leaves out `num_dropped` random transformer blocks in each step: MeZO(layers=RandomBlocks(num_dropped))."""

    def __init__(self, model: nn.Module, lr: float | Tensor, *, num_dropped: int, **options: Any) -> None:
        super().__init__(model, lr, layers=RandomBlocks(num_dropped), **options)
