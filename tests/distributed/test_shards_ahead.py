"""prefetch=True for modules of FSDP2: what runs next is gathered and perturbed beside the block before; stream's bits."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests.distributed.ranks import alone, build_alone, run
from tests.distributed.test_shards_fsdp import blocks_alone, full, kept, nested, root
from tests.methods import METHODS
from tests.models import Toy, seeded, tokens
from tests.placement import side_streams
from tests.placement.side_streams import Late, Recording
from zokern import parts
from zokern.placement import fsdp
from zokern.placement.gathered_ahead import GatheredAhead
from zokern.placement.outside import OutsideItsBlock

STEPS = 3


def deep(dtype: torch.dtype) -> Any:
    return seeded(lambda: Toy(depth=4, tied=False), dtype, 0.3)


def grouped(model: Any) -> None:
    """Two modules gathered together, in another order than they run; shards on a smaller mesh between two forwards."""
    from torch.distributed.fsdp import fully_shard

    fully_shard([model.norm, model.embedding])
    for block in model.layers:
        fully_shard(block, reshard_after_forward=2)
    fully_shard(model)


def turning(model: Any) -> None:
    """The blocks run in another order in every other three forwards, of which a closure does two."""
    nested(model)
    turns = iter(range(99))
    model.register_forward_pre_hook(lambda *_: setattr(model, "backwards", next(turns) // 3 % 2))
    model.run = lambda x: [x := layer(x) for layer in list(model.layers)[:: -1 if model.backwards else 1]][-1]


def saving(model: Any) -> None:
    """A state_dict() while a block runs reshards what was gathered ahead."""
    blocks_alone(model)
    values = [full(p).clone() for p in model.parameters()]

    def save(*_: Any) -> None:
        saved = model.state_dict().values()
        if model.unmoved:
            assert all(torch.equal(full(a), b) for a, b in zip(saved, values, strict=True))

    model.layers[1].register_forward_hook(save)
    model.unmoved = True
    model.norm.register_forward_hook(lambda *_: setattr(model, "unmoved", False))


def losses_and_weights(
    shard: Callable[[nn.Module], None], name: str, dtype: torch.dtype, **options: Any
) -> tuple[list[Tensor], list[Tensor], Any]:
    model, seen = deep(dtype), []
    shard(model)
    opt = build_alone(METHODS[name], model, placement="stream", **options)

    def closure(step: int) -> Tensor:
        seen.append(model(tokens(step)) + model(tokens(step + 9)))
        return seen[-1]

    for step in range(STEPS):
        opt.step(lambda step=step: closure(step))
    return seen, [full(p).clone() for p in opt.weights().values()], opt


def checked(placement: Any, gather: Any, unit: Any, terms: Any) -> None:
    """What lies on a smaller mesh is in memory that may be freed while a side stream reads it."""
    assert all(group.is_sharded for group in fsdp.groups_of(unit.modules[0]._get_fsdp_state()))
    gather(placement, unit, terms)


def compared(shard: Any, names: list[str], kind: Any, foreseen: bool) -> list[str]:
    """What differs from runs without. foreseen: nothing is filled in vain."""
    found = []
    for name in names:
        plain = losses_and_weights(shard, name, torch.bfloat16)
        with pytest.MonkeyPatch.context() as patch:
            lanes = [] if kind is None else side_streams.use(patch, kind)
            patch.setattr(GatheredAhead, "_gather", functools.partialmethod(checked, GatheredAhead._gather))
            ahead = losses_and_weights(shard, name, torch.bfloat16, prefetch=True)
        if not all(torch.equal(a, b) for i in (0, 1) for a, b in zip(plain[i], ahead[i], strict=True)):
            found.append(f"{name}: bits")
        if len({float(x) for x in plain[0]}) < 2:
            found.append("the losses do not react")
        if foreseen and plain[2].counters != ahead[2].counters:
            found.append(f"{name}: counters")
        if type(ahead[2]._placement) is not GatheredAhead:
            found.append(f"{name}: {ahead[2]._placement}")
        found += [f"{name}: {one}" for lane in lanes for one in lane.unordered]
        if lanes and shard is not root and not sum(lane.events for lane in lanes):
            found.append(f"{name}: nothing was filled ahead")
        found += [f"{name}: in flight" for lane in lanes if lane.in_flight]
    return found


SHARDS = [
    (nested, 2, Late),
    (nested, 2, None),
    (kept, 2, Late),
    (grouped, 4, Late),
    (root, 2, Late),
    (turning, 2, Late),
]
SHARDS += [(saving, 2, Recording)]  # whose memory is gone when a late pass would come


@pytest.mark.parametrize(("shard", "ranks", "kind"), SHARDS)
def test_the_bits_are_those_of_stream(shard: Any, ranks: int, kind: Any) -> None:
    names = ["mezo", "helene-by-layer"] if kind is None else ["mezo"]
    foreseen = shard not in (turning, saving)
    assert run(ranks, compared, shard, names, kind, foreseen) == [[]] * ranks


def broken() -> list[str]:
    """A closure that raises inside a block leaves clean weights, nothing gathered, and a model that runs on."""
    found = []
    model, other = deep(torch.float32), deep(torch.float32)
    nested(model), nested(other)
    with pytest.MonkeyPatch.context() as patch:
        lanes = side_streams.use(patch, Late)
        opt = alone(zokern.MeZO, model, 1e-3, eps=0.1, placement="stream", prefetch=True)
        theirs = alone(zokern.MeZO, other, 1e-3, eps=0.1, placement="stream")
        opt.step(lambda: model(tokens(0))), theirs.step(lambda: other(tokens(0)))
        before = [parts.local(p).clone() for p in model.parameters()]
        for error in (RuntimeError, KeyboardInterrupt):

            def fail(*_: Any, error: Any = error) -> None:
                raise error("in a block")

            handle = model.layers[1].inner.register_forward_hook(fail)
            with pytest.raises(error, match="in a block"):
                opt.step(lambda: model(tokens(1)))
            handle.remove()
            if not all(map(torch.equal, before, map(parts.local, model.parameters()))):
                found.append("weights")
            states = fsdp.states_of(fsdp.modules_of(model))
            if not all(group.is_sharded for state in states for group in fsdp.groups_of(state)):
                found.append("gathered")
            found += ["in flight" for lane in lanes if lane.in_flight]
        for step in (1, 2):
            events = lanes[0].events
            a, b = opt.step(lambda step=step: model(tokens(step))), theirs.step(lambda step=step: other(tokens(step)))
            found += [] if torch.equal(a, b) else [f"step {step}"]
            found += [] if lanes[0].events == events + 2 * 4 else ["what is filled ahead"]
    return found


def test_a_closure_that_raises_leaves_nothing_in_flight() -> None:
    assert run(2, broken) == [[], []]


def read_from_outside() -> list[Any]:
    model = deep(torch.float32)
    nested(model)
    opt = alone(zokern.MeZO, model, 1e-3, placement="stream", prefetch=True)
    opt.step(lambda: model(tokens(0)))
    seen = []

    def look(block: Any, *_: Any) -> None:
        seen.append([isinstance(b.gain, OutsideItsBlock) for b in model.layers])
        states = fsdp.states_of(fsdp.modules_of(model))
        seen.append(sum(not group.is_sharded for state in states for group in fsdp.groups_of(state)))

    handle = model.layers[1].inner.register_forward_hook(look)
    opt.step(lambda: model(tokens(0)))
    handle.remove()
    model.layers[1].inner.register_forward_hook(lambda *_: model.layers[2].gain + 1)
    with contextlib.suppress(RuntimeError):
        opt.step(lambda: model(tokens(0)))
        seen.append("not refused")
    return seen


def test_what_is_gathered_ahead_cannot_be_read_outside_its_block() -> None:
    """Nor is more gathered than the root, the block that runs and the next."""
    for seen in run(2, read_from_outside):
        assert seen == [[True, False, True, True], 3] * 2
