"""Passes found again: tensors are looked at once for each list of a step, and every change between steps is noticed."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests.launching import launch
from tests.methods import METHODS
from tests.models import Net
from tests.passes.test_chain import one_by_one
from zokern.contract.rules import RULES
from zokern.directions import DIRECTIONS
from zokern.passes import operands, table
from zokern.passes.spec import AXPY, PassNumbers, PassSpec
from zokern.placement import sites
from zokern.sweep import Member, Passes, Sweep

SIZES = (100, 8, 333)


class Asked:
    """How often tables are looked for, and tensors asked for their address."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.keys = self.addresses = 0
        tables, data_ptr = operands.tables, Tensor.data_ptr

        def counting(*args: Any) -> Any:
            self.keys += 1
            return tables(*args)

        def asking(t: Tensor) -> int:
            self.addresses += 1
            return data_ptr(t)

        monkeypatch.setattr(operands, "tables", counting)
        monkeypatch.setattr(Tensor, "data_ptr", asking)


def ones(rule: str) -> tuple[PassSpec, PassNumbers]:
    """Of two groups."""
    names = RULES[rule]
    coefs, shared = torch.full((2, len(names.coefs), 1), 0.25), torch.full((2, len(names.scalars)), 0.25)
    return replace(AXPY, rule=names), PassNumbers(torch.tensor([7]), coefs, shared)


def many(count: int) -> Sweep:
    return Sweep([Member(nn.Parameter(torch.ones(4)), i, i % 2, f"w{i}", {"h": torch.ones(4)}) for i in range(count)])


def passes_on_cpu() -> Passes:
    return Passes(DIRECTIONS["normal"], "cpu")


@torch.no_grad()
def test_addresses_are_asked_for_once(monkeypatch) -> None:
    members, passes = many(200), passes_on_cpu()
    copies, probes = [m.param.clone() for m in members], [m.param.clone() for m in members]
    axpy, scaled = ones("axpy"), ones("scaled_axpy")
    calls = [
        lambda: passes.run(members, *axpy),
        lambda: passes.run(members, *axpy, out=copies),
        lambda: passes.run(members, *scaled),
        lambda: passes.run(members, *scaled, out=copies),
        lambda: passes.chain(members, [axpy, axpy], RULES["axpy"]),
        lambda: passes.chain(members, [axpy, axpy], RULES["axpy"], probes=probes),
    ]
    for call in calls:
        call()
    asked = Asked(monkeypatch)
    for call in calls * 3:
        call()
    assert asked.keys == 0
    assert asked.addresses < 18 * 20, "a few for the numbers of a pass, none for its 200 tensors"
    members.forget()
    calls[0]()
    assert asked.keys == 1
    assert asked.addresses > 200


@pytest.mark.parametrize(
    ("name", "placement", "keys"),
    [
        ("mezo", "inplace", 1),  # perturbed, perturbed the other way, updated: the same weights
        ("mezo", "shadow", 2),  # to the copies, to the weights
        ("mezo-adam", "inplace", 2),  # the update's have states
        ("hizoo", "shadow", 2),
        ("mezo", "stream", 6),  # outside, four blocks, and the update
    ],
)
def test_tables_are_looked_for_once_and_again_when_something_changes(
    name: str, placement: str, keys: int, monkeypatch
) -> None:
    torch.manual_seed(2)
    model, case = Net(), METHODS[name]
    options = {k: v for k, v in case.options.items() if k != "num_samples"}
    opt = case.cls(model, 1e-3, placement=placement, num_samples=4, **options)

    def loss() -> Tensor:
        return model(torch.zeros(2, 5, dtype=torch.int64)).square().mean()

    opt.step(loss)
    asked, passes = Asked(monkeypatch), opt.counters["passes"]
    opt.step(loss)
    assert asked.keys == 0
    assert opt.counters["passes"] - passes == 9
    model.head.weight.data = model.head.weight.data.clone()
    for _ in range(2):
        opt.step(loss)
    assert asked.keys == keys


# -------------------------------------------------------------------------------------------------------- hostile cases


class Twins:
    """Weights with states and places to go to, twice: for passes found again, and for the reference, pass by pass."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        generator = torch.Generator().manual_seed(1)
        fresh = [[torch.randn(n, generator=generator) for n in SIZES] for _ in range(7)]
        self.both = [[[t.clone() for t in kind] for kind in fresh] for _ in range(2)]
        for mine in self.both:
            for state in mine[3:]:
                for t in state:
                    t.abs_().add_(0.5)
        self.weights = [nn.Parameter(t, requires_grad=False) for t in self.both[0][0]]

    def members(self) -> tuple[Sweep, tuple[list[tuple[int, int, int]], int]]:
        """Over the same weights, with ids, groups and one of two pairs of states drawn anew."""
        pair = self.draw.choice([3, 5])
        where = [(self.draw.randrange(1 << 32), 0, self.draw.randrange(2)) for _ in SIZES]
        mine = self.both[0]
        members = [
            Member(w, where[i][0], where[i][2], f"w{i}", {"h": mine[pair][i], "m": mine[pair + 1][i]})
            for i, w in enumerate(self.weights)
        ]
        return Sweep(members), (where, pair)

    def states(self, rule: str, pair: int) -> list[list[Tensor]]:
        return [self.both[1][pair + (name == "m")] for name in RULES[rule].states]

    def swap(self) -> None:
        """Other memory, and other shapes, with other values, through .data."""
        i = self.draw.randrange(len(SIZES))
        value = torch.randn(SIZES[i], generator=torch.Generator().manual_seed(self.draw.randrange(1 << 30)))
        self.weights[i].data = value.clone()
        self.both[1][0][i] = value.clone()

    def same(self) -> None:
        for mine, theirs in zip(self.both[0][1:], self.both[1][1:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        assert all(torch.equal(w, t) for w, t in zip(self.weights, self.both[1][0], strict=True))


@torch.no_grad()
@pytest.mark.parametrize("seed", range(12))
def test_passes_in_any_order_have_the_bits_of_each_alone(seed: int) -> None:
    """Sweeps over the same weights with other ids, groups and states, in place, to two places, as chains; then the next
    step, with lists of its own, and sometimes with other memory."""
    draw = random.Random(seed)
    twins, passes = Twins(draw), passes_on_cpu()
    for _ in range(8):
        sweeps = [twins.members() for _ in range(3)]
        for _ in range(10):
            members, (where, pair) = draw.choice(sweeps)
            rule = draw.choice(["axpy", "scaled_axpy", "helene", "momentum"])
            told, how, mine = told_of(rule, draw), draw.choice(["run", "out", "chain", "fork"]), twins.both
            to = draw.choice([1, 2])
            if how == "run":
                passes.run(members, *told)
                one_by_one(mine[1][0], twins.states(rule, pair), [told], where)
            elif how == "out":
                passes.run(members, *told, out=mine[0][to])
                out_of_place(mine[1][0], mine[1][to], twins.states(rule, pair), told, where)
            else:
                rule = "helene" if rule == "scaled_axpy" else rule
                stages = [told_of(rule, draw), told_of("axpy", draw)]
                probes = mine[0][to] if how == "fork" else []
                passes.chain(members, stages, RULES[rule], probes=probes)
                one_by_one(mine[1][0], twins.states(rule, pair), stages, where, probes=mine[1][to] if probes else ())
        twins.same()
        if draw.random() < 0.5:
            twins.swap()


def told_of(rule: str, draw: random.Random) -> tuple[PassSpec, PassNumbers]:
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    names, k = RULES[rule], draw.choice([1, 2])
    coefs = torch.rand(2, len(names.coefs), k, generator=generator) * 0.1
    shared = torch.rand(2, len(names.scalars), generator=generator) * 0.5 + 0.5
    seeds = torch.tensor([draw.randrange(1 << 62) for _ in range(k)])
    return replace(AXPY, rule=names), PassNumbers(seeds, coefs, shared)


def out_of_place(
    src: list[Tensor], dst: list[Tensor], states: Any, stage: tuple[PassSpec, PassNumbers], where: Any
) -> None:
    kind, scalars = stage
    launch(
        src, dst, states=states, tensor_ids=[w[0] for w in where], offsets=[0] * len(src), groups=[w[2] for w in where],
        seeds=scalars.seeds, coefs=scalars.coefs, shared=scalars.shared, rule=kind.rule.name, backend="reference",
    )  # fmt: skip


def loss_of(model: nn.Module) -> Tensor:
    return sum(p.float().square().sum() for p in model.parameters())


@pytest.mark.parametrize("placement", ["inplace", "shadow"])
def test_other_memory_between_steps(placement: str) -> None:
    """.data is exchanged: the steps go on there with the same bits, and what was there before is not touched again."""
    results = []
    for swaps in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 3))
        opt = zokern.HiZOO(model, 1e-3, placement=placement, smoothing=1e-3)
        left: list[tuple[Tensor, Tensor]] = []
        for _ in range(3):
            opt.step(lambda model=model: loss_of(model))
            for p in model.parameters() if swaps else ():
                left.append((p.data, p.data.clone()))
                p.data = p.data.clone()
        assert all(torch.equal(old, then) for old, then in left)
        results.append(model.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


CHANGES = {
    "a state is shorter": lambda opt, p: opt.state[p].update(h=torch.ones(p.numel() - 1)),
    "a state has another shape": lambda opt, p: opt.state[p].update(h=opt.state[p]["h"].view(-1)),
    "a state has another dtype": lambda opt, p: opt.state[p].update(h=opt.state[p]["h"].double()),
    "a state has other strides": lambda opt, p: opt.state[p].update(h=opt.state[p]["h"].t().contiguous().t()),
    "the weight has another shape, in place": lambda opt, p: setattr(p, "data", p.data.view(-1)),
    "the weight has other strides, in place": lambda opt, p: setattr(p, "data", p.data.view(20, 30).t()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_change_between_steps_that_does_not_fit_is_refused(change) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(30, 20))
    opt = zokern.HiZOO([weight], 1e-3)
    for _ in range(2):
        opt.step(lambda: weight.square().sum())
    change(opt, weight)
    before, h = weight.detach().clone(), opt.state[weight]["h"].clone()
    with pytest.raises((TypeError, ValueError), match=r"a state is|\[0\] is|parameter 0 is"):
        opt.step(lambda: weight.square().sum())
    assert torch.equal(weight, before)
    assert torch.equal(opt.state[weight]["h"], h)


def test_a_state_that_was_exchanged_is_used() -> None:
    results = []
    for exchanged in (False, True):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(30, 20))
        opt = zokern.HiZOO([weight], 1e-3, smoothing=1e-3)
        opt.step(lambda w=weight: w.square().sum())
        old = opt.state[weight]["h"]
        kept = old.clone()
        if exchanged:
            opt.state[weight]["h"] = old.clone()
        opt.step(lambda w=weight: w.square().sum())
        assert torch.equal(old, kept) == exchanged
        results += [weight.detach().clone(), opt.state[weight]["h"]]
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


def test_ids_that_were_exchanged_are_used() -> None:
    """The same tensors at the same addresses, with other noise."""
    weight, passes = torch.zeros(100), passes_on_cpu()
    for tensor_id in (3, 4, 3):
        weight.zero_()
        passes.run(Sweep([Member(weight, tensor_id, 0, "w")]), *ones("axpy"))
        wanted = torch.zeros(100)
        zokern.add_noise_([wanted], tensor_ids=[tensor_id], seeds=[7], coefs=[0.25], decay=0.25)
        assert torch.equal(weight, wanted)


# --------------------------------------------------------------------------------------------------------- table's key

W = torch.arange(64, dtype=torch.float32)
CHANGED = {
    "out is of another dtype": {"dst": [torch.empty(64).view(torch.bfloat16)[:64]]},
    "out has another shape": {"dst": [torch.empty(64).view(8, 8)]},
    "out has other strides": {"src": [W.view(8, 8)], "dst": [torch.empty(64).view(8, 8).t()]},
    "a state is shorter": {"states": [[torch.ones(64)[:63]]]},
    "a state has another shape": {"states": [[torch.ones(64).view(8, 8)]]},
    "a state is of another dtype": {"states": [[torch.ones(64).view(torch.float64)]]},
    "a probe is shorter": {"probes": [torch.empty(64)[:10]]},
    "a probe is of another dtype": {"probes": [torch.empty(64).view(torch.bfloat16)[:64]]},
}


@pytest.mark.parametrize("changed", CHANGED.values(), ids=list(CHANGED))
def test_a_table_of_the_same_addresses_is_not_taken_for_another(changed: dict[str, Any]) -> None:
    """Each is checked, and refused, although one that fits was there before at the very same addresses."""
    first = {"src": [W], "dst": [torch.empty(64)], "states": [], "probes": []}
    for name, value in changed.items():
        given = value[0][0] if name == "states" else value[0]
        whole = torch.tensor([], dtype=torch.float32).set_(given.untyped_storage())[:64]
        whole = whole.view(8, 8) if "src" in changed and name != "states" else whole
        first[name] = [[whole]] if name == "states" else [whole]

    def find(src: list[Tensor], dst: list[Tensor], states: Any, probes: Any) -> list[table.Table]:
        return operands.Operands(src, dst, states, [0], [0], [0], probes).tables()

    find(**first)
    find(**first)
    with pytest.raises((TypeError, ValueError)):
        find(**(first | changed))


# ------------------------------------------------------------------------------------------------------------- lifetime


def alive(storage: Any) -> bool:
    gc.collect()
    return not storage.expired()


def watched(t: Tensor) -> Any:
    return torch.multiprocessing.reductions.StorageWeakRef(t.untyped_storage())


@pytest.mark.parametrize("placement", ["inplace", "shadow", "stream"])
def test_memory_that_was_exchanged_between_steps_is_let_go(placement: str) -> None:
    """Weights that were moved elsewhere, say to the CPU to make room, and states that a load has replaced."""
    model = Net()
    opt = zokern.HiZOO(model, 1e-3, placement=placement)

    def step() -> None:
        opt.step(lambda: model(torch.zeros(2, 5, dtype=torch.int64)).square().mean())

    step()
    weight = model.head.weight
    old, state = watched(weight), watched(opt.state[weight]["h"])
    assert alive(old)
    weight.data = weight.data.clone()
    assert not alive(old)
    opt.load_state_dict(opt.state_dict())
    assert not alive(state)
    step()


def test_an_optimizer_is_freed_with_its_last_name() -> None:
    """No circle keeps it, and with it the module, until the collector of garbage comes by."""
    for placement in ("inplace", "shadow", "stream"):
        model = Net()
        opt = zokern.HELENE(model, 1e-3, placement=placement)
        opt.step(lambda model=model: model(torch.zeros(2, 5, dtype=torch.int64)).square().mean())
        found = weakref.ref(opt)
        gc.disable()
        try:
            del opt
            assert found() is None, placement
        finally:
            gc.enable()


def test_copies_are_freed_before_larger_ones_are_made(monkeypatch) -> None:
    """Also in the middle of a step, where a pipelined update lays out the next one's."""
    storages: list[Any] = []
    original = sites.fit

    def fit(pools: sites.Pools, wanted: Any) -> None:
        old = [torch.multiprocessing.reductions.StorageWeakRef(t.untyped_storage()) for t in pools.values()]
        storages.extend(old)
        grows = any(key not in pools or pools[key].numel() < size for key, size in wanted.items())
        if grows:
            pools.clear()
            assert all(storage.expired() for storage in old)
        original(pools, wanted)

    monkeypatch.setattr(sites, "fit", fit)
    torch.manual_seed(0)
    for placement in ("shadow", "stream"):
        model = Net()
        opt = zokern.MeZO(model, 1e-3, placement=placement, pipelined=True)
        model.head.weight.requires_grad_(False)

        def closure(model: Net = model) -> Tensor:
            model.head.weight.requires_grad_(True)  # the next step has one parameter more
            return model(torch.zeros(2, 5, dtype=torch.int64)).square().mean()

        opt.step(closure)
        opt.step(closure)
    assert storages


class Recorded:
    """Stand-ins for streams, and what the allocator is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[tuple[int, int]] = []
        monkeypatch.setattr(
            Tensor, "record_stream", lambda t, stream: self.told.append((t.data_ptr(), stream.cuda_stream))
        )

    def wanted(self, made: table.Table, streams: Sequence[int]) -> list[tuple[int, int]]:
        return sorted((t.data_ptr(), s) for t in (made.tensors, made.chunks) for s in streams)


def test_a_table_is_freed_for_all_streams_that_read_it(monkeypatch) -> None:
    """When the last who holds it lets go: the cache, a sweep or a graph."""
    recorded = Recorded(monkeypatch)
    monkeypatch.setattr(table, "_cache", type(table._cache)())
    monkeypatch.setattr(table, "_held", [0])
    monkeypatch.setattr(table, "_CACHED_TABLES", 2)
    weights = [torch.zeros(10) for _ in range(4)]
    found = [table.tables([w], [w], [0], [0], [0])[0] for w in weights[:2]]
    for stream in (7, 8, 7):
        found[0][0].read_on(SimpleNamespace(cuda_stream=stream))
    wanted = recorded.wanted(found[0][0], (7, 8))
    table.tables([weights[2]], [weights[2]], [0], [0], [0])  # the first is dropped, but it is held here
    assert table.cached()[0] is found[1]
    assert recorded.told == []
    del found[0]
    gc.collect()
    assert sorted(recorded.told) == wanted
    del found
    table._cache.clear()
    gc.collect()
    assert sorted(recorded.told) == wanted, "tables of the host are on no stream"
