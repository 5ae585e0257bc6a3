"""What goes wrong on one rank is known on all: none hangs, weights are clean, messages name the rank and the reason."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Client, Listener, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import zokern
from tests.distributed.ranks import Outcome, outcomes, run
from tests.methods import METHODS, build, equal, weights
from tests.models import small, tokens

HELD: list[Listener] = []  # by a rank, while it lives
SHORT = 1.0  # seconds of exchange_timeout, where a rank is to be missed


def told(found: list[Outcome], *said: str, but: int) -> None:
    """Every rank but one raised a RankError that says this."""
    for rank, outcome in enumerate(found):
        if rank != but:
            assert outcome.error.startswith("RankError: "), (rank, outcome.error)
            for one in said:
                assert one in outcome.error, outcome.error


class Raising:
    """Raises in the closure of one rank, at its call number `at`."""

    def __init__(self, model: nn.Module, rank: int, at: int, error: type[BaseException]) -> None:
        self.model, self.at, self.error, self.calls = model, at if dist.get_rank() == rank else -1, error, 0

    def __call__(self) -> Tensor:
        self.calls += 1
        if self.calls - 1 == self.at:
            raise self.error("bad sample 17")
        return self.model(tokens(self.calls))


def raises_once(
    name: str, options: dict[str, Any], at: int, error: type[BaseException]
) -> tuple[str, bool, list[Tensor]]:
    """The error of a step in which rank 1 raises; whether weights are those of before it; those after three more steps."""
    model = small()
    opt = build(METHODS[name], model, parallel="data", **options)
    closure = Raising(model, 1, at, error)
    opt.step(lambda: model(tokens(dist.get_rank())))
    before, caught = weights(model), ""
    try:
        opt.step(closure)
    except (zokern.RankError, ValueError, KeyboardInterrupt) as error:
        caught = f"{type(error).__name__}: {error}"
    now = weights(model)
    clean = all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(before, now, strict=True))
    if options["placement"] == "shadow":
        clean = clean and equal(before, now)
    for t in range(3):
        opt.step(lambda t=t: model(tokens(10 * t + dist.get_rank())))
    assert opt.counters["steps"] == 4
    return caught, clean, weights(model)


@pytest.mark.parametrize("placement", ["inplace", "shadow"])
@pytest.mark.parametrize(("name", "at"), [("mezo", 0), ("mezo", 3), ("gv", 5), ("gv", 2)])
def test_a_rank_that_raises_is_named_on_all_and_they_can_go_on(name: str, at: int, placement: str) -> None:
    found = run(3, raises_once, name, {"placement": placement}, at, ValueError)
    for rank, (caught, clean, end) in enumerate(found):
        assert clean
        assert equal(end, found[0][2])
        if rank == 1:
            assert caught == "ValueError: bad sample 17"
        else:
            assert "rank 1 raised ValueError: bad sample 17 in step 1: all ranks have left the step" in caught


def test_an_interrupt_is_told_too() -> None:
    found = run(2, raises_once, "mezo", {"placement": "shadow"}, 1, KeyboardInterrupt)
    assert found[1][0] == "KeyboardInterrupt: bad sample 17"
    assert "rank 1 raised KeyboardInterrupt" in found[0][0]


def called_wrongly(first: bool) -> None:
    model = small()
    opt = zokern.MeZO(model, 1e-2, parallel="data")
    for t in range(1 if first else 3):
        wrong = dist.get_rank() == 0 and t == (0 if first else 2)
        opt.step(None if wrong else lambda: model(tokens(0)))


@pytest.mark.parametrize("first", [True, False])
def test_an_argument_that_is_refused_is_told_too(first: bool) -> None:
    found = outcomes(2, called_wrongly, first)
    assert found[0].error.startswith("TypeError: step needs a closure")
    told(found, "rank 0 raised TypeError: step needs a closure", but=0)
    assert max(outcome.seconds for outcome in found) < 20


def refused_outside_a_forward(what: str) -> list[Tensor]:
    """Rank 1 raises before its first forward of a step, once; in place, where the others have been perturbed by then."""
    model = small()
    opt = zokern.MeZO(model, 1e-2, parallel="data", placement="inplace", num_samples=2)
    for t in range(4):
        wrong = dist.get_rank() == 1 and t == 1
        batches: Any = [tokens(t)]
        if what == "batches" and wrong:
            batches = (1 / 0 for _ in range(1))
        closure: Any = None if what == "closure" and wrong else model
        try:
            opt.step(closure, batches)
        except (TypeError, ZeroDivisionError, zokern.RankError):
            assert t == 1
    assert opt.counters["steps"] == 3
    return weights(model)


@pytest.mark.parametrize("what", ["batches", "closure"])
def test_in_place_all_ranks_go_the_same_way_where_one_raises_before_it(what: str) -> None:
    a, b, c = run(3, refused_outside_a_forward, what)
    assert equal(a, b)
    assert equal(a, c)


# --------------------------------------------------------------------------------------------- of these tests themselves


def leaves(error: str) -> None:
    if dist.get_rank() == 1:
        if not error:
            os._exit(3)
        raise ValueError(error)
    dist.barrier()


@pytest.mark.parametrize("late", [0.0, 0.5])
@pytest.mark.parametrize(("error", "said"), [("the cause", "ValueError: the cause"), ("", "the process ended")])
def test_a_test_of_ranks_that_fails_begins_with_the_rank_that_failed_first(
    error: str, said: str, late: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """late: whoever watches them comes when both have failed already."""
    watched = "tests.distributed.ranks.wait"
    monkeypatch.setattr(watched, lambda *args, **options: time.sleep(late) or wait(*args, **options))
    first = rf"^rank 1 of 2: {said}, .*, exit code {0 if error else 3}\n"
    with pytest.raises(pytest.fail.Exception, match=first) as told:
        run(2, leaves, error)
    assert "\nrank 0 of 2: RuntimeError: " in str(told.value)


# ------------------------------------------------------------------------------------------- killed, hanging, missing ones


def killed(at: int, placement: str) -> tuple[str, bool, float]:
    model = small()
    opt = zokern.MeZO(model, 1e-4, parallel="data", placement=placement, num_samples=2)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if dist.get_rank() == 1 and calls > at:
            os.kill(os.getpid(), signal.SIGKILL)
        return model(tokens(calls))

    before = weights(model)
    while True:
        try:
            opt.step(closure)
        except zokern.RankError as error:
            began = time.monotonic()
            clean = opt.counters["steps"] == at // 4
            same = all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(before, weights(model), strict=True))
            now, forwards = weights(model), calls
            with pytest.raises(zokern.RankError, match=r"have not exchanged a number since: start them again"):
                opt.step(closure)
            assert equal(now, weights(model))
            assert calls == forwards
            return str(error), clean and same, time.monotonic() - began
        before = weights(model)


@pytest.mark.parametrize("seed", range(20))
def test_a_rank_that_is_killed_leaves_the_others_with_clean_weights(seed: int) -> None:
    rng = random.Random(seed)
    world, at = rng.choice([2, 3]), rng.randrange(14)
    found = outcomes(world, killed, at, rng.choice(["inplace", "shadow"]))
    assert found[1].code == -signal.SIGKILL
    for rank, outcome in enumerate(found):
        if rank != 1:
            said, clean, seconds = outcome.value
            assert clean
            assert "the connection to a rank was lost" in said
            assert "start all of them again from the base weights and the journal" in said
            assert seconds < 5


def gone(rank: int) -> str:
    return f"rank {rank} has gone"


def until_gone(ranks: tuple[int, ...], seconds: float) -> None:
    """Does something else until these ranks have given up, or for some seconds."""
    store, end = dist.distributed_c10d._get_default_store(), time.monotonic() + seconds
    while not store.check([gone(rank) for rank in ranks]) and time.monotonic() < end:
        time.sleep(0.02)


@contextlib.contextmanager
def giving_up() -> Iterator[None]:
    """Notes for until_gone() that this rank has left its steps by an error."""
    try:
        yield
    except BaseException:
        dist.distributed_c10d._get_default_store().set(gone(dist.get_rank()), "")
        raise


def hangs() -> None:
    model = small()
    opt = zokern.MeZO(model, 1e-2, parallel="data", exchange_timeout=SHORT)

    def closure(late: bool) -> Tensor:
        if late:
            until_gone((0, 2), 4 * SHORT)
        return model(tokens(0))

    with giving_up():
        for t in range(4):
            calls = iter(range(2))
            opt.step(lambda t=t, calls=calls: closure(dist.get_rank() == 1 and t == 2 and next(calls) == 0))


def test_a_rank_that_hangs_is_missed_in_time() -> None:
    found = outcomes(3, hangs)
    told(found, f"a rank has not come within {SHORT:g} s to the losses of step 2", "exchange_timeout", but=1)
    assert found[1].error.startswith("RankError: ")  # once it comes: the others have gone
    assert max(found[rank].seconds for rank in (0, 2)) < 3 * SHORT + 10


def slow_everywhere() -> int:
    """Forwards longer than exchange_timeout, on one rank a little longer than on the other."""
    model = small()
    opt = zokern.MeZO(model, 1e-2, parallel="data", exchange_timeout=0.1)

    def closure() -> Tensor:
        time.sleep(0.1 + 0.15 * dist.get_rank())
        return model(tokens(0))

    opt.step(closure)
    return opt.counters["steps"]


def test_ranks_wait_longer_where_their_own_forwards_take_long() -> None:
    assert run(2, slow_everywhere) == [1, 1]


def alone(what: str) -> None:
    model = small()
    opt = zokern.MeZO(model, 1e-2, parallel="data", exchange_timeout=SHORT)
    steps = 3 if what != "unequal counts" or dist.get_rank() else 2
    with giving_up():
        for t in range(steps):
            if t == 1 and what == "rank 0 evaluates" and dist.get_rank() == 0:
                until_gone((1, 2), 3 * SHORT)
            if t == 1 and what == "rank 0 evaluates and the others wait":
                if dist.get_rank() == 0:
                    time.sleep(1.3 * SHORT)
                opt.wait_for_ranks()
            if t == 1 and what == "rank 0 steps once more" and dist.get_rank() == 0:
                opt.step(lambda: model(tokens(0)))
            opt.step(lambda: model(tokens(0)))
    if what == "unequal counts" and not dist.get_rank():
        until_gone((1, 2), 3 * SHORT)  # does something else, and is still there


@pytest.mark.parametrize(
    ("what", "missed_by"),
    [("unequal counts", (1, 2)), ("rank 0 evaluates", (1, 2)), ("rank 0 steps once more", (0,))],
)
def test_a_rank_alone_is_an_error_in_time(what: str, missed_by: tuple[int, ...]) -> None:
    found = outcomes(3, alone, what)
    for rank in missed_by:
        assert found[rank].error.startswith("RankError: "), found[rank]
        assert "has not come within" in found[rank].error or "connection to a rank was lost" in found[rank].error
        assert found[rank].seconds < 5 * SHORT + 10


def test_others_can_wait_for_what_one_does_alone() -> None:
    assert [outcome.error for outcome in outcomes(2, alone, "rank 0 evaluates and the others wait")] == ["", ""]


def waits_in_a_step(first: bool) -> None:
    model = small()
    opt = zokern.MeZO(model, 1e-2, parallel="data")
    for t in range(3):
        if t == (0 if first else 2) and dist.get_rank() == 1:
            opt.wait_for_ranks()
        opt.step(lambda: model(tokens(0)))


@pytest.mark.parametrize("first", [True, False])
def test_a_rank_that_waits_where_the_others_step_is_told(first: bool) -> None:
    found = outcomes(3, waits_in_a_step, first)
    where = "comparing weights" if first else "a step"
    told(found, f"the place is '{where}' on rank 0 and 'opt.wait_for_ranks()' on rank 1", but=-1)


def other_batches(what: str) -> tuple[str, list[Tensor]]:
    model = small()
    opt = zokern.MeZO(model, 1e-2, parallel="directions", placement="shadow")
    before, rank = weights(model), dist.get_rank()
    batches = [tokens(0)] * (2 if what == "count" and rank == 1 else 1)
    named = {"batch_weights": [1.0 + rank]} if what == "weight" else {}
    with pytest.raises(zokern.RankError) as error:
        opt.step(model, batches, **named)
    assert equal(before, weights(model))
    return str(error.value), []


@pytest.mark.parametrize(("what", "said"), [("count", "they weigh 1 and 2"), ("weight", "they weigh 1 and 2")])
def test_ranks_that_share_directions_have_the_same_batches(what: str, said: str) -> None:
    for text, _ in run(2, other_batches, what):
        assert f"batches are not the same on rank 0 and rank 1, which share out the directions: {said}" in text


# ------------------------------------------------------------------------------------------------------ unequal beginnings


def made(what: str) -> Any:
    """An optimizer, on rank 1 another one."""
    other = dist.get_rank() == 1
    model = small(seed=1 if other and what == "weights" else 0)
    if other and what == "tensors":
        model.layers[0].gain.requires_grad_(False)
    if other and what == "a weight":
        with torch.no_grad():
            model.norm.bias[3] += 1e-6
    method = zokern.HiZOO if other and what == "method" else zokern.MeZO
    options = {
        "seed": {"seed": 1},
        "lr": {"lr": 2e-2},
        "placement": {"placement": "shadow"},
        "setting": {"rule_": None},
        "parallel": {"parallel": "directions"},
        "samples": {"num_samples": 2},
    }.get(what, {}) if other else {}  # fmt: skip
    options.pop("rule_", None)
    return model, method(model, **{"lr": 1e-2, "parallel": "data", **options})


def unequal(what: str) -> tuple[str, bool]:
    model, opt = made(what)
    before = weights(model)
    try:
        opt.step(lambda: model(tokens(0)))
    except zokern.RankError as error:
        return str(error), equal(before, weights(model))
    return "", False


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("weights", "'embedding.weight' of rank 1 is not that of rank 0 (13 of 13 tensors differ): load the same"),
        ("a weight", "'norm.bias' of rank 1 is not that of rank 0 (1 of 13 tensors differ)"),
        (
            "tensors",
            "tensors is '13 trained of 13' on rank 0 and '12 trained of 13, others at layers.0.gain' on rank 1",
        ),
        ("method", "method is 'MeZO' on rank 0 and 'HiZOO' on rank 1"),
        ("seed", "seed is 0 on rank 0 and 1 on rank 1"),
        ("lr", "lr of group 0 is 0.01 on rank 0 and 0.02 on rank 1"),
        ("placement", "placement is 'inplace' on rank 0 and 'shadow' on rank 1"),
        ("parallel", "each rank's part of the batch is [0, 1, 2] on rank 0 and [0, 0, 0] on rank 1"),
        ("samples", "setting num_samples is 1 on rank 0 and 2 on rank 1"),
    ],
)
def test_ranks_that_begin_otherwise_are_told_what_differs(what: str, said: str) -> None:
    for text, unchanged in run(3, unequal, what):
        assert said in text
        assert unchanged


def parts_later(what: str) -> tuple[str, list[Tensor]]:
    """Rank 2 differs from step 1 on."""
    model = small()
    opt = zokern.MeZO(model, 1e-2, parallel="data", compare_every=2 if what == "a weight" else 0, placement="shadow")
    other = dist.get_rank() == 2

    def closure(batch: Tensor | None = None) -> Any:
        loss = model(tokens(0) if batch is None else batch)
        return {"a": loss} if what == "names" and other else loss

    text = ""
    for t in range(4):
        more: dict[str, Any] = {}
        if other and t == 1:
            if what == "lr":
                opt.param_groups[0]["lr"] = 0.5
            elif what == "lr, a tensor":
                opt.param_groups[0]["lr"] = torch.tensor(0.5)
            elif what == "a weight":
                with torch.no_grad():
                    model.norm.bias[3] += 1e-6
            elif what == "frozen":
                model.layers[0].gain.requires_grad_(False)
            elif what == "loaded":
                opt.load_state_dict(opt.state_dict())
            elif what == "rounding":
                opt.rounding = "nearest"
            elif what == "more probes":
                opt.num_samples = 3
            elif what == "seed":
                opt.seed = 5
        if what == "reduction" and t == 1:
            more = {"batches": [tokens(0)], "reduction": "sum" if other else "mean"}
        try:
            opt.step(closure, **more)
        except zokern.RankError as error:
            text = f"{t}: {error}"
            break
        except (TypeError, ValueError) as error:
            text = f"{t}: own {error}"
            break
    return text, weights(model)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("lr", "1: the ranks do not do the same in step 1: lr of group 0 is 0.01 on rank 0 and 0.5 on rank 2"),
        (
            "lr, a tensor",
            "1: the ranks do not do the same in step 1: lr of group 0 is 0.01 on rank 0 and 0.5 on rank 2",
        ),
        ("reduction", "1: the ranks do not do the same in step 1: reduction is 'mean' on rank 0 and 'sum' on rank 2"),
        ("a weight", "2: weights are not the same on all ranks: 'norm.bias' of rank 2"),
        (
            "frozen",
            "1: the ranks do not do the same in step 1: the number of trained tensors is 13 on rank 0 and 12 on",
        ),
        (
            "loaded",
            "1: the ranks do not do the same in step 1: the place is 'a step' on rank 0 and 'comparing weights' on",
        ),
        (
            "more probes",
            "1: the ranks do not do the same in step 1: the place is 'a step' on rank 0 and 'comparing weights",
        ),
        ("rounding", "1: the ranks do not do the same in step 1: rounding is 'auto' on rank 0 and 'nearest' on rank 2"),
        ("seed", "1: the ranks do not do the same in step 1: the seeds of the directions is "),
    ],
)
def test_ranks_that_part_later_are_told(what: str, said: str) -> None:
    found = run(3, parts_later, what)
    for text, _ in found:
        assert text.startswith(said), text
    assert equal(found[0][1], found[1][1])


def together() -> list[Tensor]:
    """What all ranks change alike, they go on with."""
    model = small()
    opt = zokern.MeZO(model, 1e-2, parallel="data", placement="shadow")
    for t in range(6):
        if t == 1:
            opt.num_samples = 5
        if t == 2:
            opt.load_state_dict(opt.state_dict())
        if t == 3:
            model.norm.bias.requires_grad_(False)
        if t == 4:
            opt.num_samples = 1
        opt.step(lambda: model(tokens(dist.get_rank())))
    with pytest.raises(ValueError, match="cannot change after the first step"):
        opt.parallel = "directions"
    return weights(model)


def test_what_all_ranks_change_alike_is_no_fault() -> None:
    a, b = run(2, together)
    assert equal(a, b)


def inside_a_step(what: str) -> tuple[str, int]:
    model = small()
    opt = zokern.MeZO(model, 1e-2, parallel="data")
    opt.step(lambda: model(tokens(0)))

    def closure() -> Tensor:
        if dist.get_rank() == 1 and what == "step":
            opt.step(lambda: model(tokens(0)))
        elif dist.get_rank() == 1:
            opt.wait_for_ranks()
        return model(tokens(0))

    with pytest.raises(RuntimeError) as error:
        opt.step(closure)
    opt.step(lambda: model(tokens(0)))
    return str(error.value), opt.counters["steps"]


@pytest.mark.parametrize("what", ["step", "wait_for_ranks"])
def test_nothing_is_exchanged_inside_a_step(what: str) -> None:
    (first, steps), (second, others) = run(2, inside_a_step, what)
    assert f"rank 1 raised RuntimeError: {what} was called inside a step of the same optimizer" in first
    assert second.startswith(f"{what} was called inside a step of the same optimizer")
    assert steps == others == 2


def other_generators() -> str:
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5)).train()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    opt = zokern.MeZO(model, 1e-2, parallel="directions")
    with pytest.raises(zokern.RankError) as error:
        opt.step(lambda: model(torch.ones(4)).sum())
    return str(error.value)


def test_ranks_that_share_directions_draw_the_same() -> None:
    assert all("the state of torch's generator (torch.manual_seed) is " in text for text in run(2, other_generators))


def other_lengths() -> tuple[str, int]:
    model = nn.Linear(3, 1)
    with torch.no_grad():
        model.weight.fill_(0.5)
        model.bias.fill_(0.5)
    opt = zokern.HELENE(model, 1e-3, hessian_interval=1, parallel="data")
    calls = iter(range(9))

    def closure() -> Tensor:
        rows = 3 if dist.get_rank() == 1 and next(calls) == 1 else 2
        return model(torch.ones(rows, 3)).squeeze(1)

    with pytest.raises((TypeError, zokern.RankError)) as error:
        opt.step(closure)
    opt.step(lambda: model(torch.ones(2, 3)).squeeze(1))
    return str(error.value), opt.counters["steps"]


def test_losses_of_each_example_of_other_lengths_are_told() -> None:
    (first, steps), (second, others) = run(2, other_lengths)
    assert "rank 1 raised TypeError: closure returned losses of 2 examples for one probe" in first
    assert second.startswith("closure returned losses of 2 examples for one probe")
    assert steps == others == 1


def no_data() -> str:
    model = small()
    opt = zokern.MeZO(model, 1e-2, parallel="data")
    with pytest.raises(zokern.RankError) as error:
        opt.step(model, [])
    opt.step(model, [tokens(0)])
    return str(error.value)


def test_no_rank_has_data() -> None:
    assert all("no rank has a loss in step 0: batches is empty on all of them" in text for text in run(2, no_data))


# -------------------------------------------------------------------------------------------------- what is refused at once


def refused(what: str) -> str:
    model = small()
    mesh = torch.distributed.device_mesh.init_device_mesh
    makers: dict[str, Callable[[], Any]] = {
        "nothing said": lambda: zokern.MeZO(model, 1e-2),
        "None and parallel": lambda: zokern.MeZO(model, 1e-2, process_group=None, parallel="data"),
        "a tuple without a mesh": lambda: zokern.MeZO(model, 1e-2, parallel=("data", "directions")),
        "a mesh of two": lambda: zokern.MeZO(model, 1e-2, process_group=mesh("cpu", (2, 1)), parallel=("data",)),
        "buffers": lambda: zokern.MeZO(
            nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))), 1e-2,
            parallel="directions",
        ),
    }  # fmt: skip
    with pytest.raises((RuntimeError, ValueError)) as error:
        makers[what]()
    return str(error.value)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("nothing said", "of 2, and nothing says whether the ranks train one model: give parallel='data'"),
        ("None and parallel", "process_group is None"),
        ("a tuple without a mesh", "process_group is no DeviceMesh"),
        ("a mesh of two", "parallel has 1 entries, and the mesh given as process_group 2 dimensions"),
        ("buffers", "make it with broadcast_buffers=False"),
    ],
)
def test_settings_that_do_not_go_together(what: str, said: str) -> None:
    assert all(said in text for text in run(2, refused, what))


def own_reduce(group: Any) -> tuple[str, list[Tensor]]:
    model = small()
    opt = zokern.MeZO(model, 1e-2, process_group=group)

    def reduce(losses: list[Tensor]) -> list[Tensor]:
        every = torch.stack(losses)
        dist.all_reduce(every)
        return list(every.unbind())

    opt.reduce = reduce
    opt.step(lambda: model(tokens(dist.get_rank())))
    return "", weights(model)


def test_the_users_own_reduction_goes_on_without_a_group() -> None:
    (_, a), (_, b) = run(2, own_reduce, None)
    assert equal(a, b)


def both_reduce() -> str:
    model = small()
    opt = zokern.MeZO(model, 1e-2, parallel="data")
    opt.reduce = lambda losses: losses
    with pytest.raises(ValueError, match="reduce is set") as error:
        opt.step(lambda: model(tokens(0)))
    return str(error.value)


def test_a_reduction_beside_a_group_is_refused() -> None:
    assert all("process_group=None" in text for text in run(2, both_reduce))


def outside(kind: str) -> str:
    model = small()
    if kind == "group":
        group = dist.new_group([0, 1])
        if dist.get_rank() != 2:
            return ""
    else:
        group = torch.distributed.device_mesh.DeviceMesh("cpu", [0, 1])
        if dist.get_rank() != 2:
            return ""
    with pytest.raises((TypeError, ValueError)) as error:
        zokern.MeZO(model, 1e-2, process_group=group)
    return str(error.value)


@pytest.mark.parametrize("kind", ["group", "mesh"])
def test_a_rank_outside_is_told(kind: str) -> None:
    assert "this is rank 2" in run(3, outside, kind)[2]


def test_a_launcher_without_a_group_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RuntimeError, match=r"torch\.distributed\.init_process_group\(\) before the optimizer is made"):
        zokern.MeZO(small(), 1e-2)
    zokern.MeZO(small(), 1e-2, process_group=None).step(lambda: torch.tensor(1.0))


def answers_at_once(path: str) -> None:
    if dist.get_rank() == 0:
        HELD.append(Listener(path, "AF_UNIX"))  # which takes calls for as long as the process lives
        return
    while not os.path.exists(path):
        time.sleep(0.01)
    time.sleep(0.3)  # in which one that does not wait has long ended
    Client(path, "AF_UNIX").close()


def test_a_rank_that_is_done_stays_until_all_are(tmp_path: Path) -> None:
    """Else its connections would close while others still connect, in a group that it has made and does nothing with."""
    assert run(2, answers_at_once, str(tmp_path / "s")) == [None, None]
