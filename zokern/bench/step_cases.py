"""What the whole-step benchmark times, and what each case needs of memory. The loop is in step.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from zokern import placement
from zokern.bench.split import Stepper
from zokern.bench.step_peers import PEERS, Peer
from zokern.finetune.methods import build
from zokern.finetune.options import Options
from zokern.optim import ZerothOrderOptimizer
from zokern.placement import sites, stream
from zokern.placement.shadow import Shadow
from zokern.placement.stream import Stream

LR, EPS = 1e-7, 1e-3  # lr is not 0: an update that moves nothing is left out


@dataclass(frozen=True)
class Settings:
    """One run. rounds: timed visits to each case; steps: timed in a row in each visit; tokens: (rows, length) of a batch;
    time_limit: seconds from the start; memory_limit: bytes to stay below, where that is less than what is free."""

    models: tuple[str, ...]
    methods: tuple[str, ...]
    placements: tuple[str, ...]
    tokens: tuple[tuple[int, int], ...]
    dtype: str
    device: str
    rounds: int = 5
    steps: int = 2
    peers: bool = True
    compiled: bool = False
    time_limit: float | None = None
    memory_limit: int | None = None


@dataclass(frozen=True)
class Case:
    """One row of the results. way: a placement, or of a peer published, foreach or compiled."""

    model: str
    rows: int
    length: int
    method: str
    way: str

    @property
    def tokens(self) -> str:
        return f"{self.rows}x{self.length}"

    @property
    def name(self) -> str:
        return f"{self.model} {self.tokens} {self.method} {self.way}"

    @property
    def is_peer(self) -> bool:
        return self.way in PEERS.get(self.method, {})

    def facts(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "tokens": self.tokens,
            "method": self.method,
            "way": self.way,
            "peer": self.is_peer,
        }


def cases(settings: Settings, placements: tuple[str, ...], model: str, rows: int, length: int) -> Iterator[Case]:
    """The cases of one model and one token shape, which take turns. Published MeZO is always among the peers."""
    for method, ways in PEERS.items() if settings.peers else ():
        if method == "mezo" or method in settings.methods:
            yield from (
                Case(model, rows, length, method, way) for way in ways if way != "compiled" or settings.compiled
            )
    for method in settings.methods:
        yield from (Case(model, rows, length, method, way) for way in placements)


def resolve(placements: tuple[str, ...], module: nn.Module, sixteen_bit: bool) -> tuple[str, ...]:
    """ "auto" becomes the placement that it stands for; each once."""
    chosen = placement.choose(module, sixteen_bit)[0]
    return tuple(dict.fromkeys(chosen if name == "auto" else name for name in placements))


def make(case: Case, model: nn.Module) -> Stepper:
    """The optimizer or the peer of a case. zokern's allocates nothing before its first step."""
    if case.is_peer:
        return PEERS[case.method][case.way](model, LR, EPS)
    optimizer: ZerothOrderOptimizer = build(model, Options(method=case.method, placement=case.way, lr=LR, eps=EPS))
    return optimizer


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def state_bytes(stepper: Stepper, model: nn.Module) -> int:
    """What the method keeps from step to step."""
    if isinstance(stepper, Peer):
        return stepper.state_bytes()
    assert isinstance(stepper, ZerothOrderOptimizer)
    each = sum(dtype.itemsize for dtype, _ in stepper._states.values())
    return each * sum(p.numel() for p in _trainable(model))


def needed_bytes(case: Case, model: nn.Module) -> int:
    """What a step takes beside the weights and the activations, computed: states and the placement's copies, or a
    peer's z."""
    if case.is_peer:
        return PEERS[case.method][case.way].needed_bytes(_trainable(model))
    optimizer = make(case, model)
    assert isinstance(optimizer, ZerothOrderOptimizer)
    copies = 0
    if isinstance(optimizer._placement, Stream):
        copies = stream.extra_bytes(model)
    elif isinstance(optimizer._placement, Shadow):
        copies = sum(sites.padded_size(p) * p.element_size() for p in _trainable(model))
    return state_bytes(optimizer, model) + copies
