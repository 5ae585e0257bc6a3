"""One pass, or one chain, by the names of its parts: how tests ask for what an optimizer's sweeps do."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from zokern import directions, sweep
from zokern.contract.rules import RULES
from zokern.passes.operands import Operands
from zokern.passes.spec import PassNumbers, PassSpec


def launch(
    src: list[Tensor],
    dst: list[Tensor] | None,
    *,
    tensor_ids: list[int],
    offsets: list[int],
    groups: list[int],
    seeds: Tensor,
    coefs: Tensor,
    shared: Tensor,
    states: Sequence[list[Tensor]] = (),
    rounding_seed: Tensor | None = None,
    enabled: Tensor | None = None,
    rule: str = "axpy",
    distribution: str = "normal",
    rounding: str = "nearest",
    square_of_sum: bool = False,
    keep_second: bool = False,
    strides: Sequence[int] = (),
    shapes: Sequence[Sequence[int]] = (),
    backend: str = "auto",
) -> int:
    direction = directions.parse(distribution)
    spec = PassSpec(RULES[rule], direction, rounding, square_of_sum, keep_second)
    numbers = PassNumbers(seeds, coefs, shared, rounding_seed, enabled)
    operands = Operands(
        src, dst, states, tensor_ids, offsets, groups, (), strides, rank=directions.rank(direction), shapes=shapes
    )
    return sweep.run(operands, spec, numbers, backend)


def launch_chain(
    tensors: list[Tensor],
    stages: Sequence[tuple[PassSpec, PassNumbers]],
    *,
    tensor_ids: list[int],
    offsets: list[int],
    groups: list[int],
    rule: str,
    states: Sequence[list[Tensor]] = (),
    probes: Sequence[Tensor | None] = (),
    enabled: Tensor | None = None,
    strides: Sequence[int] = (),
    shapes: Sequence[Sequence[int]] = (),
    backend: str = "auto",
) -> int:
    rank = directions.rank(stages[0][0].direction) if stages else 0
    operands = Operands(tensors, None, states, tensor_ids, offsets, groups, probes, strides, rank=rank, shapes=shapes)
    return sweep.run_chain(operands, stages, RULES[rule], enabled=enabled, backend=backend)
