"""load_state_dict is all or nothing: what it refuses leaves every bit of the optimizer as it was."""

from __future__ import annotations

import copy
import io
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import zokern
from tests.methods import METHODS, build, equal, play, saved, weights
from tests.methods import given as losses_of
from tests.models import small
from tests.optim.whole import Stop, World, _same
from zokern import journal

ADAM, ADAMEZO, HIZOO, PLAIN = METHODS["mezo-adam"], METHODS["mezo-adamezo"], METHODS["hizoo"], METHODS["mezo"]
NAN, INF, HUGE = float("nan"), float("inf"), 1 << 70


def own(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda d: d["zokern"].__setitem__(name, value)


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda d: d["zokern"].pop(name)


def group(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda d: d["param_groups"][0].__setitem__(name, value)


def state(value: Any, name: str = "m", number: int = 2) -> Callable[[dict[str, Any]], None]:
    def change(d: dict[str, Any]) -> None:
        old = d["state"][number][name]
        d["state"][number][name] = value(old) if callable(value) else value

    return change


def filled(x: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: torch.full_like(t, x)


def counter(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda d: d["zokern"]["counters"].__setitem__(name, value)


ENTRIES = (
    "format", "contract", "method", "seed", "tensor_ids", "module", "names", "counters", "skipped", "options", "history",
)  # fmt: skip
HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    **{f"without {name}": (without(name), name) for name in ENTRIES},
    "no zokern": (lambda d: (d.pop("zokern"), d["param_groups"][0].pop("zokern")), "zokern"),
    "no state": (lambda d: d.pop("state"), "'state'"),
    "no param_groups": (lambda d: d.pop("param_groups"), "param_groups"),
    "zokern is a list": (lambda d: d.__setitem__("zokern", [1]), "zokern"),
    **{f"seed {value!r}": (own("seed", value), "seed") for value in ("x", -5, HUGE, None, True, 1.0)},
    **{f"skipped {value!r}": (own("skipped", value), "skipped") for value in ("a", -5, HUGE, None, True, 0.5)},
    **{f"counters {value!r}": (own("counters", value), "counters") for value in (None, [1], {}, {"steps": 1}, {"x": 1})},
    **{f"steps {value!r}": (counter("steps", value), "steps")
       for value in ("a", -1, HUGE, None, True, 1.5, torch.tensor(3))},
    "another counter": (counter("leaps", 3), "leaps"),
    **{f"history {value!r}": (own("history", value), "history")
       for value in ([1], None, "a", [[0]], [["x", torch.tensor(1.0)]], [[0, torch.tensor(1.0, dtype=torch.float64)]],
                     [[-1, 3]], [[-1, torch.tensor(NAN, dtype=torch.float64)]],
                     [[-1, torch.tensor(-1.0, dtype=torch.float64)]], [[-1, torch.ones(2, dtype=torch.float64)]])},
    "ids all 0": (lambda d: own("tensor_ids", [[0] * len(d["zokern"]["tensor_ids"][0])])(d), "same noise"),
    **{f"ids {value!r}": (own("tensor_ids", value), "tensor_ids|groups") for value in (None, [], [[0]], 5)},
    **{f"an id {value!r}": (lambda d, v=value: d["zokern"]["tensor_ids"][0].__setitem__(1, v), r"tensor_ids\[0\]\[1\]")
       for value in (-1, 1 << 32, "x", True, 1.5)},
    **{f"names {value!r}": (own("names", value), "names") for value in (None, [], [["a"]])},
    "another name": (lambda d: d["zokern"]["names"][0].__setitem__(3, "other"), "'other' where this module has"),
    **{f"module {value!r}": (own("module", value), "module") for value in (None, "yes")},
    **{f"options {value!r}": (own("options", value), "options|distribution") for value in (None, [], {"distribution": 3})},
    "an option is a tensor": (lambda d: d["zokern"]["options"].__setitem__("rounding", torch.ones(3)), "rounding"),
    **{f"lr {value!r}": (group("lr", value), "lr") for value in (NAN, INF, -1.0, "x", None, 1e39, torch.tensor(NAN))},
    **{f"eps {value!r}": (group("eps", value), "eps") for value in (NAN, 0.0, -1.0, "x", None, 1e308, 1e-60)},
    **{f"weight_decay {value!r}": (group("weight_decay", value), "weight_decay") for value in (NAN, -1.0, None)},
    "a group without lr": (lambda d: d["param_groups"][0].pop("lr"), "'lr'"),
    "a group without params": (lambda d: d["param_groups"][0].pop("params"), "'params'"),
    "a group is a list": (lambda d: d["param_groups"].__setitem__(0, [1]), "param_groups"),
    "groups are None": (lambda d: d.__setitem__("param_groups", None), "param_groups"),
    "another group": (lambda d: d["param_groups"].append(d["param_groups"][0]), "2 groups"),
    "fewer params": (lambda d: d["param_groups"][0]["params"].pop(), "parameters"),
    "params alike": (lambda d: d["param_groups"][0]["params"].__setitem__(1, 0), "alike"),
    "params by name": (lambda d: d["param_groups"][0]["params"].__setitem__(1, "w"), "param_groups does not have"),
    "state of nobody": (lambda d: d["state"].__setitem__(99, d["state"].pop(2)), "99"),
    "state is None": (lambda d: d.__setitem__("state", None), "state"),
    "state of one is None": (lambda d: d["state"].__setitem__(2, None), "state"),
    "no state of one": (lambda d: d["state"].pop(2), "missing"),
    "no states at all": (lambda d: d.__setitem__("state", {}), "missing"),
    "no v of one": (lambda d: d["state"][2].pop("v"), "v of .* is missing"),
    "v of one without its flag": (lambda d: (without("states")(d), d["state"][2].pop("v")), "v of .* is missing"),
    "states says less": (own("states", [[True]]), "states"),
    **{f"m {x}": (state(filled(x)), "not finite") for x in (NAN, INF)},
    "v negative": (state(filled(-1.0), "v"), "below 0"),
    "m double": (state(lambda t: t.double()), "float64"),
    "m of another shape": (state(lambda t: t[..., :1]), "m of"),
    "m a number": (state(3.0), "m of"),
    "m on meta": (state(lambda t: t.to("meta")), "meta"),
    "m sparse": (state(lambda t: t.to_sparse()), "dense"),
}  # fmt: skip


def everything(opt: Any, model: nn.Module) -> list[Any]:
    own = [{n: t.clone() for n, t in opt.state[p].items()} for p in model.parameters()]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]
    held = [[id(p) for p in g["params"]] for g in opt.param_groups]
    return [
        weights(model), own, groups, held, opt.counters, opt.skipped_steps, opt.history(), opt.seed,
        opt.state_dict()["zokern"]["tensor_ids"],
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Any, dict[str, Any], list[Any], nn.Module]:
    """An optimizer after two steps, a state of another run with other numbers, and where the third step leads."""
    model, twin, theirs = small(), small(), small()
    opt, other = (build(ADAM, m) for m in (model, twin))
    run = build(ADAM, theirs, seed=5, weight_decay=0.3)
    for one, steps in ((opt, 2), (other, 3), (run, 4)):
        play(ADAM, one, range(steps))
    return model, opt, run.state_dict(), everything(opt, model), twin


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_refused_changes_nothing(name: str, trained: Any) -> None:
    model, opt, good, before, _ = trained
    change, word = HOSTILE[name]
    bad = copy.deepcopy(good)
    change(bad)
    with pytest.raises((TypeError, ValueError), match=word):
        opt.load_state_dict(bad)
    assert _same(everything(opt, model), before)


def test_after_all_that_the_run_goes_on(trained: Any) -> None:
    model, opt, good, before, twin = trained
    assert len(HOSTILE) > 58
    assert _same(everything(opt, model), before)
    play(ADAM, opt, [2])
    assert equal(weights(model), weights(twin))
    opt.load_state_dict(good)
    assert (opt.seed, opt.counters["steps"]) == (5, 4)


@pytest.mark.parametrize("value", [None, [], "x", 3])
def test_no_dict(value: Any) -> None:
    with pytest.raises(TypeError, match="state_dict must be a dict"):
        build(PLAIN, small()).load_state_dict(value)


@pytest.mark.parametrize(
    "history",
    [
        [[1, [], torch.tensor([1.0])]],
        [[-1, [], torch.tensor([1.0], dtype=torch.float64)]],
        [[1, [0], torch.tensor([1.0], dtype=torch.float64)]],
        [[1, 0, torch.tensor([1.0], dtype=torch.float64)]],
        [[1, [], torch.tensor([NAN], dtype=torch.float64)]],
        [[1, [], torch.tensor([1.0, 2.0], dtype=torch.float64)]],
        [[k, [], torch.tensor([1.0], dtype=torch.float64)] for k in range(4)],
    ],
    ids=["float32", "seed", "block", "no list", "nan", "groups", "too long"],
)
def test_histories_of_adamezo(history: list[Any]) -> None:
    model = small()
    opt = build(ADAMEZO, model)
    play(ADAMEZO, opt, range(2))
    before = everything(opt, model)
    bad = opt.state_dict()
    bad["zokern"]["history"] = history
    with pytest.raises((TypeError, ValueError), match="history"):
        opt.load_state_dict(bad)
    assert _same(everything(opt, model), before)


def test_a_history_for_a_method_that_has_none() -> None:
    opt = build(PLAIN, small())
    bad = opt.state_dict()
    bad["zokern"]["history"] = [[0, torch.ones((), dtype=torch.float64)]]
    with pytest.raises(ValueError, match="history has 1 entries, and MeZO remembers nothing"):
        opt.load_state_dict(bad)


def test_a_curvature_below_0_is_refused() -> None:
    opt = build(HIZOO, small())
    play(HIZOO, opt, [0])
    bad = copy.deepcopy(opt.state_dict())
    bad["state"][0]["h"].neg_()
    with pytest.raises(ValueError, match=r"h of embedding\.weight has values below 0"):
        opt.load_state_dict(bad)


def test_eps_is_looked_at_for_the_weights_that_it_is_for() -> None:
    """What a run in float32 may have is too much for float16."""
    state = zokern.MeZO(nn.Linear(3, 3), 1e-3, eps=1e5).state_dict()
    opt = zokern.MeZO(nn.Linear(3, 3).half(), 1e-3, placement="shadow")
    with pytest.raises(ValueError, match="state_dict: eps is 100000; for float16"):
        opt.load_state_dict(state)
    zokern.MeZO(nn.Linear(3, 3), 1e-3).load_state_dict(state)


def test_a_pipelined_run_takes_no_tensor_for_eps() -> None:
    state = zokern.MeZO(nn.Linear(3, 3), 1e-3, eps=torch.tensor(1e-3), placement="shadow").state_dict()
    opt = zokern.MeZO(nn.Linear(3, 3), 1e-3, placement="shadow", pipelined=True)
    state["zokern"]["options"] = opt.state_dict()["zokern"]["options"]
    with pytest.raises(TypeError, match="pipelined"):
        opt.load_state_dict(state)


odd = st.sampled_from([torch.ones(2), torch.tensor(NAN)])
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | odd
keys = st.text(max_size=4) | st.integers()
values = st.recursive(leaves, lambda x: st.lists(x, max_size=3) | st.dictionaries(keys, x, max_size=3))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_anywhere_is_taken_or_refused_whole(data: Any, trained: Any) -> None:
    """An entry, at any depth, is replaced by something else: what is refused changes nothing, and nothing crashes."""
    _, _, good, _, _ = trained
    model = small()
    opt = build(ADAM, model)
    play(ADAM, opt, [0])
    before = everything(opt, model)
    bad = copy.deepcopy(good)
    at: Any = bad
    while True:
        key = data.draw(st.sampled_from(sorted(at, key=str) if isinstance(at, dict) else range(len(at))))
        deeper = isinstance(at[key], (dict, list)) and len(at[key])
        if not deeper or data.draw(st.booleans()):
            break
        at = at[key]
    at[key] = data.draw(values)
    try:
        opt.load_state_dict(bad)
    except (TypeError, ValueError):
        assert _same(everything(opt, model), before)
    else:
        play(ADAM, opt, [4])
        assert all(bool(torch.isfinite(w).all()) for w in weights(model))


@pytest.mark.parametrize("failing", ["load_history", "take_ids", "load"])
def test_a_load_that_breaks_off_is_taken_back(failing: str, trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, good, _, _ = trained
    model = small()
    opt = build(ADAM, model)
    play(ADAM, opt, [0])
    before = everything(opt, model)
    owner = {"load_history": opt, "take_ids": opt._parameters, "load": opt._skips}[failing]
    original, armed = getattr(owner, failing), [True]

    def breaks(*args: Any) -> None:
        original(*args)
        if armed and armed.pop():
            raise Stop

    monkeypatch.setattr(owner, failing, breaks)
    with pytest.raises(Stop):
        opt.load_state_dict(good)
    assert _same(everything(opt, model), before)


def test_a_signal_waits_until_a_load_is_done(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, good, _, _ = trained
    opt = build(ADAM, small())
    take = opt._parameters.take_ids

    def interrupted(*args: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        take(*args)

    def handler(*_: Any) -> None:
        raise Stop

    monkeypatch.setattr(opt._parameters, "take_ids", interrupted)
    old = signal.signal(signal.SIGTERM, handler)
    with pytest.raises(Stop):
        opt.load_state_dict(good)
    signal.signal(signal.SIGTERM, old)
    assert (opt.seed, opt.counters["steps"], opt.history()[0][1]) == (5, 4, 4.0)


# ------------------------------------------------------------------------------------------------- what is taken, still


def test_a_state_of_an_earlier_build(trained: Any) -> None:
    """It did not say which parameters had states, and had fewer options."""
    _, _, good, _, _ = trained
    old = copy.deepcopy(good)
    del old["zokern"]["states"]
    for name in ("one_sided", "horizon"):
        del old["zokern"]["options"][name]
    opt = build(ADAM, small())
    opt.load_state_dict(saved(old))
    assert opt.counters["steps"] == 4
    del old["state"][2]
    with pytest.warns(zokern.ZokernWarning, match=r"no states for layers\.0.*right if they were frozen"):
        build(ADAM, small()).load_state_dict(old)


def test_what_was_frozen_then_may_be_trained_now() -> None:
    model = small()
    model.embedding.requires_grad_(False)
    opt = zokern.MeZO([{"params": list(model.parameters())}], 1e-3, update="adam")
    opt.step(lambda: 1.0)
    state = saved(opt.state_dict())
    model.embedding.requires_grad_(True)
    other = zokern.MeZO([{"params": list(model.parameters())}], 1e-3, update="adam")
    other.load_state_dict(state)
    other.step(lambda: 1.0)
    assert other.counters["steps"] == 2


def test_a_round_trip_of_every_method_is_the_same() -> None:
    for case in METHODS.values():
        opt = build(case, small())
        play(case, opt, range(2))
        buffer = io.BytesIO()
        torch.save(opt.state_dict(), buffer)
        buffer.seek(0)
        other = build(case, small())
        other.load_state_dict(torch.load(buffer, weights_only=True))
        assert _same(other.state_dict()["zokern"], opt.state_dict()["zokern"])


@pytest.mark.parametrize("place", ["shadow-pipelined", "stream-pipelined"])
def test_what_was_made_ready_is_not_used_after_a_load(place: str) -> None:
    """A copy of before the load would be of other curvatures."""
    world = World(HIZOO, place, None)
    for _ in range(2):
        world.reset()
        world.step(1)
        assert not world.seen().is_at(world.after, True)


# ------------------------------------------------------------------------------------------------------ and a journal


def loop(model: nn.Module, opt: Any, steps: int) -> None:
    for t in range(steps):
        opt.step(lambda t=t: model(torch.full((1, 4), 1.0 + t)).square().mean())


def test_a_load_while_a_journal_is_written_is_refused(tmp_path: Any) -> None:
    """Its replay would end with other weights, and say that they are right."""
    model = nn.Linear(4, 3)
    opt = zokern.MeZO(model, lr=1e-2)
    loop(model, opt, 3)
    state, base = saved(opt.state_dict()), copy.deepcopy(model)
    opt = zokern.MeZO(model, lr=1e-2)
    with journal.write(opt, tmp_path / "run.zkj"):
        with pytest.raises(journal.JournalError, match=r"load before the journal is begun.*zokern\.journal\.resume"):
            opt.load_state_dict(state)
        loop(model, opt, 2)
        opt.load_state_dict(opt.state_dict())  # what it has already
        loop(model, opt, 1)
    assert opt.counters["steps"] == 3
    assert journal.replay(tmp_path / "run.zkj", base) == 3
    assert equal(weights(base), weights(model))
    # The first remedy: load, and then begin.
    opt = zokern.MeZO(model, lr=1e-2)
    opt.load_state_dict(state)
    base = copy.deepcopy(model)
    with journal.write(opt, tmp_path / "next.zkj"):
        loop(model, opt, 2)
    journal.replay(tmp_path / "next.zkj", base)
    assert equal(weights(base), weights(model))


def test_a_run_with_states_is_taken_up_from_its_own_journal(tmp_path: Any) -> None:
    """The other remedy."""
    model = small()
    first = copy.deepcopy(model)
    opt = build(ADAM, model)
    with journal.write(opt, tmp_path / "run.zkj"):
        play(ADAM, opt, range(2))
        state = saved(opt.state_dict())
        play(ADAM, opt, [2])
        with pytest.raises(journal.JournalError, match="resume"):
            opt.load_state_dict(state)
    again = build(ADAM, first)
    with journal.resume(again, tmp_path / "run.zkj") as done:
        assert done == 3
        again.load_state_dict(again.state_dict())
        play(ADAM, again, [3])
    play(ADAM, opt, [3])
    assert equal(weights(first), weights(model))


def test_losses_are_given() -> None:
    assert len(losses_of(ADAM, 0)) == ADAM.forwards
