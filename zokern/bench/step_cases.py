"""What the whole-step benchmark times, and what each case needs of memory. The turns are in step.py."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from zokern import placement
from zokern.bench import models
from zokern.bench.split import Graphed, Journalled, Stepper, Together, why_not_graphed
from zokern.bench.step_peers import PEERS, Published
from zokern.checking.cost import placed, states
from zokern.finetune.methods import build
from zokern.finetune.options import Options
from zokern.optim import ZerothOrderOptimizer

GRAPHED = "graphed"
PIPELINED, PREFETCH, JOURNAL = "-pipelined", "-prefetch", "-journal"  # behind the name of a placement
FORWARD, DIRECTION = "forward", "lowrank:1"  # the placement that needs such a direction
FOLDS, TOGETHER = "forward-folds", "forward-batched"  # updates that wait; all probes of a round in one forward
FOLD_EVERY = 8  # of FOLDS
Groups = dict[tuple[int, int], list["Case"]]  # cases that take turns, by their tokens
LR, EPS = 1e-7, 1e-3  # lr is not 0: an update that moves nothing is left out


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What `step` and `scaling` both take. rounds: timed visits to each case; steps: timed in a row in each visit;
    time_limit: seconds from the start; memory_limit: bytes to stay below, where that is less than what is free."""

    device: str
    rounds: int = 5
    steps: int = 1
    time_limit: float | None = None
    memory_limit: int | None = None


@dataclass(frozen=True)
class Settings(Limits):
    """Of `step`. tokens: (rows, length) of a batch."""

    models: tuple[str, ...]
    methods: tuple[str, ...]
    placements: tuple[str, ...]
    tokens: tuple[tuple[int, int], ...]
    dtype: str
    peers: bool = True
    compiled: bool = False


@dataclass(frozen=True)
class Case:
    """One row of the results. way: a placement, perhaps PIPELINED, with PREFETCH or writing a JOURNAL; GRAPHED, on the
    placement `below`, perhaps with a JOURNAL; of a peer published, foreach or compiled. curvature: its type, where that is
    not the method's default."""

    model: str
    rows: int
    length: int
    method: str
    way: str
    below: str = ""
    curvature: str = ""

    @property
    def tokens(self) -> str:
        return f"{self.rows}x{self.length}"

    @property
    def name(self) -> str:
        """Without tokens for a model that reads none."""
        words = (self.model, self.tokens if self.rows else "", self.method, self.way)
        return " ".join(filter(None, words)) + (f", h {self.curvature}" if self.curvature else "")

    @property
    def is_peer(self) -> bool:
        return self.way in PEERS.get(self.method, {})

    @property
    def placement(self) -> str:
        plain = functools.reduce(str.removesuffix, (PIPELINED, PREFETCH, JOURNAL), self.way)
        return self.below or (FORWARD if self.is_forward else plain)

    @property
    def is_forward(self) -> bool:
        return self.way in (FORWARD, FOLDS, TOGETHER)

    def whole(self, steps: int) -> int:
        """The fewest steps, at least so many, that are to be timed in a row."""
        return -(-steps // FOLD_EVERY) * FOLD_EVERY if self.way == FOLDS else steps

    def facts(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "tokens": self.tokens,
            "method": self.method,
            "way": self.way,
            "peer": self.is_peer,
            **({"placement": self.placement} if self.placement != self.way else {}),
            **({"curvature_dtype": self.curvature} if self.curvature else {}),
        }


def cases(
    settings: Settings,
    placements: tuple[str, ...],
    graphed: Collection[str],
    refused: Collection[tuple[str, str]],
    model: str,
    rows: int,
    length: int,
) -> Iterator[Case]:
    """The cases of one model and one token shape, which take turns. Published MeZO is always among the peers.

    graphed: methods to time in a graph too, on the first of the placements as it is. refused: pairs of a method and a way
    that do not go together.
    """
    for method, ways in PEERS.items() if settings.peers else ():
        if method == "mezo" or method in settings.methods:
            yield from (
                Case(model, rows, length, method, way) for way in ways if way != "compiled" or settings.compiled
            )
    below = next((way for way in placements if way in placement.PLACEMENTS), None)
    for method in settings.methods:
        own = [way for way in placements if (method, way) not in refused]
        yield from (Case(model, rows, length, method, way) for way in own)
        if method in graphed and below is not None:
            yield Case(model, rows, length, method, GRAPHED, below)
            if any(way.endswith(JOURNAL) for way in own):
                yield Case(model, rows, length, method, GRAPHED + JOURNAL, below)


def plan(settings: Settings) -> tuple[dict[str, Groups], dict[str, str]]:
    """What a run times, by model; and the ways that it leaves out, with why.

    Builds each model without memory, to find out what "auto" stands for; asks each method whether it can be graphed.
    """
    dtype, device = getattr(torch, settings.dtype), torch.device(settings.device)
    # Optimizers refuse weights without storage, and the answer does not depend on the model.
    tiny = models.build("tiny-opt", torch.float32, torch.device("cpu"))
    reasons = {
        method: why_not_graphed(_optimizer(Case("tiny-opt", 1, 1, method, "inplace"), tiny), device)
        for method in settings.methods
    }
    graphed = [method for method, reason in reasons.items() if reason is None]
    refused = {
        (method, way): why for way in settings.placements for method in settings.methods
        if (why := _why_not_forward(method, way, tiny)) is not None
    }  # fmt: skip
    groups: dict[str, Groups] = {}
    for name in settings.models:
        module = models.build(name, dtype, torch.device("meta"))
        placements = resolve(settings.placements, module, dtype)
        groups[name] = {t: list(cases(settings, placements, graphed, refused, name, *t)) for t in settings.tokens}
    not_timed = {f"{method} {GRAPHED}": reason for method, reason in reasons.items() if reason is not None}
    if not graphed and len(told := set(not_timed.values())) == 1:
        not_timed = {GRAPHED: told.pop()}
    return groups, not_timed | {f"{method} {way}": why for (method, way), why in refused.items()}


def resolve(placements: tuple[str, ...], module: nn.Module, dtype: torch.dtype) -> tuple[str, ...]:
    """ "auto" becomes the placement that it stands for; each once."""
    chosen = placement.choose(module, sixteen_bit=dtype.itemsize == 2)[0]
    return tuple(dict.fromkeys(chosen if name == "auto" else name for name in placements))


def make(case: Case, model: nn.Module) -> Stepper:
    """The optimizer or the peer of a case. zokern's allocates nothing before its first step."""
    if case.is_peer:
        return PEERS[case.method][case.way](model, LR, EPS)
    optimizer = _optimizer(case, model)
    graphed, together = case.way.removesuffix(JOURNAL) == GRAPHED, case.way == TOGETHER
    stepper: Stepper = Graphed(optimizer) if graphed else Together(optimizer) if together else optimizer
    return Journalled(stepper, optimizer) if case.way.endswith(JOURNAL) else stepper


def _why_not_forward(method: str, way: str, model: nn.Module) -> str | None:
    case = Case("tiny-opt", 1, 1, method, way)
    if not case.is_forward:
        return None
    try:
        _optimizer(case, model)
    except ValueError as error:
        return str(error)
    return None


def _optimizer(case: Case, model: nn.Module) -> ZerothOrderOptimizer:
    chosen = Options(
        method=case.method, placement=case.placement, pipelined=case.way.endswith(PIPELINED),
        prefetch=case.way.endswith(PREFETCH), lr=LR, eps=EPS,
        curvature_dtype=case.curvature or None, distribution=DIRECTION if case.placement == FORWARD else None,
        fold_every=FOLD_EVERY if case.way == FOLDS else 1,
    )  # fmt: skip
    made: ZerothOrderOptimizer = build(model, chosen)
    made.paired_randomness = False  # nothing here draws, and a first step that looks takes memory for it
    return made


def optimizer_of(stepper: Stepper) -> ZerothOrderOptimizer | None:
    """zokern's optimizer in a stepper; None of a peer."""
    inner = stepper.optimizer if isinstance(stepper, Graphed | Together | Journalled) else stepper
    return inner if isinstance(inner, ZerothOrderOptimizer) else None


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def state_bytes(stepper: Stepper, model: nn.Module) -> int:
    """What the method keeps from step to step."""
    if isinstance(stepper, Published):
        return stepper.state_bytes()
    optimizer = optimizer_of(stepper)
    assert optimizer is not None
    return states(optimizer)


def needed_bytes(case: Case, model: nn.Module) -> int:
    """What a step takes beside the weights and the activations, computed: states and the placement's copies, or a
    peer's z."""
    if case.is_peer:
        return PEERS[case.method][case.way].needed_bytes(_trainable(model))
    optimizer = _optimizer(case, model)
    together = optimizer.forwards() if case.way == TOGETHER else 1
    return states(optimizer) + together * placed(optimizer)


def smaller(case: Case, model: nn.Module) -> Case | None:
    """What to time where a case does not fit: its curvature in bfloat16, if it has one and that takes less."""
    if case.is_peer or "h" not in _optimizer(case, model).state_spec:
        return None
    half = replace(case, curvature="bfloat16")
    return half if needed_bytes(half, model) < needed_bytes(case, model) else None
