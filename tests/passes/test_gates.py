"""Passes that leave out the blocks whose gate is 0: nothing of these is read, and the others have the bits of a pass over
them alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from zokern import sweep
from zokern.contract.rules import RULES
from zokern.directions import DIRECTIONS, parse
from zokern.passes.operands import Operands
from zokern.passes.spec import AXPY, PassNumbers, PassSpec
from zokern.passes.table import CHUNK, SRC

# Elements, the global index of the first, and the block: tensors of several chunks, and shards far from their beginning,
# where a chunk of nothing has a number that a kernel counts from.
PIECES = [
    (CHUNK // 8 + 21, CHUNK // 8 * 7, 0),
    (300, 5, 1),
    (515, 2**33 + 3, 1),
    (300, 2**36 + CHUNK - 8, 0),
    (64, 2**32 - 16, 2),
    (9, 0, 3),
]
GATES = ((1, 0, 1, 1), (0, 0, 0, 1), (0, 1, 1, 1))  # the last is of what lies outside the blocks


def tensors(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, generator=generator).to(dtype).to(device) for n, *_ in PIECES]


def numbers(rule: str, device: torch.device, seeds: int) -> PassNumbers:
    generator = torch.Generator().manual_seed(seeds)
    one = RULES[rule]
    given = (
        torch.rand(1, len(one.coefs), seeds, generator=generator),
        torch.rand(1, len(one.scalars), generator=generator),
    )
    return PassNumbers(
        torch.arange(1, seeds + 1, device=device), *(t.to(device) for t in given), torch.tensor([5, 6], device=device)
    )


def over(
    src: list[Tensor], states: list[list[Tensor]], seen: Sequence[int], gates: Tensor | None, out: list[Tensor] | None
) -> Operands:
    def pick(values: Sequence[int]) -> list[int]:
        return [values[i] for i in seen]

    return Operands(
        [src[i] for i in seen], None if out is None else [out[i] for i in seen], [[s[i] for i in seen] for s in states],
        pick(range(len(PIECES))), pick([at for _, at, _ in PIECES]), [0] * len(seen), gates=gates,
        blocks=[] if gates is None else pick([block for *_, block in PIECES]),
    )  # fmt: skip


@pytest.mark.parametrize(("rule", "in_place", "seeds"), [("axpy", True, 1), ("axpy", False, 2), ("hizoo", True, 2)])
def test_dropped_blocks_are_not_touched(rule, in_place, seeds, backend, device, monkeypatch) -> None:
    spec = PassSpec(RULES[rule], DIRECTIONS["normal"], "stochastic")
    every = range(len(PIECES))
    a, b = (tensors(torch.bfloat16, device) for _ in range(2))
    kept_a, kept_b = ([[t.float().abs() for t in x] for _ in RULES[rule].states] for x in (a, b))
    out_a, out_b = (None if in_place else [torch.zeros_like(t) for t in x] for x in (a, b))
    gates = torch.ones(4, dtype=torch.int64, device=device)
    gated, given = over(a, kept_a, every, gates, out_a), numbers(rule, device, seeds)
    for opened in GATES:
        gates.copy_(torch.tensor(opened))
        (table,) = gated.tables()
        places = table.tensors[:, SRC:].clone()
        if device.type == "cpu":  # what a dropped row is read at: nowhere
            table.tensors[:, SRC:] *= torch.tensor([opened[block] for *_, block in PIECES])[:, None]
        sweep.run(gated, spec, given, backend)
        table.tensors[:, SRC:] = places
        seen = [i for i in every if opened[PIECES[i][2]]]
        sweep.run(over(b, kept_b, seen, None, out_b), spec, given, backend)
        for mine, theirs in zip([a, *kept_a, out_a or []], [b, *kept_b, out_b or []], strict=True):
            assert all(map(torch.equal, mine, theirs))
    gates.zero_()  # a pass without gates over the same tensors has a table of its own
    before = [t.clone() for t in a]
    sweep.run(gated, spec, given, backend)
    assert all(map(torch.equal, a, before))
    for x, kept, out in ((a, kept_a, out_a), (b, kept_b, out_b)):
        sweep.run(over(x, kept, every, None, out), spec, given, backend)
    assert all(map(torch.equal, out_a or a, out_b or b))
    assert not all(map(torch.equal, out_a or a, before))


@pytest.mark.parametrize("opened", GATES[:2])
def test_matrices_with_directions_of_low_rank(opened, backend, device) -> None:
    spec = PassSpec(RULES["axpy"], parse("lowrank:2"))
    shapes, blocks = [(40, 64), (300, 60), (9, 33), (5,)], [0, 1, 2, 0]
    a, b = ([torch.full(shape, 0.5, device=device) for shape in shapes] for _ in range(2))
    gates, given = torch.tensor(opened, device=device), numbers("axpy", device, 2)
    ids, nought = list(range(4)), [0] * 4
    sweep.run(Operands(a, None, (), ids, nought, nought, rank=2, gates=gates, blocks=blocks), spec, given, backend)
    seen = [i for i in ids if opened[blocks[i]]]
    if seen:
        some = [0] * len(seen)
        sweep.run(Operands([b[i] for i in seen], None, (), seen, some, some, rank=2), spec, given, backend)
    assert all(map(torch.equal, a, b))


def test_without_directions_a_pass_copies(backend, device, dtype) -> None:
    """The sign of a zero, too: what placement="shadow" makes of the blocks that are left out."""
    src = tensors(dtype, device)
    for t in src:
        t[::2] = -0.0
    gates, out = torch.tensor(GATES[0], device=device), [torch.ones_like(t) for t in src]
    given = numbers("axpy", device, 0)
    plain = PassNumbers(given.seeds, given.coefs, torch.ones_like(given.shared))
    sweep.run(over(src, [], range(len(src)), gates, out), AXPY, plain, backend)
    for t, copy, (*_, block) in zip(src, out, PIECES, strict=True):
        wanted = t if GATES[0][block] else torch.ones_like(t)
        assert torch.equal(copy, wanted)
        assert torch.equal(copy.signbit(), wanted.signbit())
