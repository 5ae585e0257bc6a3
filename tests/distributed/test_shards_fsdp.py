"""Modules of FSDP2: forwards see the perturbed weights of every tensor, and updates have the bits of a whole model's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests.distributed.ranks import run
from tests.methods import METHODS, Case, build, given, scripted
from tests.models import Toy, seeded, small, tokens
from zokern import parts

Shard = Callable[[nn.Module], None]


def nested(model: Any) -> None:
    """Blocks, and a root that has the rest."""
    from torch.distributed.fsdp import fully_shard

    for block in model.layers:
        fully_shard(block)
    fully_shard(model)


def kept(model: Any) -> None:
    """Blocks that stay gathered, modules gathered together, one inside another."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.layers[0].inner)
    for block in model.layers:
        fully_shard(block, reshard_after_forward=False)
    fully_shard([model.norm, model.embedding])
    fully_shard(model)


def blocks_alone(model: Any) -> None:
    """What lies outside is whole on every rank."""
    from torch.distributed.fsdp import fully_shard

    for block in model.layers:
        fully_shard(block)


def root(model: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model)


def untied(dtype: torch.dtype) -> Any:
    return seeded(lambda: Toy(depth=2, tied=False), dtype, 0.3)


def full(t: Any) -> Tensor:
    return t.detach().full_tensor() if parts.is_dtensor(t) else t.detach()


def same(model: nn.Module, other: nn.Module) -> bool:
    pairs = zip(model.named_parameters(), other.named_parameters(), strict=True)
    return all(a == b and torch.equal(full(p), q.detach()) for (a, p), (b, q) in pairs)


def seeing(model: nn.Module, step: int, values: Any, seen: list[float]) -> Callable[[], Tensor]:
    """A closure that runs the model, and returns what it is given."""
    losses = scripted(values)

    def closure() -> Tensor:
        seen.append(float(model(tokens(step))))
        return losses()

    return closure


def compared(case: Case, shard: Shard, make: Callable[[torch.dtype], Any], dtype: torch.dtype, **options: Any) -> list[str]:
    """What differs from a run of the whole model."""
    model, other = make(dtype), make(dtype)
    shard(model)
    opt, theirs = build(case, model, **options), build(case, other, **options)
    found = []
    for step in range(3):
        seen: list[float] = []
        wanted: list[float] = []
        with warnings.catch_warnings(action="ignore"):
            opt.step(seeing(model, step, given(case, step), seen))
            theirs.step(seeing(other, step, given(case, step), wanted))
        if seen != pytest.approx(wanted, rel=1e-6):
            found.append(f"losses of step {step}: {seen}, and not {wanted}")
        if len(set(wanted)) < 2:
            found.append("the losses do not react")
        model(tokens(9))  # between two steps, which leaves the root gathered
    if not same(model, other):
        found.append("weights")
    if opt.counters["passes"] != theirs.counters["passes"]:
        found.append("passes")
    return found


def every_case(names: list[str], shard: Shard, dtype: torch.dtype, placements: list[str], **options: Any) -> list[str]:
    found = []
    for name in names:
        for placement in placements:
            if placement == "stream" and "curved" in name + "-curved" * name.startswith("hizoo"):
                continue
            wrong = compared(METHODS[name], shard, untied, dtype, placement=placement, **options)
            found += [f"{name} {placement}: {one}" for one in wrong]
    return found


@pytest.mark.parametrize("shard", [nested, kept, blocks_alone, root], ids=lambda shard: shard.__name__)
def test_forwards_and_updates_are_those_of_a_whole_model(shard: Shard) -> None:
    names, placements = ["mezo", "hizoo"], ["inplace", "shadow", "stream"]
    assert run(2, every_case, names, shard, torch.float32, placements) == [[], []]


def test_every_method_with_sixteen_bits() -> None:
    assert run(3, every_case, list(METHODS), nested, torch.bfloat16, ["auto"]) == [[]] * 3


def more_of_it() -> list[str]:
    found = compared(METHODS["mezo-adam"], nested, small, torch.bfloat16, layers=zokern.RandomBlocks(1))  # tied
    found += compared(METHODS["es"], nested, small, torch.bfloat16, distribution=zokern.LowRank(1))
    return found


def test_tied_weights_and_blocks_left_out_and_low_rank() -> None:
    assert run(2, more_of_it) == [[], []]
