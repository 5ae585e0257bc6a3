"""step(batched=True): all probes of a round in one forward, with the losses of one after another."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import zokern
from tests.models import seeded
from zokern import journal
from zokern._checks import ZokernWarning
from zokern.optim.losses import Losses
from zokern.placement import together as placement

WORDS, WIDTH, B, T = 19, 12, 2, 5
METHODS: dict[str, tuple[Callable[..., Any], dict[str, Any], int]] = {  # and how many probes share a forward
    "mezo": (zokern.MeZO, {}, 2),
    "mezo-3": (zokern.MeZO, {"num_samples": 3}, 6),
    "mezo-one-sided": (zokern.MeZO, {"one_sided": True, "num_samples": 3}, 4),
    "mezo-adam": (zokern.MeZO, {"update": "adam"}, 2),
    "es": (zokern.ES, {"num_directions": 5, "maximize": False}, 5),
    "es-antithetic": (zokern.ES, {"num_directions": 3, "antithetic": True, "maximize": True}, 6),
    "fzoo": (zokern.FZOO, {"candidates": 5}, 6),
    "gv": (zokern.MeZOGV, {"candidates": 5}, 5),
    "greedy": (zokern.MeZOGreedy, {"candidates": 5}, 5),
}


class Scale(nn.Module):
    """A norm as Llama's and Gemma's, and a shift of each position."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(1, 100, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return ((1.0 + self.weight.float()) * wide).type_as(x) + self.shift[:, : x.shape[1]]


class Reader(nn.Module):
    """A classifier of token rows: tied words, learned positions [T] as in nanoGPT, attention, norms of three kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, WIDTH), nn.Embedding(100, WIDTH)
        self.first, self.second, self.third = nn.LayerNorm(WIDTH), Scale(), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.words(ids) + self.positions(torch.arange(ids.shape[1]))
        q, k, v = self.qkv(self.first(x)).chunk(3, dim=-1)
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None))
        return self.head(self.third(self.second(x)))


def reader(dtype: torch.dtype | None = None) -> Reader:
    return seeded(Reader, dtype, 0.2)


def batch(step: int = 0, length: int = T, size: int = B) -> dict[str, Tensor]:
    ids = torch.randint(WORDS, (size, length + 1), generator=torch.Generator().manual_seed(step))
    return {"ids": ids[:, :-1], "next": ids[:, 1:]}


def each(model: nn.Module) -> Callable[[Any], Tensor]:
    """The loss of each example."""

    def closure(one: Any) -> Tensor:
        logits = model(one["ids"]).float()
        return functional.cross_entropy(logits.transpose(1, 2), one["next"], reduction="none").mean(dim=1)

    return closure


def optimizer(model: nn.Module, method: str, lr: float = 1e-3, rank: int = 1, **options: Any) -> Any:
    cls, own, _ = METHODS[method]
    options = {"placement": "forward", "distribution": zokern.LowRank(rank), **own, **options}
    return cls(model, lr, **{"eps": 1e-2, "seed": 3, **options})


@dataclass
class Run:
    losses: list[list[float]]  # of each round, as the method gets them
    bits: list[Tensor]
    opt: Any


def run(
    monkeypatch: pytest.MonkeyPatch, method: str, batched: Any, steps: int = 3, model: nn.Module | None = None,
    batches: Callable[[int], list[Any]] = lambda step: [batch(step)], closure: Any = each, **options: Any,
) -> Run:  # fmt: skip
    model = reader() if model is None else model
    rounds: list[list[float]] = []
    gather = Losses.gather

    def noting(self: Losses, losses: list[Tensor]) -> list[Tensor]:
        rounds.append([float(x) for x in losses])
        return gather(self, losses)

    monkeypatch.setattr(Losses, "gather", noting)
    stepping = {name: options.pop(name) for name in ("reduction", "batch_weights", "loss_weights") if name in options}
    opt = optimizer(model, method, **options)
    for step in range(steps):
        opt.step(closure(model), batches(step), batched=batched, **stepping)
    monkeypatch.setattr(Losses, "gather", gather)
    return Run(rounds, [p.detach().clone() for p in model.parameters()], opt)


def near(a: Run, b: Run, tolerance: float = 2e-6) -> None:
    assert [len(r) for r in a.losses] == [len(r) for r in b.losses]
    for x, y in zip(chain.from_iterable(a.losses), chain.from_iterable(b.losses), strict=True):
        assert abs(x - y) <= tolerance * abs(x)


@pytest.fixture(autouse=True)
def told_is_an_error():
    """So no test falls back unseen."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ZokernWarning)
        yield


# ----------------------------------------------------------------------------------------------------- losses and steps


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_those_of_one_after_another(method, monkeypatch):
    alone, together = run(monkeypatch, method, 1, lr=0.0), run(monkeypatch, method, True, lr=0.0)
    near(alone, together)
    assert (
        together.losses[0] == alone.losses[0]
    )  # the first step is the test, and takes what it has evaluated one by one
    assert float(together.opt.metrics["probes_per_forward"]) == METHODS[method][2]
    assert float(alone.opt.metrics["probes_per_forward"]) == 1


@pytest.mark.parametrize(("rank", "dtype"), [(2, torch.float32), (1, torch.bfloat16), (1, torch.float16)])
def test_ranks_and_16_bits(rank, dtype, monkeypatch):
    model = reader(dtype)
    alone = run(monkeypatch, "fzoo", 1, lr=0.0, rank=rank, model=copy.deepcopy(model))
    together = run(monkeypatch, "fzoo", True, lr=0.0, rank=rank, model=model)
    near(alone, together, 2e-6 if dtype == torch.float32 else 2e-2)
    assert float(together.opt.metrics["probes_per_forward"]) == 6


def test_forwards_are_counted_as_they_are_done(monkeypatch):
    """Of 7 probes in three steps: 7, then with one block, 7 together, and 3 runs that change some (7 < 2^3)."""
    made = run(monkeypatch, "fzoo", True, candidates=6)
    assert made.opt.counters["forwards"] == 7 + 2 + 3 + 1 + 1
    assert run(monkeypatch, "fzoo", 3, candidates=6).opt.counters["forwards"] == 3 + 2 + 2 + 1 + 1 + 2 * 3
    assert run(monkeypatch, "fzoo", 1, candidates=6).opt.counters["forwards"] == 21


def test_a_forward_takes_at_most_so_many(monkeypatch):
    near(run(monkeypatch, "es", 1, lr=0.0), three := run(monkeypatch, "es", 3, lr=0.0))
    assert float(three.opt.metrics["probes_per_forward"]) == 3


def test_the_update_is_that_of_the_losses(monkeypatch, tmp_path):
    """Weights, and a replay of the journal, have the bits of a run that is given the same losses one by one."""
    model, start = reader(), reader().state_dict()
    opt = optimizer(model, "es")
    path = tmp_path / "run.zkj"
    with journal.write(opt, path):
        for step in range(3):
            opt.step(each(model), [batch(step)], batched=True)
    again = reader()
    again.load_state_dict(start)
    journal.replay(path, again)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert not torch.equal(start["qkv.bias"], model.qkv.bias)


def test_micro_batches_weights_and_names(monkeypatch):
    def closure(model):
        return lambda one: {"a": each(model)(one), "b": model(one["ids"]).float().square().mean(dim=(1, 2))}

    def two(step):
        return [batch(step), batch(step + 10, size=3)]

    for options in ({}, {"reduction": "sum"}, {"batch_weights": [1.0, 3.0]}, {"loss_weights": {"b": 0.25}}):
        alone = run(monkeypatch, "fzoo", 1, batches=two, closure=closure, lr=0.0, **options)
        together = run(monkeypatch, "fzoo", True, batches=two, closure=closure, lr=0.0, **options)
        near(alone, together)
        for name in ("loss/a", "loss/b"):
            assert float(together.opt.metrics[name]) == pytest.approx(float(alone.opt.metrics[name]), rel=1e-6)
    for steps in (1, 2):  # with what the test evaluates, and where a forward takes one probe more than another
        alone, three = (
            run(monkeypatch, "es", most, batches=two, closure=closure, lr=0.0, num_directions=4, steps=steps)
            for most in (1, 3)
        )
        assert float(three.opt.metrics["loss/b"]) == pytest.approx(float(alone.opt.metrics["loss/b"]), rel=1e-6)


def test_a_mean_is_of_the_rows_and_a_sum_is_their_sum(monkeypatch):
    model = reader()
    opt = optimizer(model, "fzoo", lr=0.0)
    values = each(model)(batch()).detach().double()
    rounds = run(monkeypatch, "fzoo", True, lr=0.0, steps=1).losses[0]
    assert rounds[0] == pytest.approx(float(values.mean()), rel=1e-7)
    rounds = run(monkeypatch, "fzoo", True, lr=0.0, steps=1, reduction="sum").losses[0]
    assert rounds[0] == pytest.approx(float(values.sum()), rel=1e-7)
    del opt


def test_positions_are_no_rows_where_they_are_as_many(monkeypatch):
    """6 probes of 2 rows are 12, and so are the positions."""
    made = run(monkeypatch, "fzoo", True, lr=0.0, batches=lambda step: [batch(step, 12)])
    near(run(monkeypatch, "fzoo", 1, lr=0.0, batches=lambda step: [batch(step, 12)]), made)
    assert float(made.opt.metrics["probes_per_forward"]) == 6


def test_lengths_may_differ_from_step_to_step(monkeypatch):
    """No test again; the last has as many positions as rows."""

    def batches(step):
        return [batch(step, (5, 4, 7, 12)[step])]

    made = run(monkeypatch, "fzoo", True, lr=0.0, steps=4, batches=batches)
    near(run(monkeypatch, "fzoo", 1, lr=0.0, steps=4, batches=batches), made)
    assert made.opt.counters["forwards"] == 6 + 2 + 3 + 3


def test_groups_with_an_eps_of_their_own(monkeypatch):
    def rounds(batched):
        model = reader()
        named = list(model.named_parameters())
        groups = [{"params": named[1::2], "eps": 3e-2}, {"params": named[::2]}]
        opt = optimizer(groups, "mezo", lr=0.0, num_samples=2, module=model)
        opt.step(each(model), [batch()], batched=batched)
        opt.step(each(model), [batch()], batched=batched)
        return float(opt.metrics["projected_gradient"]), float(opt.metrics["probes_per_forward"])

    (alone, _), (together, probes) = rounds(1), rounds(True)
    assert probes == 4
    assert together == pytest.approx(alone, rel=1e-4)
    del monkeypatch


def test_autocast(monkeypatch):
    with torch.autocast("cpu", torch.bfloat16):
        alone, together = run(monkeypatch, "fzoo", 1, lr=0.0), run(monkeypatch, "fzoo", True, lr=0.0)
    near(alone, together, 2e-3)
    assert float(together.opt.metrics["probes_per_forward"]) == 6


# ------------------------------------------------------------------------------------------------------------- batches


@dataclass
class Batch:
    ids: Tensor
    mask: Tensor
    texts: list[str]
    scale: float = 1.0


class Wrapped(dict):  # type: ignore[type-arg]
    pass


@pytest.mark.parametrize("made", ["dataclass", "nested", "mapping"])
def test_what_is_in_a_batch(made, monkeypatch):
    mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
    ids, texts = batch()["ids"], ["a", "bb"]
    one: Any = Batch(ids, mask, texts)
    if made == "nested":
        one = [(ids, {"mask": mask, "scale": torch.tensor(1.0), "at": torch.arange(T)}), texts]
    elif made == "mapping":
        one = Wrapped(ids=ids, mask=mask, texts=texts, rows=torch.arange(B).float())
    sizes = set()

    def closure(model):
        def of(given):
            assert type(given) is type(one)
            own, masked, words = (
                (given[0][0], given[0][1]["mask"], given[1]) if made == "nested"
                else (given["ids"], given["mask"], given["texts"]) if made == "mapping"
                else (given.ids, given.mask, given.texts)
            )  # fmt: skip
            sizes.add((len(own), masked.shape[0], tuple(words[:3])))
            losses = model(own, masked[:, 0]).logsumexp(-1).mean(-1)
            return losses * torch.tensor([float(len(word)) for word in words])

        return of

    alone = run(monkeypatch, "fzoo", 1, closure=closure, batches=lambda step: [one], lr=0.0)
    together = run(monkeypatch, "fzoo", True, closure=closure, batches=lambda step: [one], lr=0.0)
    near(alone, together)
    assert (12, 1, ("a", "bb", "a")) in sizes
    assert float(together.opt.metrics["probes_per_forward"]) == 6


# ------------------------------------------------------------------------------------------------ rows that mix, and so on


class Mixing(nn.Module):
    """What else happens to the rows, for the worse."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.inner, self.norm = how, reader(), nn.BatchNorm1d(WORDS, affine=False)

    def forward(self, ids: Tensor) -> Tensor:
        n = len(ids)
        if self.how == "packed":
            return self.inner(ids.reshape(1, -1)).reshape(n, -1, WORDS)
        x = self.inner(ids)
        if self.how == "batch norm":
            x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        if self.how == "sorted":
            x = x[x.sum(dim=(1, 2)).argsort()]
        if self.how == "rolled":
            x = x.roll(B, dims=0)
        if self.how == "mean":
            x = x - x.mean(dim=0)
        if self.how == "turned":
            x = self.inner(ids.flip(0)).flip(0)
        if self.how == "gathered":  # as routed experts do
            keep = torch.arange(n)[1:]
            y = torch.cat([x[:1], self.inner(ids[keep])])
            x = y
        return x


@pytest.mark.parametrize("how", ["packed", "batch norm", "sorted", "rolled", "mean", "turned", "gathered"])
def test_rows_that_mix_are_evaluated_one_after_another(how, monkeypatch):
    def model():
        return Mixing(how).train(how == "batch norm")

    alone = run(monkeypatch, "fzoo", 1, model=model())
    with pytest.warns(ZokernWarning, match="evaluated one after another, because") as told:
        made = run(monkeypatch, "fzoo", True, model=model())
    assert len(told) == 1
    assert made.losses == alone.losses
    assert all(map(torch.equal, made.bits, alone.bits))
    assert float(made.opt.metrics["probes_per_forward"]) == 1


def test_a_block_that_sees_another_direction_is_found(monkeypatch):
    """Blocks 1 and 2 change places in what is returned: all losses are those of some probe."""

    def closure(model):
        def of(one):
            losses = each(model)(one)
            if len(losses) == 6 * B:
                losses = losses.view(6, B)[[0, 2, 1, 3, 4, 5]].flatten()
            return losses

        return of

    with pytest.warns(ZokernWarning, match="changes with the direction|gives"):
        made = run(monkeypatch, "fzoo", True, closure=closure)
    assert made.losses == run(monkeypatch, "fzoo", 1, closure=closure).losses


def test_losses_that_count_the_rows_of_the_batch_are_found(monkeypatch):
    """No row sees another, and yet the losses are other ones."""
    with pytest.warns(ZokernWarning, match="as the loss of probe"):
        run(monkeypatch, "fzoo", True, closure=lambda model: lambda one: each(model)(one) * B / len(one["ids"]))


def test_in_16_bits_too_where_losses_hardly_differ(monkeypatch):
    def closure(model):
        def of(one):
            losses = each(model)(one)
            return losses.view(6, B).roll(1, dims=0).flatten() if len(losses) == 6 * B else losses

        return of

    with pytest.warns(ZokernWarning, match="changes with the direction of others"):
        run(monkeypatch, "fzoo", True, closure=closure, model=reader(torch.bfloat16), steps=1, lr=0.0, eps=1e-3)


def test_rewards_that_do_not_react_are_tested_once_they_do(monkeypatch):
    level = [1e9]

    def closure(model):
        return lambda one: [float(x > level[0]) for x in each(model)(one)]

    model = reader()
    opt = optimizer(model, "es", lr=0.0)
    opt.step(closure(model), [batch(0)], batched=True)
    before = opt.counters["forwards"]
    opt.step(closure(model), [batch(0)], batched=True)
    assert opt.counters["forwards"] == before + 1
    level[0] = float(each(model)(batch(0)).detach()[0])
    opt.step(closure(model), [batch(0)], batched=True)
    assert opt.counters["forwards"] > before + 6
    assert float(opt.metrics["probes_per_forward"]) == 1
    del monkeypatch


def test_a_use_that_was_not_tested_is_tested_first(monkeypatch):
    class Later(Reader):
        late = False

        def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
            x = super().forward(ids, mask)
            return x * self.second.weight.sum() if self.late else x

    model = seeded(Later)
    opt = optimizer(model, "fzoo", lr=0.0)
    for late, forwards in ((False, 6 + 2 + 3), (True, 1 + 6 + 2 + 3), (True, 1)):
        model.late, before = late, opt.counters["forwards"]
        opt.step(each(model), [batch()], batched=True)
        assert opt.counters["forwards"] - before == forwards - (late and forwards > 1)
    del monkeypatch


def forwards(opt: Any, closure: Any, given: Any, **more: Any) -> int:
    before = opt.counters["forwards"]
    opt.step(closure, given, batched=True, **more)
    return opt.counters["forwards"] - before


def test_another_module_mode_closure_or_batch_is_tested_anew():
    model = reader()
    opt, closure, tested = optimizer(model, "fzoo", lr=0.0), each(model), 6 + 2 + 3
    assert [forwards(opt, closure, [batch()]) for _ in range(2)] == [tested, 1]
    model.train()
    assert [forwards(opt, closure, [batch()]) for _ in range(2)] == [tested, 1]
    assert [forwards(opt, lambda one: closure(one), [batch()]) for _ in range(2)] == [tested, 1]
    assert [forwards(opt, closure, [{**batch(), "more": torch.ones(B)}]) for _ in range(2)] == [tested, 1]
    assert [forwards(opt, closure, [batch(size=1)]) for _ in range(2)] == [tested, 1]
    model.first = seeded(lambda: nn.LayerNorm(WIDTH, elementwise_affine=False)).train()
    left = set(map(id, model.parameters()))
    opt.param_groups[0]["params"][:] = [p for p in opt.param_groups[0]["params"] if id(p) in left]
    assert [forwards(opt, closure, [batch()]) for _ in range(2)] == [tested, 1]


def test_the_test_leaves_the_generator_where_one_after_another_does():
    def after(batched):
        model = reader()
        torch.manual_seed(1)
        opt = optimizer(model, "fzoo", lr=0.0, paired_randomness=False)
        opt.step(lambda one: each(model)(one) + 1e-9 * torch.rand(len(one["ids"]) + 1)[1:], [batch()], batched=batched)
        return torch.rand(3)

    assert torch.equal(after(1), after(True))


def test_copies_for_all_blocks_that_are_too_large(monkeypatch):
    monkeypatch.setattr(placement, "ALWAYS", 0)
    with pytest.warns(ZokernWarning, match="need 6 copies, .* MiB, more than the weights"):
        made = run(monkeypatch, "fzoo", True)
    assert made.losses == run(monkeypatch, "fzoo", 1).losses


def test_a_write_to_what_all_blocks_share_is_evaluated_one_after_another(monkeypatch):
    def closure(model):
        def of(one):
            total = torch.zeros(WIDTH)
            total += model.third.weight
            return each(model)(one) + total.sum()

        return of

    with pytest.warns(ZokernWarning, match="add_ writes third.weight to what all blocks share"):
        run(monkeypatch, "fzoo", True, closure=closure)


def test_compiled_code_is_left_out(monkeypatch):
    stances = []

    @contextlib.contextmanager
    def noting(stance):
        stances.append(stance)
        yield

    monkeypatch.setattr(torch.compiler, "set_stance", noting)
    run(monkeypatch, "mezo", True, steps=2)
    assert set(stances) == {"force_eager"}


# --------------------------------------------------------------------------------------------------------- what is refused


def refused(match: str, error: type[Exception], method: str = "fzoo", model: Any = None, **step: Any) -> None:
    model = reader() if model is None else model
    settings = step.pop("options", {})
    opt = optimizer(model, method, **settings)
    before = [p.detach().clone() for p in model.parameters()]
    step = {"closure": each(model), "batches": [batch()], "batched": True, **step}
    with pytest.raises(error, match=match):
        opt.step(step.pop("closure"), step.pop("batches"), **step)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert opt.counters["steps"] == 0


def test_bad_input_is_refused_by_name():
    refused("batches are not given", ValueError, batches=None)
    refused("batched must be True, False or a number, .*; got str", TypeError, batched="all")
    refused("batched is 0", ValueError, batched=0)
    refused("got a tensor of shape \\(\\).*reduction='none'", TypeError, closure=lambda one: torch.tensor(1.0))
    refused("got a tensor of shape \\(3,\\)", TypeError, closure=lambda one: torch.ones(3))
    refused("got float", TypeError, closure=lambda one: 1.0)
    refused("batches\\[0\\] has tensors of several lengths \\(.*ids.*\\[2, 5\\].*\\[3, 1\\]", ValueError,
            batches=[{"ids": batch()["ids"], "b": torch.ones(3, 1)}])  # fmt: skip
    refused("batches\\[1\\] has no tensor with rows", ValueError, batches=[batch(), {"scale": 1.0}])
    refused("only placement='forward'", ValueError, options={"placement": "shadow"})


def test_what_draws_is_refused_by_name():
    model = nn.Sequential(nn.Embedding(WORDS, WIDTH), nn.Dropout(0.1), nn.Linear(WIDTH, WORDS)).train()
    refused(
        "dropout.*model.eval\\(\\)", ValueError, model=model, closure=lambda one: model(one["ids"]).mean(dim=(1, 2))
    )
    refused("paired_randomness=True", ValueError, options={"paired_randomness": True})


def test_an_exception_in_the_closure_leaves_all_clean(monkeypatch):
    model = reader()
    opt = optimizer(model, "fzoo")
    opt.step(each(model), [batch()], batched=True)
    before = [p.detach().clone() for p in model.parameters()]

    def closure(one):
        each(model)(one)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opt.step(closure, [batch()], batched=True)
    assert all(torch.equal(a, b) and type(b) is nn.Parameter for a, b in zip(before, model.parameters(), strict=True))
    assert not model._state_dict_hooks
    del monkeypatch
