"""Passes along directions of low rank: every backend has the reference's bits, whole or in shards, in pieces or not."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import zokern
from tests.devices import DTYPES
from tests.launching import launch, launch_chain
from tests.passes.test_chain import GROUPS, one_by_one, stage
from zokern import directions
from zokern.backends import native
from zokern.contract.rules import RULES
from zokern.passes import factors
from zokern.passes.spec import rule_of_probes

# A multiple of eight columns and none, fewer than eight, rows longer than a chunk, fewer rows than columns, a stack
SHAPES = [(20, 64), (33, 23), (300, 5), (5, 300), (3, 20_000), (17_000, 3), (3, 24, 16), (4, 9, 7), (50,), (4, 4)]
RANKS = [1, 2, 3]
SMALL = [(20, 64), (9, 23), (40, 5), (3, 24, 16), (4, 9, 7), (50,), (4, 4)]  # for an interpreter


def shapes_for(backend: str) -> list[tuple[int, ...]]:
    return SMALL if backend == "triton" else SHAPES


def fresh(dtype: torch.dtype, device: torch.device, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes]


def added(tensors: list[Tensor], backend: str, rank: int, **more: object) -> list[Tensor]:
    rounding = {} if tensors[0].dtype == torch.float32 else {"rounding": "stochastic", "rounding_seed": 9}
    zokern.add_noise_(
        tensors, tensor_ids=range(len(tensors)), seeds=[5, 6, 7], coefs=[0.1, -0.2, 0.3], decay=0.9,
        distribution=zokern.LowRank(rank), backend=backend, **rounding, **more,
    )  # fmt: skip
    return [t.cpu() for t in tensors]


def same(got: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("rank", RANKS)
def test_the_reference_and_every_backend_agree(
    backend: str, device: torch.device, dtype: torch.dtype, rank: int
) -> None:
    shapes = shapes_for(backend)
    wanted = added(fresh(dtype, torch.device("cpu"), shapes), "reference", rank)
    assert same(added(fresh(dtype, device, shapes), backend, rank), wanted)


@pytest.mark.parametrize("isa", native.extension.cpu_instruction_sets()[1:])
def test_every_instruction_set(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = added(fresh(dtype, torch.device("cpu"), SHAPES), "cpu", 2)
    monkeypatch.setenv("ZOKERN_CPU_ISA", isa)
    assert same(added(fresh(dtype, torch.device("cpu"), SHAPES), "cpu", 2), wanted)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "axpy"])
def test_every_rule(backend: str, device: torch.device, rule: str) -> None:
    """Two groups, K seeds, states, 16-bit ones where the rule has them, and the square of a sum."""
    draw = random.Random(rule)
    for dtype, seeds in ((torch.float32, 1), (torch.bfloat16, 3)):
        kind, numbers = stage(rule, draw, seeds, "normal", dtype == torch.bfloat16)
        results = []
        state_dtype = torch.bfloat16 if RULES[rule].half_state else torch.float32
        shapes = SMALL[:5] if backend == "triton" else SHAPES[:4] + SHAPES[6:]
        for name, where in (("reference", torch.device("cpu")), (backend, device)):
            tensors = fresh(dtype, where, shapes)
            states = [
                [t.abs().to(state_dtype) + 0.5 for t in fresh(torch.float32, where, shapes)] for _ in RULES[rule].states
            ]
            launch(
                tensors, None, states=states, tensor_ids=list(range(len(shapes))), offsets=[0] * len(shapes),
                groups=[i % GROUPS for i in range(len(shapes))], seeds=numbers.seeds, coefs=numbers.coefs,
                shared=numbers.shared, rounding_seed=numbers.rounding_seed, rule=rule, distribution="lowrank:2",
                rounding=kind.rounding, square_of_sum=kind.square_of_sum, keep_second=kind.keep_second, backend=name,
            )  # fmt: skip
            results.append([t.cpu() for t in [*tensors, *(t for state in states for t in state)]])
        assert same(*results)


def sharded(t: Tensor) -> Iterator[tuple[Tensor, int, int]]:
    """A matrix in rows, in columns and in pieces of rows: each shard with its offset and stride."""
    rows, columns = t.shape
    cut = rows // 3
    yield t[:cut], 0, 0
    yield t[cut:], cut * columns, 0
    yield t[:, : columns // 2].contiguous(), 0, columns
    yield t[:, columns // 2 :].contiguous(), columns // 2, columns
    yield t.view(-1)[7:-5], 7, 0  # no matrix any more


def cut_out(t: Tensor) -> list[Tensor]:
    return [part for part, _, _ in sharded(t)]


@pytest.mark.parametrize("shape", [(20, 64), (33, 23), (6, 20_000)])
def test_shards_have_the_bits_of_the_whole(backend: str, device: torch.device, dtype: torch.dtype, shape) -> None:
    if backend == "triton" and (shape[1] > 64 or dtype == torch.float16):
        pytest.skip("an interpreter takes long; tests/backends/test_triton.py has long rows")
    if backend == "triton":
        shape = (9, shape[1])  # a shard in columns has a program for each row
    (whole,) = added(fresh(dtype, device, [shape]), backend, 2)
    parts = list(sharded(fresh(dtype, device, [shape])[0]))
    tensors = [part.clone() for part, _, _ in parts]
    rounding = {} if dtype == torch.float32 else {"rounding": "stochastic", "rounding_seed": 9}
    zokern.add_noise_(
        tensors, tensor_ids=[0] * len(parts), seeds=[5, 6, 7], coefs=[0.1, -0.2, 0.3], decay=0.9,
        distribution="lowrank:2", offsets=[offset for _, offset, _ in parts], strides=[stride for _, _, stride in parts],
        shapes=[shape] * len(parts), backend=backend, **rounding,
    )  # fmt: skip
    assert same([t.cpu() for t in tensors], cut_out(whole))


def test_a_shard_needs_the_shape_of_the_whole() -> None:
    w = torch.zeros(4, 8)
    given = {"tensor_ids": [0], "seeds": [1], "coefs": [1.0], "distribution": "lowrank:1"}
    for more in ({"offsets": [16]}, {"strides": [16]}):
        with pytest.raises(ValueError, match=r"tensors\[0\].*is a shard.*give shapes"):
            zokern.add_noise_([w], **given, **more)
    for wrong in ((8, 9), (3, 8), (7, 8)):
        with pytest.raises(ValueError, match=r"shapes\[0\] is .* the whole tensor, with rows of 8"):
            zokern.add_noise_([w], **given, offsets=[32 if wrong == (7, 8) else 0], shapes=[wrong])
    with pytest.raises(TypeError, match=r"shapes\[0\] must be a sequence of ints"):
        zokern.add_noise_([w], **given, shapes=[8])
    with pytest.raises(ValueError, match="shapes has 2 entries"):
        zokern.add_noise_([w], **given, shapes=[(4, 8)] * 2)
    assert not w.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", ["axpy", "hizoo_restore", "adam"])
def test_a_chain_has_the_bits_of_its_passes(backend: str, device: torch.device, dtype: torch.dtype, rule: str) -> None:
    draw = random.Random(f"{rule} {dtype}")
    if backend == "triton" and (rule == "adam" or dtype == torch.float16):
        pytest.skip("an interpreter takes long")
    helper, shapes = rule_of_probes(RULES[rule]).name, SMALL if backend == "triton" else SHAPES[:4] + SHAPES[6:]
    where = [(i, 0, i % GROUPS) for i in range(len(shapes))]
    for names in ([rule, helper, rule], [rule, helper]):
        fork = len(names) == 2
        stages = [stage(n, draw, draw.choice([1, 2, 3]), "lowrank:2", not fork and draw.random() < 0.5) for n in names]
        results = []
        for name, at in (("reference", torch.device("cpu")), (backend, device)):
            tensors = fresh(dtype, at, shapes)
            states = [[t.abs() + 0.5 for t in fresh(torch.float32, at, shapes)] for _ in RULES[rule].states]
            probes = [torch.zeros_like(t) if i % 2 else None for i, t in enumerate(tensors)] if fork else []
            if name == "reference":
                one_by_one(tensors, states, stages, where, probes=probes)
            else:
                launch_chain(
                    tensors, stages, states=states, probes=probes, rule=rule, backend=name,
                    tensor_ids=[w[0] for w in where], offsets=[0] * len(shapes), groups=[w[2] for w in where],
                )  # fmt: skip
            every = [*tensors, *(t for state in states for t in state), *(t for t in probes if t is not None)]
            results.append([t.cpu() for t in every])
        assert same(*results)


def test_pieces_have_the_same_bits(backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors that do not fit are made for some tensors at a time."""
    shapes = shapes_for(backend)
    first = fresh(torch.bfloat16, device, shapes)  # kept: others at their addresses would be given their table
    wanted = added(first, backend, 3)
    monkeypatch.setattr(factors, "MOST_BYTES", 6_000)
    cuts = []
    kept = factors.FactorTable._cut
    monkeypatch.setattr(factors.FactorTable, "_cut", lambda self, n: cuts.append(kept(self, n)) or cuts[-1])
    empty, buffers = torch.empty, []
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", lambda *given, **how: buffers.append(given) or empty(*given, **how))
        assert same(added(fresh(torch.bfloat16, device, shapes), backend, 3), wanted)
    if backend == "cpu":  # what could fail for want of memory comes before the first piece
        assert len(buffers) == 1
    assert [len(made) > 1 for made in cuts] == ([] if backend == "reference" else [True])
    stages = [stage("axpy", random.Random(1), 2, "lowrank:3", True) for _ in range(3)]
    where = [(i, 0, 0) for i in range(len(shapes))]
    one = fresh(torch.bfloat16, torch.device("cpu"), shapes)
    one_by_one(one, [], stages, where)
    other = fresh(torch.bfloat16, device, shapes)
    launch_chain(other, stages, tensor_ids=list(range(len(shapes))), offsets=[0] * len(shapes),
                 groups=[0] * len(shapes), rule="axpy", backend=backend)  # fmt: skip
    assert same([t.cpu() for t in other], one)


def test_memory_of_factors_is_bounded() -> None:
    """128 seeds of a matrix and of many: 64 MiB at once, or those of one tensor."""
    shapes = [torch.empty(512, 512) for _ in range(64)]
    made = zokern.passes.table.build(
        shapes, shapes, list(range(64)), [0] * 64, [0] * 64, stacks=[(1, 512, 512)] * 64, rank=4
    ).factors  # fmt: skip
    assert made is not None
    pieces = made.pieces(128)
    assert len(pieces) > 1
    assert all(4 * 128 * piece.of_seed <= factors.MOST_BYTES for piece in pieces)
    assert [piece.places[0] for piece in pieces[1:]] == [piece.places[1] for piece in pieces[:-1]]
    assert len(made.pieces(1)) == 1


def test_compiled_and_profiled_calls_are_the_same() -> None:
    """Through torch's dispatcher a pass is taken apart into plain values, its shapes too."""
    wanted = added(fresh(torch.float32, torch.device("cpu"), [(20, 64), (50,)]), "cpu", 2)
    given = fresh(torch.float32, torch.device("cpu"), [(20, 64), (50,)])
    with torch.profiler.profile():
        assert same(added(given, "cpu", 2), wanted)
    part = fresh(torch.float32, torch.device("cpu"), [(20, 64)])[0][5:].clone()
    with torch.profiler.profile():
        added([part], "cpu", 2, offsets=[5 * 64], shapes=[(20, 64)])
    assert torch.equal(part, wanted[0][5:])


def test_ranks_are_told_apart() -> None:
    assert directions.rank(zokern.LowRank(3)) == 3
    assert directions.rank(zokern.Normal()) == 0
    one, two = (added(fresh(torch.float32, torch.device("cpu"), [(20, 64)]), "cpu", rank)[0] for rank in (1, 2))
    assert not torch.equal(one, two)
