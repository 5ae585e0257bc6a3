"""What zokern.check says of memory, against what PyTorch's allocator hands out in steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests.methods import METHODS, build
from zokern.bench.budget import peak_bytes
from zokern.checking.cost import memory, needed
from zokern.optim import moves

CPU = torch.device("cpu")


class Stack(nn.Module):
    """Wide enough that scalars, of which a step has hundreds, are few beside a copy of anything."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(200, 128)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 128)) for _ in range(3))
        self.norm = nn.LayerNorm(128)

    def forward(self) -> Tensor:
        x = self.embedding(torch.arange(4))
        for layer in self.layers:
            x = x + layer(x)
        return self.norm(x).float().square().mean()


def taken(make: Callable[[nn.Module], zokern.optim.ZerothOrderOptimizer], count: int) -> tuple[int, int]:
    """Bytes that so many steps hold at once beyond a forward, and what is said of it."""
    torch.manual_seed(0)
    model = Stack().to(torch.bfloat16)
    with torch.no_grad():
        forward = peak_bytes(model, CPU)

    def steps() -> None:
        opt = make(model)
        for _ in range(count):
            opt.step(model)

    peak = peak_bytes(steps, CPU)
    return peak - forward, needed(make(model))


@pytest.fixture(autouse=True)
def nothing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step's look at the weights takes 16 MiB where there are as many, before any forward."""
    monkeypatch.setattr(moves, "CHUNK", 256)


def scalars(beyond: int) -> bool:
    """The state of PyTorch's generator, which the first step keeps to see whether a closure draws, and scalars."""
    return 0 <= beyond - torch.get_rng_state().nbytes < 512


@pytest.mark.parametrize("placement", ["inplace", "stream", "shadow"])
@pytest.mark.parametrize("name", ["mezo", "mezo-adam", "hizoo", "gv-kept", "es"])
def test_steps_hold_what_is_said(name: str, placement: str) -> None:
    found, said = taken(lambda model: build(METHODS[name], model, placement=placement), 2)
    assert scalars(found - said)


@pytest.mark.parametrize(
    "options", [{"placement": "stream", "prefetch": True}, {"placement": "shadow", "pipelined": True}]
)
def test_copies_that_are_made_ahead_are_said_too(options: dict[str, Any]) -> None:
    found, said = taken(lambda model: zokern.MeZO(model, 1e-6, **options), 3)
    assert scalars(found - said)


@pytest.mark.parametrize("fold_every", [1, 2, 3, 0])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", ["mezo", "mezo-one-sided-3", "helene", "gv", "gv-kept", "greedy", "fzoo", "es"])
def test_factors_in_the_forward_are_what_is_said(name: str, rank: int, fold_every: int) -> None:
    """Of each step, and with fold_every=0, where they grow from step to step, of the first."""
    model, options = Stack().to(torch.bfloat16), {"placement": "forward", "distribution": zokern.LowRank(rank)}
    if fold_every != 1 and METHODS[name].states:
        pytest.skip("cannot wait")
    opt = build(METHODS[name], model, fold_every=fold_every, **options)
    said, held = memory(opt)["forward"], []
    for _ in range(2 * max(fold_every, 1) + 1):
        opt.step(model)
        held.append(sum(t.nbytes for t in opt._placement.memory()))
    if name == "gv-kept" and not fold_every:  # a probe of later steps has the kept direction too
        assert held[0] < (said or 0) < held[1]
    else:
        assert said == (held[-1] if fold_every else held[0])
