"""Several ranks have the bits of one process: for parts of the batch, for shares of the directions, for both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import zokern
from tests.distributed.ranks import run
from tests.methods import METHODS, build, equal, weights
from tests.models import Toy, seeded, small, tokens
from zokern.optim.helene import HELENE
from zokern.optim.losses import Losses

STEPS = 3
# Where perturbed weights are, with the options that this takes.
PLACES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "inplace": (torch.float32, {"placement": "inplace"}),
    "inplace, 16 bit": (torch.bfloat16, {"placement": "inplace"}),
    "shadow": (torch.bfloat16, {"placement": "shadow"}),
    "shadow, pipelined": (torch.float32, {"placement": "shadow", "pipelined": True}),
    "stream": (torch.float32, {"placement": "stream"}),
    "forward": (torch.float32, {"placement": "forward", "distribution": zokern.LowRank(1)}),
    "LeZO": (torch.float32, {"layers": zokern.RandomBlocks(1)}),
}


def both(
    name: str, dtype: torch.dtype, options: dict[str, Any], step: Callable[..., None], **shared: Any
) -> tuple[bool, int]:
    """Whether a run of all ranks and one of this process alone end with the same weights, and how many forwards a rank did
    for one of the process. step(opt, model, t, alone) does a step."""
    ends, forwards = [], []
    for settings in (shared, {"process_group": None}):
        model = small(dtype)
        opt = build(METHODS[name], model, **{**options, **settings})
        for t in range(STEPS):
            step(opt, model, t, settings is not shared)
        ends.append(weights(model))
        forwards.append(opt.counters["forwards"])
    assert not equal(ends[0], weights(small(dtype)))
    return equal(*ends), forwards[1] // max(forwards[0], 1)


def data_step(opt: Any, model: nn.Module, t: int, alone: bool) -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    if alone:
        opt.step(model, [tokens(t * world + r) for r in range(world)])
    else:
        opt.step(lambda: model(tokens(t * world + rank)))


def directions_step(opt: Any, model: nn.Module, t: int, alone: bool) -> None:
    opt.step(lambda: model(tokens(t)))


def of_all_methods(parallel: str) -> dict[str, tuple[bool, int]]:
    step = data_step if parallel == "data" else directions_step
    return {name: both(name, torch.float32, {}, step, parallel=parallel) for name in METHODS}


def of_all_places(parallel: str, methods: list[str]) -> dict[tuple[str, str], tuple[bool, int]]:
    step = data_step if parallel == "data" else directions_step
    return {
        (name, place): both(name, dtype, options, step, parallel=parallel)
        for name in methods
        for place, (dtype, options) in PLACES.items()
        if not (place == "forward" and METHODS[name].states)
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("parallel", ["data", "directions"])
def test_every_method_has_the_bits_of_one_process(parallel: str) -> None:
    for found in run(2 if parallel == "data" else 3, of_all_methods, parallel):
        assert [name for name, (same, _) in found.items() if not same] == []
        if parallel == "data":
            assert {share for _, share in found.values()} == {2}


@pytest.mark.parametrize(
    ("parallel", "world", "methods"),
    [("data", 3, ["mezo", "gv"]), ("directions", 2, ["fzoo", "hizoo-3"]), ("directions", 5, ["mezo"])],
)
def test_in_every_placement(parallel: str, world: int, methods: list[str]) -> None:
    for found in run(world, of_all_places, parallel, methods):
        assert [name for name, (same, _) in found.items() if not same] == []


def es_forwards() -> int:
    model = small()
    opt = zokern.ES(model, 1e-3, num_directions=8, maximize=True, parallel="directions", placement="shadow")
    for t in range(5):
        opt.step(lambda t=t: model(tokens(t)))
    return opt.counters["forwards"]


def test_forwards_are_shared_out() -> None:
    assert run(2, es_forwards) == [20, 20]
    assert sorted(run(3, es_forwards)) == [10, 15, 15]


# ------------------------------------------------------------------------------------------------- meshes, groups, wrappers


def on_a_mesh(shape: tuple[int, ...], names: tuple[str, ...], parallel: Any) -> bool:
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names or None)
    place = mesh.get_coordinate()
    parts = shape[names.index("data") if names else 0]

    def step(opt: Any, model: nn.Module, t: int, alone: bool) -> None:
        if alone:
            opt.step(model, [tokens(t * parts + d) for d in range(parts)])
        else:
            d = place[names.index("data") if names else 0]
            opt.step(lambda: model(tokens(t * parts + d)))

    return all(
        both(name, torch.bfloat16, {"placement": "shadow"}, step, process_group=mesh, parallel=parallel)[0]
        for name in ("mezo", "gv", "es")
    )


@pytest.mark.parametrize(
    ("shape", "names", "parallel"),
    [
        ((2, 2), ("data", "directions"), None),
        ((2, 2), (), ("data", "directions")),
        ((3, 2), ("directions", "data"), ("directions", "data")),
    ],
)
def test_parts_of_the_batch_and_shares_of_the_directions_on_a_mesh(
    shape: tuple[int, ...], names: tuple[str, ...], parallel: Any
) -> None:
    assert all(run(shape[0] * shape[1], on_a_mesh, shape, names, parallel))


def in_two_groups() -> list[Tensor]:
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    model = small()
    opt = zokern.MeZO(model, 1e-2, process_group=groups[dist.get_rank() % 2])
    opt.step(lambda: model(tokens(dist.get_rank())))
    return weights(model)


def test_groups_do_not_know_each_other() -> None:
    found = run(4, in_two_groups)
    assert equal(found[0], found[2])
    assert equal(found[1], found[3])
    assert not equal(found[0], found[1])


def independent() -> list[Tensor]:
    model = small()
    opt = zokern.MeZO(model, 1e-2, process_group=None)
    opt.step(lambda: model(tokens(dist.get_rank())))
    assert opt.rank == 0
    assert opt.exchanged() == {"collectives": 0, "bytes": 0}
    return weights(model)


def test_without_a_group_runs_are_independent() -> None:
    a, b = run(2, independent)
    assert not equal(a, b)


def wrapped() -> tuple[list[Tensor], list[str], int, int]:
    model = small()
    ddp = DistributedDataParallel(model)
    opt = zokern.MeZO(ddp, 1e-2)
    for t in range(STEPS):
        opt.step(lambda t=t: ddp(tokens(2 * t + dist.get_rank())))
    names = opt.state_dict()["zokern"]["names"][0]
    return weights(model), names, opt.rank, opt.num_ranks


def test_a_ddp_wrapper_says_it_all() -> None:
    (a, names, rank, count), (b, _, other, _) = run(2, wrapped)
    assert equal(a, b)
    assert names == [name for name, _ in small().named_parameters()]
    assert (rank, other, count) == (0, 1, 2)


def wrapped_inside() -> list[Tensor]:
    model = small()
    whole = nn.ModuleDict({"inner": DistributedDataParallel(model)})
    opt = zokern.MeZO(whole, 1e-2)
    opt.step(lambda: whole["inner"](tokens(dist.get_rank())))
    return weights(model)


def test_a_wrapper_inside_a_module_is_found() -> None:
    assert equal(*run(2, wrapped_inside))


# ----------------------------------------------------------------------------------------------------- weights and losses


class Weighted:
    """Micro-batches of each rank, with weights; the whole for one process is all of them in turn."""

    def __init__(self, reduction: str) -> None:
        self.reduction = reduction

    def __call__(self, opt: Any, model: nn.Module, t: int, alone: bool) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        every = [(tokens(t * world + r), float(r + 1)) for r in range(world)]
        own = every if alone else [every[rank]]
        opt.step(model, [b for b, _ in own], batch_weights=[w for _, w in own], reduction=self.reduction)


class SomeAreEmpty:
    """Rank 1 is out of data."""

    def __init__(self, named: bool) -> None:
        self.named = named

    def __call__(self, opt: Any, model: nn.Module, t: int, alone: bool) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        every = [tokens(t * world + r) for r in range(world) if r != 1]
        own = every if alone else [] if rank == 1 else [tokens(t * world + rank)]
        opt.step((lambda b: {"a": model(b), "b": model(b)}) if self.named else model, own)


def of_steps(step: Callable[..., None], name: str, places: list[str]) -> bool:
    return all(both(name, *PLACES[place], step, parallel="data")[0] for place in places)


@pytest.mark.parametrize("step", [Weighted("mean"), Weighted("sum"), SomeAreEmpty(False), SomeAreEmpty(True)])
def test_weights_and_ranks_out_of_data(step: Callable[..., None]) -> None:
    assert all(run(3, of_steps, step, "mezo", ["inplace", "shadow", "forward"]))


def per_example(parallel: str) -> bool:
    """HELENE takes the losses of each example; the ranks have different numbers of them."""
    ends = []
    for shared in (True, False):
        model = seeded(lambda: nn.Linear(4, 3), spread=0.3)
        opt = HELENE(model, 1e-2, hessian_interval=2, **({"parallel": parallel} if shared else {"process_group": None}))
        torch.manual_seed(1)
        xs = [torch.randn(2 + r, 4) for r in range(dist.get_world_size())]
        if parallel == "directions":
            xs = [torch.cat(xs)]
        own = [xs[dist.get_rank() % len(xs)]] if shared else xs
        for _ in range(4):
            opt.step(lambda x, model=model: model(x).square().sum(dim=1), own)
        ends.append(weights(model))
    return equal(*ends)


@pytest.mark.parametrize("parallel", ["data", "directions"])
def test_losses_of_each_example(parallel: str) -> None:
    assert all(run(3, per_example, parallel))


def batched() -> tuple[list[Tensor], list[Tensor], float]:
    ends, sharing = [], []
    for settings in ({"parallel": "directions"}, {"process_group": None}):
        model = seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), spread=0.3)
        opt = zokern.FZOO(model, 1e-4, placement="forward", distribution=zokern.LowRank(1), candidates=5, **settings)
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
        for _ in range(3):
            opt.step(lambda x, model=model: model(x).square().sum(dim=1), [x], batched=3)
        ends.append(weights(model))
        sharing.append(float(opt.metrics["probes_per_forward"]))
    return *ends, sharing[0]


def test_shares_of_the_directions_in_one_forward_each() -> None:
    """Six probes: each rank does three in one forward. Whether rows keep apart each process tests with its own first ones,
    so the losses of the first step are rounded otherwise than those of one process."""
    (a, alone, sharing), (b, _, other) = run(2, batched)
    assert equal(a, b)
    assert (sharing, other) == (3.0, 3.0)
    torch.testing.assert_close(a, alone)


def dropped_out(world: int) -> tuple[bool, bool]:
    """Dropout draws the same on all ranks, also on one that has no probe of a round."""
    ends, generators = [], []
    for shared in (True, False):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
        opt = zokern.MeZO(
            model, 1e-2, placement="shadow", **({"parallel": "directions"} if shared else {"process_group": None})
        )
        for _ in range(3):
            opt.step(lambda model=model: model(torch.ones(5, 4)).square().mean())
        ends.append(weights(model))
        generators.append(torch.get_rng_state())
    return equal(*ends), torch.equal(*generators)


@pytest.mark.parametrize("world", [2, 3])
def test_dropout_is_the_same_on_all_ranks(world: int) -> None:
    assert run(world, dropped_out, world) == [(True, True)] * world


def buffered(depth: int) -> Tensor:
    model = seeded(lambda: Toy(depth=depth))
    opt = zokern.MeZO(model, 1e-2, parallel="data", compare_every=2)
    for t in range(5):
        opt.step(lambda t=t: model(tokens(t)))
    return torch.tensor(opt.exchanged()["collectives"])


def test_weights_are_compared_as_often_as_asked() -> None:
    """Before steps 0, 2 and 4, beside one exchange a step."""
    assert [int(n) for n in run(2, buffered, 1)] == [8, 8]


# ----------------------------------------------------------------------------------------------------------------- cost


def exchanged(name: str) -> tuple[int, int, int]:
    model = small()
    opt = build(METHODS[name], model, parallel="data")
    opt.step(lambda: model(tokens(0)))
    before = opt.exchanged()
    for t in range(10):
        opt.step(lambda t=t: model(tokens(t)))
    after = opt.exchanged()
    return after["collectives"] - before["collectives"], after["bytes"] - before["bytes"], METHODS[name].forwards


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "rounds"), [("mezo-adam", 1), ("mezo-momentum", 1), ("gv", 2), ("es", 1)])
def test_one_exchange_a_round_of_a_few_bytes(name: str, rounds: int) -> None:
    for collectives, sent, forwards in run(2, exchanged, name):
        assert collectives == 10 * rounds
        assert sent == 10 * rounds * (32 + 8 * forwards)
        assert forwards > 2 or sent <= 10 * 64


def put_together() -> list[list[float]]:
    """What a step goes on with where the ranks' losses are 1, 2^-53 and 2^-53: of all ranks, and of one process."""
    each, found = (1.0, 2.0**-53, 2.0**-53), []
    gather = Losses.gather
    for settings in ({"parallel": "data"}, {"process_group": None}):
        seen: list[float] = []
        Losses.gather = lambda self, losses, seen=seen: seen.extend(map(float, losses)) or gather(self, losses)  # type: ignore[method-assign]
        own = [each[dist.get_rank()]] if "parallel" in settings else list(each)
        opt = zokern.MeZO(small(), 1e-3, **settings)
        opt.step(lambda loss: torch.tensor(loss, dtype=torch.float64), own, reduction="sum")
        found.append(seen)
    return found


@pytest.mark.filterwarnings("ignore")
def test_losses_are_added_in_the_order_of_ranks() -> None:
    """The two small ones first would make 1 + 2^-52, which float32 weights do not show."""
    assert run(3, put_together) == [[[1.0, 1.0], [1.0, 1.0]]] * 3
