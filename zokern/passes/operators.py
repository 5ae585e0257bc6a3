"""A pass as two operators of torch.library, for whoever looks at what PyTorch does: compilers, modes, the profiler.
What makes the factors of low-rank directions is a third, `zokern::fill_factors`.

`zokern::pass_` and `zokern::pass_out` carry mutation annotations and fakes, so functions that call a pass compile under
torch.compile(fullgraph=True). Operators take tensors, lists and plain values: records are taken apart and put together
here, and nowhere else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zokern import directions
from zokern.contract.rules import rule_called
from zokern.passes.operands import Operands
from zokern.passes.spec import PassNumbers, PassSpec

Launch = Callable[[Operands, PassSpec, PassNumbers, str], int]
_REST = (
    "Tensor(b!)[] first, Tensor(c!)[] second, int[] tensor_ids, int[] offsets, int[] groups, Tensor seeds, "
    "Tensor coefs, Tensor shared, Tensor? rounding_seed, Tensor? enabled, str rule, str distribution, str rounding, "
    "bool square_of_sum, bool keep_second, str backend, int prepared=0, int[] strides=[], "
    "int[] shapes=[], Tensor? gates=None, int[] blocks=[]"
)
_library = torch.library.Library("zokern", "DEF")
_done_by: list[Launch] = []


def register(launch: Launch) -> None:
    """Defines both operators, once; `launch` does what they say."""
    _done_by.append(launch)
    _library.define(f"pass_(Tensor(a!)[] tensors, {_REST}) -> ()")
    _library.define(f"pass_out(Tensor[] src, Tensor(a!)[] dst, {_REST}) -> ()")
    for key in ("CPU", "CUDA"):
        _library.impl("pass_", _pass_, key)
        _library.impl("pass_out", _pass_out, key)
    torch.library.register_fake("zokern::pass_", _fake, lib=_library)
    torch.library.register_fake("zokern::pass_out", _fake, lib=_library)


Fill = Callable[[Tensor, Tensor, Tensor, Tensor, int, str], None]


def register_fill(fill: Fill) -> Callable[..., None]:
    """Defines the operator that `fill` does, once, and returns it."""
    _library.define(
        "fill_factors(Tensor(a!) buffer, Tensor sides, Tensor side_chunks, Tensor seeds, int rank, str backend) -> ()"
    )
    for key in ("CPU", "CUDA"):
        _library.impl("fill_factors", fill, key)
    torch.library.register_fake("zokern::fill_factors", _fake, lib=_library)
    made: Callable[..., None] = torch.ops.zokern.fill_factors
    return made


def through_torch(operands: Operands, spec: PassSpec, numbers: PassNumbers, backend: str) -> int:
    """Calls the operator of a pass; returns the number of its launches."""
    first, second = [*operands.states, [], []][:2]
    rest = (
        first, second, operands.tensor_ids, operands.offsets, operands.groups, numbers.seeds, numbers.coefs, numbers.shared,
        numbers.rounding_seed, numbers.enabled, spec.rule.name, spec.direction.name, spec.rounding, spec.square_of_sum,
        spec.keep_second, backend, 0, operands.strides, [n for shape in operands.shapes for n in (len(shape), *shape)],
        operands.gates, operands.blocks,
    )  # fmt: skip
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(operands.written)
    if operands.dst is None:
        torch.ops.zokern.pass_(operands.src, *rest)
    else:
        torch.ops.zokern.pass_out(operands.src, operands.dst, *rest)
    return len(operands.kinds())


def _operator(
    src: list[Tensor],
    dst: list[Tensor] | None,
    first: list[Tensor],
    second: list[Tensor],
    tensor_ids: list[int],
    offsets: list[int],
    groups: list[int],
    seeds: Tensor,
    coefs: Tensor,
    shared: Tensor,
    rounding_seed: Tensor | None,
    enabled: Tensor | None,
    rule: str,
    distribution: str,
    rounding: str,
    square_of_sum: bool,
    keep_second: bool,
    backend: str,
    prepared: int = 0,
    strides: Sequence[int] = (),
    shapes: Sequence[int] = (),
    gates: Tensor | None = None,
    blocks: Sequence[int] = (),
) -> None:
    """What `through_torch` took apart, together again. prepared: nothing; graphs that version 0.1 recorded give it. shapes:
    each as the number of its sizes and these."""
    states, direction = [state for state in (first, second) if state], directions.parse(distribution)
    sizes, whole = iter(shapes), []
    for dims in sizes:
        whole.append(tuple(itertools.islice(sizes, dims)))
    operands = Operands(
        src, dst, states, tensor_ids, offsets, groups, strides=strides, rank=directions.rank(direction), shapes=whole,
        gates=gates, blocks=blocks,
    )  # fmt: skip
    spec = PassSpec(rule_called(rule), direction, rounding, square_of_sum, keep_second)
    numbers = PassNumbers(seeds.contiguous(), coefs.contiguous(), shared.contiguous(), rounding_seed, enabled)
    _done_by[0](operands, spec, numbers, backend)


def _pass_(tensors: list[Tensor], *args: Any) -> None:
    _operator(tensors, None, *args)


def _pass_out(src: list[Tensor], dst: list[Tensor], *args: Any) -> None:
    _operator(src, dst, *args)


def _fake(*args: object) -> None:
    """Nothing is returned and no shape changes."""
