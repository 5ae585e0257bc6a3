"""The tensors of a case and the calls that are timed: ours on each backend, the peers', and a copy of as many bytes.

Ours go through zokern.sweep.Passes, as an optimizer's do: all tensors in one launch. Peers work on tensors of their own,
because the published way moves its weights to new addresses. Weights and states are random, never zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zokern import backends, directions
from zokern.bench.cases import Case
from zokern.bench.limits import bytes_per_element
from zokern.bench.peers import HeleneSettings, Peer
from zokern.bench.shapes import Shape, opt_like
from zokern.contract.rules import RULES
from zokern.passes.spec import PassNumbers, PassSpec
from zokern.sweep import Member, Passes, Sweep

EPS, LR, C = 1e-3, 1e-6, 0.5  # C: a projected gradient
SMOOTHING, KAPPA = 1e-6, 1.0  # HiZOO's
HELENE = HeleneSettings(alpha=0.95, beta1=0.9, beta2=0.99, b=0.01 * C * C, gamma=1.0, floor=1.0, delta=1e-8)
ROUNDING_SEEDS = (7, 8)

# Each rule's coefficients for one seed, and its scalars.
COEFS = {
    "axpy": {"A": EPS},
    "scaled_axpy": {"A": EPS},
    "hizoo": {"G": -LR * C, "V": SMOOTHING * KAPPA},
    "hizoo_restore": {"A": EPS, "G": -LR * C, "V": SMOOTHING * KAPPA},
    "helene": {"A": 0.0, "G": HELENE.alpha * C, "V": HELENE.b},
}
SCALARS = {
    "decay": 1.0, "smoothing": SMOOTHING, "beta1": HELENE.beta1, "beta2": HELENE.beta2, "step": -LR,
    "gamma": HELENE.gamma, "floor": HELENE.floor, "delta": HELENE.delta,
}  # fmt: skip


def choose_backends(device: torch.device) -> tuple[list[str], dict[str, str]]:
    """The backends to time on `device`, and why others of its kind cannot run. Triton's interpreter is not one."""
    reasons = {name: backends.unavailable_reason(name, device) for name in backends.PREFERENCE[device.type]}
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    return [name for name in reasons if name not in refused], refused


class Workload:
    """A case's tensors on a device, with `elements` in the whole model and `active` in the pass."""

    def __init__(self, case: Case, elements: int, device: torch.device) -> None:
        self.case, self.device = case, device
        shapes = opt_like(elements)
        kept = len(shapes.blocks) - round(case.left_out * len(shapes.blocks))
        # Tensor ids are positions in the whole model, whatever is left out.
        self._shapes = [shape for block in shapes.blocks[:kept] for shape in block] + shapes.rest
        self.blocks, self.blocks_active = len(shapes.blocks), kept
        self.members = self._members()
        self.active = sum(m.param.numel() for m in self.members)
        self.nbytes = self.active * bytes_per_element(case)
        self.direction = directions.parse(case.distribution)
        self.passes: dict[str, Passes] = {}
        self.probes = [torch.empty_like(m.param) for m in self.members] if case.fork else []

    def _random(self, shape: Shape, dtype: str, positive: bool = False) -> Tensor:
        t = torch.randn(shape, device=self.device)
        # Curvatures are near 1, as HiZOO's are; weights of a size that transformers start with.
        t = t.mul_(0.1).abs_().add_(1.0) if positive else t.mul_(0.02)
        return t.to(getattr(torch, dtype))

    def _members(self) -> list[Member]:
        names, dtype = RULES[self.case.rule].states, self.case.state_dtype
        return [
            Member(
                self._random(shape, self.case.dtype), i, 0, f"tensor {i}",
                {name: self._random(shape, dtype, positive=name == "h") for name in names},
            )
            for i, shape in enumerate(self._shapes)
        ]  # fmt: skip

    def _told(self, seeds: list[int], stage: int = 0) -> tuple[PassSpec, PassNumbers]:
        """Of one pass with `seeds`; the fork's is a perturbation, and rounded to nearest as perturbations are."""
        case, rule = self.case, RULES[self.case.rule]
        share = 1.0 / len(seeds)
        coefs = torch.tensor([[[share * COEFS[case.rule][name]] * len(seeds) for name in rule.coefs]])
        shared = torch.tensor([[SCALARS[name] for name in rule.scalars]])
        stochastic = case.rounding == "stochastic" and not (case.fork and stage == case.stages - 1)
        rounded = stochastic or (rule.written > 0 and case.state_dtype != "float32")
        return (
            PassSpec(rule, self.direction, "stochastic" if stochastic else "nearest"),
            PassNumbers(torch.tensor(seeds), coefs, shared, torch.tensor(ROUNDING_SEEDS) if rounded else None),
        )

    def stage_seeds(self) -> list[list[int]]:
        """The seeds of each pass: all differ."""
        return [[stage * self.case.seeds + k for k in range(self.case.seeds)] for stage in range(self.case.stages)]

    def ours(self, backend: str) -> Callable[[], object]:
        """One sweep: a pass with all of its seeds, or a chain of passes."""
        passes, sweep = self.passes_on(backend), Sweep(self.members)
        stages = [self._told(seeds, i) for i, seeds in enumerate(self.stage_seeds())]
        if len(stages) == 1:
            return lambda: passes.run(sweep, *stages[0])
        return lambda: passes.chain(sweep, stages, RULES[self.case.rule], probes=self.probes)

    def passes_on(self, backend: str) -> Passes:
        return self.passes.setdefault(backend, Passes(self.direction, backend))

    def one_by_one(self, backend: str) -> Callable[[], object]:
        """The same stages, and of one pass the same seeds, in a sweep each."""
        passes, sweep = self.passes_on(backend), Sweep(self.members)
        each = self.stage_seeds() if self.case.stages > 1 else [[seed] for seed in self.stage_seeds()[0]]
        told = [self._told(seeds, i) for i, seeds in enumerate(each)]

        def call() -> None:
            for stage, one in enumerate(told):
                forks = self.case.fork and stage == len(told) - 1
                passes.run(sweep, *one, out=self.probes if forks else None)

        return call

    def peer(self, peer: Peer, members: list[Member]) -> Callable[[], object]:
        """A sweep for each thing that our pass does, on tensors of its own."""
        case, w = self.case, [m.param for m in members]
        states = {name: [m.states[name] for m in members] for name in RULES[case.rule].states}
        perturb = (1.0, EPS)

        def call() -> None:
            if case.rule == "axpy":
                for stage in self.stage_seeds():
                    for seed in stage:
                        peer.axpy(w, seed, perturb, case.distribution)
            if case.rule in ("scaled_axpy", "hizoo_restore"):
                peer.scaled_axpy(w, states["h"], 0, perturb)
            if case.rule in ("hizoo", "hizoo_restore"):
                peer.hizoo(w, states["h"], 0, C, LR, SMOOTHING * KAPPA, SMOOTHING)
            if case.rule == "helene":
                peer.helene(w, states["m"], states["h"], 0, C, LR, HELENE)

        return call

    def copy(self) -> Callable[[], object]:
        """dst.copy_(src) that reads and writes as many bytes as the pass must, in float32."""
        src = torch.randn(self.nbytes // 8, device=self.device)
        dst = torch.empty_like(src)
        return lambda: dst.copy_(src)

    def candidates(self, names: list[str], peers: Sequence[Peer]) -> dict[str, Callable[[], object]]:
        """All that is timed, by label: ours for each backend in `names`, "copy", and the peers."""
        calls: dict[str, Callable[[], object]] = {}
        for name in names:
            calls[f"zokern {name}"] = self.ours(name)
            if self.case.apart:
                calls[f"zokern {name}, {self.case.apart}"] = self.one_by_one(name)
        calls["copy"] = self.copy()
        members = self._members()
        return calls | {peer.name: self.peer(peer, members) for peer in peers}
