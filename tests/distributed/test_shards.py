"""Tensors that are cut up over ranks: a run has the bits of one that has them whole, for given losses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import zokern
from tests.distributed.ranks import alone, build_alone, run
from tests.methods import METHODS, play, scripted
from zokern import parts
from zokern.optim import METHODS as REGISTERED

SHAPES = {  # a column, a row, one element, chunks of a pass, sides that 2 and 3 do not divide, more dimensions
    "matrix": (7, 5), "bias": (5,), "one": (1,), "row": (1, 10), "large": (41, 420), "experts": (3, 4, 6),
    "kernel": (5, 2, 3, 3),
}  # fmt: skip


def whole(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: 0.5 * torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def dim0(shape: tuple[int, ...]) -> list[Any]:
    from torch.distributed.tensor import Shard

    return [Shard(0)]


def last(shape: tuple[int, ...]) -> list[Any]:
    from torch.distributed.tensor import Shard

    return [Shard(len(shape) - 1)]


def turns(shape: tuple[int, ...]) -> list[Any]:
    """Replicas among parts."""
    from torch.distributed.tensor import Replicate

    return [Replicate()] if len(shape) == 1 else last(shape) if len(shape) == 2 else dim0(shape)


def on_two(shape: tuple[int, ...]) -> list[Any]:
    """Of a mesh of two dimensions: the first over the last, or one of them twice."""
    from torch.distributed.tensor import Replicate, Shard

    if len(shape) == 2:
        return [Shard(0), Shard(1)] if shape[0] != 41 else [Shard(0), Shard(0)]
    return [Replicate(), Shard(0)] if shape[0] == 5 else [Shard(0), Shard(len(shape) - 1)]


def cut(tensors: dict[str, Tensor], mesh: DeviceMesh, plan: Callable[..., list[Any]]) -> list[tuple[str, nn.Parameter]]:
    from torch.distributed.tensor import distribute_tensor

    return [
        (name, nn.Parameter(distribute_tensor(t.clone(), mesh, plan(tuple(t.shape))))) for name, t in tensors.items()
    ]


def full(t: Any) -> Tensor:
    return t.detach().full_tensor() if parts.is_dtensor(t) else t.detach()


def differing(mesh: DeviceMesh, plan: Callable[..., list[Any]], dtype: torch.dtype, name: str, **options: Any) -> str:
    """Which tensors and states end with other bits than where they are whole; "" for none."""
    case, tensors = METHODS[name], whole(dtype)
    mine = cut(tensors, mesh, plan)
    theirs = [(key, nn.Parameter(t.clone())) for key, t in tensors.items()]
    opt, other = build_alone(case, mine, **options), build_alone(case, theirs, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        play(case, opt, range(3))
        play(case, other, range(3))
    found = []
    for (key, p), (_, q) in zip(mine, theirs, strict=True):
        still = q.numel() > 1 and torch.equal(q.detach(), tensors[key])
        if still or not torch.equal(full(p), q.detach()):
            found.append(key)
        for state, value in other.state[q].items():
            if not torch.equal(full(opt.state[p][state]), value):
                found.append(f"{key}: {state}")
    if opt.layout() != other.layout() or opt.large_steps != other.large_steps:
        found.append("layout")
    return ", ".join(found)


def all_methods(
    sizes: tuple[int, ...], plan: Callable[..., list[Any]], dtype: torch.dtype, names: list[str]
) -> list[str]:
    mesh = init_device_mesh("cpu", sizes)
    return [f"{name}: {wrong}" for name in names if (wrong := differing(mesh, plan, dtype, name, weight_decay=0.1))]


OFTEN = ["mezo", "mezo-adam", "helene-by-layer"]


@pytest.mark.parametrize(
    ("dtype", "names"), [(torch.float32, OFTEN), (torch.bfloat16, list(METHODS))], ids=["float32", "bfloat16"]
)
def test_methods_have_the_bits_of_whole_tensors(dtype: torch.dtype, names: list[str]) -> None:
    assert run(3, all_methods, (3,), dim0, dtype, names) == [[], [], []]


@pytest.mark.parametrize(
    ("sizes", "plan"),
    [((2,), last), ((3,), turns), ((2, 2), on_two), ((5,), dim0)],
    ids=["last", "turns", "mesh", "five"],
)
def test_placements(sizes: tuple[int, ...], plan: Callable[..., list[Any]]) -> None:
    world = torch.tensor(sizes).prod().item()
    assert run(world, all_methods, sizes, plan, torch.bfloat16, OFTEN) == [[]] * world


def low_rank() -> list[str]:
    found = []
    mesh = init_device_mesh("cpu", (2,))
    for plan in (dim0, last):
        for name in OFTEN:
            found.append(differing(mesh, plan, torch.bfloat16, name, distribution=zokern.LowRank(2)))
    return found


def test_directions_of_low_rank() -> None:
    assert run(2, low_rank) == [[""] * 6] * 2


def test_every_method_is_there() -> None:
    assert {case.method for case in METHODS.values()} == REGISTERED.keys() - {"lezo"}


# ------------------------------------------------------------------------------------------------------------- refusals


def refused() -> list[str]:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    every = [
        distribute_tensor(torch.ones(3, 4, 6), mesh, [Shard(1)]),
        DTensor.from_local(torch.ones(4, 4), mesh, [Partial()]),
        DTensor.from_local(torch.ones(4, 4), mesh, [Shard(0)], run_check=False, shape=(5, 4), stride=(4, 1)),
    ]
    told = []
    for t in every:
        other = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate()]))
        with pytest.raises(ValueError, match="params: odd is a DTensor") as error:
            alone(zokern.MeZO, [("good", other), ("odd", nn.Parameter(t))], lr=1e-3)
        told.append(str(error.value))
    return told


def test_what_cannot_be_mapped_is_refused_by_name() -> None:
    for told in run(2, refused):
        assert "cut along dimension 1" in told[0]
        assert "shard it along its first or its last dimension" in told[0]
        assert "Partial has no elements of its own; redistribute it" in told[1]
        assert "this rank holds (4, 4) of it" in told[2]


# ----------------------------------------------------------------------------------- what ranks do and raise is the same


def sizes_of_steps() -> list[Any]:
    """The first rank has small weights and the second large ones; two tensors are on one rank alone."""
    mesh = init_device_mesh("cpu", (2,))
    tensors = {"a": torch.cat([torch.full((4, 2), 1e-6), torch.full((4, 2), 10.0)]), "b": torch.ones(1)}
    told: list[Any] = []
    opt = alone(zokern.MeZO, cut(tensors, mesh, dim0), lr=0.1, eps=0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.step(scripted([100.0, 0.0]))
    told += [opt.large_steps, [str(one.message) for one in caught], opt._moves.rms, opt.counters["passes"]]
    for eps in (1e8, 1.0):
        tiny = alone(zokern.MeZO, cut(tensors, mesh, dim0), lr=0.1, eps=eps, placement="inplace")
        try:
            tiny.step(scripted([1.0, 0.9]))
            told.append("")
        except ValueError as error:
            told.append(str(error))
    return told


def test_ranks_tell_and_raise_the_same() -> None:
    first, second = run(2, sizes_of_steps)
    assert first == second
    assert first[0] == 1
    assert len(first[1]) == 1
    assert first[2] == pytest.approx(((8 * 100.0 + 8 * 1e-12 + 1) / 17) ** 0.5)
    assert first[3] == 3
    assert "the weights' rms" in first[4]
    assert first[5] == ""


def nothing_here() -> tuple[int, dict[str, int], list[int]]:
    """Rank 1 has no element of anything."""
    mesh = init_device_mesh("cpu", (2,))
    mine = cut({"a": torch.ones(1), "b": torch.ones(1, 3)}, mesh, dim0)
    heard: list[int] = []
    opt = alone(zokern.MeZO, mine, lr=0.1, update="adam")
    opt.listeners.append(lambda event: heard.append(len(event.passes)))
    opt.step(scripted([1.0, 0.9]))
    opt.step(scripted([1.0, 0.8]))
    counters = {name: count for name, count in opt.counters.items() if name in ("steps", "forwards", "passes")}
    return dist.get_rank(), counters, heard


def test_a_rank_without_an_element_counts_the_same_passes() -> None:
    (_, first, heard), (_, second, other) = run(2, nothing_here)
    assert first == second == {"steps": 2, "forwards": 4, "passes": 6}
    assert heard == other == [3, 3]
