"""Whatever happens inside a step, the weights are clean afterwards: bit for bit (shadow), to rounding (inplace)."""

from __future__ import annotations

import math
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zokern
from tests.models import Mixed
from zokern import backends, sweep

PLACEMENTS = pytest.mark.parametrize("placement", ["inplace", "shadow"])
_package = Path(zokern.__file__).parent
TRACED = tuple(str(_package / name) for name in ("optim", "placement", "sweep.py", "interrupts.py"))


def mixed(placement: str) -> Mixed:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = Mixed(sixteen=placement == "shadow")
    with torch.no_grad():
        model.embedding.weight[0] = -0.0  # a sign that any arithmetic would lose
        model.norm.bias.fill_(-0.0)
    return model


def make(placement: str, model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, zokern.MeZO]:
    model = mixed(placement) if model is None else model
    options = {"num_samples": 2, "seed": 4, "weight_decay": 0.1, "eps": 1e-3, **options}
    return model, zokern.MeZO(model, 1e-2, placement=placement, **options)


class Snapshot:
    """The parameters of a module: the objects, where they lie, and their bits."""

    def __init__(self, model: nn.Module) -> None:
        self.entries = [(m, n, p) for m in model.modules() for n, p in m._parameters.items() if p is not None]
        self.values = [p.detach().clone() for _, _, p in self.entries]
        self.hooks = [len(m._state_dict_pre_hooks) + len(m._state_dict_hooks) for m in model.modules()]
        self.model = model

    def equals(self, exact: bool) -> bool:
        for (module, name, p), value in zip(self.entries, self.values, strict=True):
            assert module._parameters[name] is p, f"{name} is not the module's own parameter any more"
            if isinstance(module, nn.LSTM):
                assert any(w is p for w in module._flat_weights), f"the LSTM uses another {name}"
            if exact:
                view = torch.int32 if p.element_size() == 4 else torch.int16
                if not torch.equal(p.detach().view(view), value.view(view)):
                    return False
            elif not torch.allclose(p.detach(), value, rtol=1e-6, atol=2e-9):  # eps z is 1e-3: one pass is 1e-10
                return False
        assert self.hooks == [len(m._state_dict_pre_hooks) + len(m._state_dict_hooks) for m in self.model.modules()]
        return True


def assert_clean(snapshot: Snapshot, placement: str) -> None:
    assert snapshot.equals(exact=placement == "shadow")


def assert_still_works(model: nn.Module, opt: zokern.MeZO, placement: str, snapshot: Snapshot) -> None:
    """The failed step leaves an optimizer whose next step is the one a new optimizer makes from the same weights."""
    assert opt.counters["steps"] == 0
    other, fresh = make(placement)
    with torch.no_grad():
        for p, value in zip(other.parameters(), (p for p in model.parameters()), strict=True):
            p.copy_(value)
    for o, m in ((opt, model), (fresh, other)):
        o.step(m)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert not snapshot.equals(exact=True)


def scripted(losses: list[float]) -> Callable[[], float]:
    it = iter(losses)
    return lambda: next(it)


def failing_at(n: int, error: Callable[[], Any], model: nn.Module) -> Callable[..., Any]:
    calls: Iterator[int] = iter(range(1000))

    def closure(*_: Any) -> Any:
        loss = model()
        return error() if next(calls) == n else loss

    return closure


def raises(error: type[BaseException]) -> Callable[[], Any]:
    def thrower() -> Any:
        raise error("from the closure")

    return thrower


# ------------------------------------------------------------------------------------------------ failures of the closure


@PLACEMENTS
@pytest.mark.parametrize("forward", [0, 1, 2, 3])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration])
def test_an_exception_at_any_forward_leaves_clean_weights(placement, forward, error):
    model, opt = make(placement)
    before = Snapshot(model)
    if error is StopIteration:  # a generator-based context turns this one into RuntimeError, which is as good
        with pytest.raises((StopIteration, RuntimeError)):
            opt.step(failing_at(forward, raises(error), model))
    else:
        with pytest.raises(error, match="from the closure"):
            opt.step(failing_at(forward, raises(error), model))
    assert_clean(before, placement)
    assert_still_works(model, opt, placement, before)


@PLACEMENTS
@pytest.mark.parametrize("batch", [0, 4, 11])
def test_an_exception_at_any_micro_batch_leaves_clean_weights(placement, batch):
    model, opt = make(placement)
    before = Snapshot(model)
    with pytest.raises(RuntimeError, match="from the closure"):
        opt.step(failing_at(batch, raises(RuntimeError), model), [0, 1, 2])
    assert_clean(before, placement)


@PLACEMENTS
@pytest.mark.parametrize("forward", [0, 3])
@pytest.mark.parametrize(
    "value",
    [None, "1.0", torch.ones(2), torch.ones(0), [1.0]],
    ids=["None", "str", "vector", "empty", "list"],
)
def test_a_closure_that_returns_no_scalar_is_refused(placement, forward, value):
    model, opt = make(placement)
    before = Snapshot(model)
    with pytest.raises(TypeError, match="closure must return"):
        opt.step(failing_at(forward, lambda: value, model))
    assert_clean(before, placement)


@pytest.mark.parametrize("closure", [None, 1.0, "loss"])
def test_a_step_without_closure_is_refused(closure):
    _, opt = make("inplace")
    with pytest.raises(TypeError, match="closure"):
        opt.step(closure)


@PLACEMENTS
def test_a_closure_that_changes_the_mode_is_harmless(placement):
    model, opt = make(placement)
    reference_model, reference_opt = make(placement)

    def closure() -> Tensor:
        model.train(not model.training)
        return model()

    opt.step(closure)
    reference_opt.step(reference_model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference_model.parameters(), strict=True))


@PLACEMENTS
def test_an_exception_inside_state_dict_inside_the_closure(placement):
    model, opt = make(placement)
    before = Snapshot(model)

    def broken(*_: Any) -> None:
        raise RuntimeError("from a hook")

    handle = model.norm.register_state_dict_post_hook(broken)
    with pytest.raises(RuntimeError, match="from a hook"):
        opt.step(lambda: model.state_dict() and 1.0)
    handle.remove()
    assert_clean(before, placement)


def test_a_parameter_that_left_the_module_is_named():
    model, opt = make("shadow")
    model.norm.weight = nn.Parameter(torch.ones(6))
    after_change = Snapshot(model)
    with pytest.raises(RuntimeError, match=r"norm\.weight"):
        opt.step(model)
    assert after_change.equals(exact=True)


# -------------------------------------------------------------------------------------------------- losses not finite


@PLACEMENTS
@pytest.mark.parametrize("forward", [0, 1, 2, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_skips_the_step(placement, forward, value):
    model, opt = make(placement)
    before = Snapshot(model)
    with pytest.warns(zokern.ZokernWarning, match="not finite") as record:
        loss = opt.step(failing_at(forward, lambda: torch.tensor(value), model))
    assert len(record) == 1
    assert_clean(before, placement)  # decay included: nothing is applied
    assert not math.isfinite(loss.item())
    assert opt.skipped_steps == 1
    assert opt.counters["steps"] == 1  # the next step has new noise
    opt.step(model)
    assert not before.equals(exact=False)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_infinities_that_cancel_skip_too():
    """inf - inf is NaN and inf + inf inf; both samples count, whichever comes first."""
    model, opt = make("shadow")
    before = Snapshot(model)
    with pytest.warns(zokern.ZokernWarning):
        opt.step(lambda: math.inf)
    assert_clean(before, "shadow")


@PLACEMENTS
def test_skips_are_counted_and_warned_of_once(placement):
    model, opt = make(placement)
    before = Snapshot(model)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for _ in range(5):
            opt.step(lambda: math.nan)
    assert [r.category for r in record] == [zokern.ZokernWarning]
    assert opt.skipped_steps == 5
    assert before.equals(exact=placement == "shadow")


@PLACEMENTS
def test_the_warning_made_an_error_leaves_clean_weights(placement):
    """As in this suite: warnings.simplefilter("error")."""
    model, opt = make(placement)
    before = Snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(zokern.ZokernWarning):
            opt.step(lambda: math.nan)
    assert_clean(before, placement)


@PLACEMENTS
@pytest.mark.parametrize("size", [1e300, 3e38])
def test_losses_too_large_for_an_update_do_not_destroy_the_weights(placement, size):
    """Finite in float64, but lr/eps times it overflows the pass's float32: the same as a loss that is not finite."""
    model, opt = make(placement)
    before = Snapshot(model)
    values = iter([size, -size, 1.0, 1.0])
    with pytest.warns(zokern.ZokernWarning):
        opt.step(lambda: torch.tensor(next(values), dtype=torch.float64))
    assert_clean(before, placement)
    assert opt.skipped_steps == 1


# ----------------------------------------------------------------------------------------------------------- interrupts


@pytest.fixture(autouse=True)
def _python_handles_sigint() -> Iterator[None]:
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "a step left another handler behind"
    signal.signal(signal.SIGINT, old)


@PLACEMENTS
@pytest.mark.parametrize("forward", [0, 1, 2, 3])
def test_ctrl_c_in_a_closure(placement, forward):
    model, opt = make(placement)
    before = Snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        opt.step(failing_at(forward, lambda: signal.raise_signal(signal.SIGINT), model))
    assert_clean(before, placement)
    assert_still_works(model, opt, placement, before)


def updated(placement: str) -> tuple[Snapshot, dict[str, int]]:
    """The weights after one whole step."""
    model, opt = make(placement)
    opt.step(model)
    return Snapshot(model), opt.counters


def assert_before_or_after(model: nn.Module, opt: zokern.MeZO, placement: str, before: Snapshot) -> str:
    """Never in between: all tensors of the state before the step and its count, or all of the state after and its."""
    after, _ = updated(placement)
    current = Snapshot(model)
    same = [torch.equal(a, b) for a, b in zip(current.values, after.values, strict=True)]
    if all(same):
        assert before.hooks == current.hooks
        assert all(m._parameters[n] is p for m, n, p in before.entries)
        assert opt.counters["steps"] == 1, (
            "the weights are updated, but the step was not counted: its noise comes again"
        )
        return "after"
    assert_clean(before, placement)
    assert opt.counters["steps"] == 0
    return "before"


@PLACEMENTS
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("launch", range(10))
def test_ctrl_c_in_a_launch(placement, when, launch, monkeypatch):
    """2n+1 = 5 passes; in shadow, each is a launch for bfloat16 and one for float32, with the signal between them too."""
    if placement == "inplace" and launch >= 5:
        pytest.skip("one dtype: five launches")
    model, opt = make(placement, backend="cpu")
    before = Snapshot(model)
    original, calls = backends.cpu.run, iter(range(100))

    def interrupted(*args: Any) -> None:
        mine = next(calls) == launch
        if mine and when == "before":
            signal.raise_signal(signal.SIGINT)
        original(*args)
        if mine and when == "after":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(backends.cpu, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opt.step(model)
    monkeypatch.undo()
    assert_before_or_after(model, opt, placement, before)


@PLACEMENTS
@pytest.mark.parametrize("n", range(5))
def test_an_error_of_a_pass(placement, n, monkeypatch):
    """Out of memory for a table, say: raised before the pass has touched anything."""
    model, opt = make(placement)
    before = Snapshot(model)
    original, calls = sweep.run, iter(range(100))

    def run(*args: Any) -> int:
        if next(calls) == n:
            raise torch.OutOfMemoryError("for the table")
        return original(*args)

    monkeypatch.setattr(sweep, "run", run)
    with pytest.raises(torch.OutOfMemoryError):
        opt.step(model)
    monkeypatch.undo()
    assert_clean(before, placement)
    assert_still_works(model, opt, placement, before)


def step_with_signal_at(line: int, model: nn.Module, opt: zokern.MeZO) -> tuple[int, str]:
    """One step in which Ctrl-C arrives as the optimizer starts its line number `line`; the lines there were, and where.

    Python runs a signal's handler between two bytecodes; the tracer sends the signal between two lines. The launch of a
    pass is left out here: the tests above interrupt it.
    """
    count, where, last = 0, "", ("", 0)

    def tracer(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count, where, last
        if not frame.f_code.co_filename.startswith(TRACED):
            return None
        here = (frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and here != last:  # once for a comprehension
            count += 1
            last = here
            if count == line:
                where = f"{Path(here[0]).name}:{here[1]}"
                signal.raise_signal(signal.SIGINT)
        return tracer

    sys.settrace(tracer)
    losses = iter([1.5, 1.0])
    try:
        opt.step(lambda: next(losses))
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return count, where


@PLACEMENTS
def test_ctrl_c_at_every_line_of_a_step(placement):
    """Wherever the signal arrives, the module shows its own, clean weights; and steps counts what they have seen."""
    model, opt = make(placement, num_samples=1)
    total, _ = step_with_signal_at(-1, model, opt)
    assert total > 100
    after = Snapshot(model).values
    broken: list[str] = []
    model, _ = make(placement)
    start = Snapshot(model)
    for line in range(1, total + 1):
        for (_, _, p), value in zip(start.entries, start.values, strict=True):
            p.data.copy_(value)
        _, opt = make(placement, model, num_samples=1)
        _, where = step_with_signal_at(line, model, opt)
        try:
            if all(torch.equal(a, b) for a, b in zip(Snapshot(model).values, after, strict=True)):
                assert opt.counters["steps"] == 1, "updated, but not counted"
            else:
                assert_clean(start, placement)
                assert opt.counters["steps"] == 0
        except AssertionError as error:
            broken.append(f"line {line} of {total}, {where}: {str(error).splitlines()[0]}")
            model, _ = make(placement)
            start = Snapshot(model)
    assert not broken, "\n".join(broken)


def interrupt_twice(opt: zokern.MeZO, line: int) -> None:
    """Ctrl-C in the first closure, and once more as the optimizer starts its line number `line` after that."""
    count, raised = 0, False

    def tracer(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(TRACED):
            return None
        if event == "line" and raised:
            count += 1
            if count == line:
                signal.raise_signal(signal.SIGINT)
        return tracer

    def closure() -> None:
        nonlocal raised
        raised = True
        signal.raise_signal(signal.SIGINT)

    sys.settrace(tracer)
    try:
        opt.step(closure)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)


@PLACEMENTS
def test_ctrl_c_twice(placement):
    """The impatient user: a second signal while the first one's clean-up runs, at each of its lines."""
    broken = []
    for line in range(1, 60):
        model, opt = make(placement, num_samples=1)
        before = Snapshot(model)
        interrupt_twice(opt, line)
        try:
            assert_clean(before, placement)
        except AssertionError as error:
            broken.append(f"line {line}: {str(error).splitlines()[0]}")
    assert not broken, "\n".join(broken)


# ------------------------------------------------------------------------------------------------------------ arguments


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"lr": -1.0}, ValueError, "lr"),
        ({"lr": math.nan}, ValueError, "lr"),
        ({"lr": math.inf}, ValueError, "lr"),
        ({"lr": "1e-3"}, TypeError, "lr"),
        ({"lr": None}, TypeError, "lr"),
        ({"lr": True}, TypeError, "lr"),
        ({"lr": torch.tensor(-1.0)}, ValueError, "lr"),
        ({"lr": torch.ones(2)}, TypeError, "lr"),
        ({"eps": 0.0}, ValueError, "eps"),
        ({"eps": -1e-3}, ValueError, "eps"),
        ({"eps": math.nan}, ValueError, "eps"),
        ({"weight_decay": math.nan}, ValueError, "weight_decay"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 1 << 63}, ValueError, "seed"),
        ({"seed": 1.0}, TypeError, "seed"),
        ({"seed": True}, TypeError, "seed"),
        ({"num_samples": 0}, ValueError, "num_samples"),
        ({"num_samples": 1.5}, TypeError, "num_samples"),
        ({"placement": "nowhere"}, ValueError, "placement"),
        ({"backend": "abacus"}, ValueError, "backend"),
        ({"rounding": "up"}, ValueError, "rounding"),
        ({"distribution": "cauchy"}, ValueError, "distribution"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_by_name(options, error, word):
    with pytest.raises(error, match=rf"^{word}\b"):
        zokern.MeZO(net(), **{"lr": 1e-3, **options})


def test_the_last_seed_is_good():
    opt = zokern.MeZO(net(), 1e-3, seed=(1 << 63) - 1)
    opt.step(lambda: 1.0)


@pytest.mark.parametrize("key", ["lr", "eps", "weight_decay"])
def test_bad_values_in_a_group_are_refused_by_name(key):
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=f"^{key} of group 1"):
        zokern.MeZO([{"params": [a]}, {"params": [b], key: -1.0}], 1e-3)
    opt = zokern.MeZO([{"params": [a]}, {"params": [b]}], 1e-3)
    opt.param_groups[1][key] = math.nan  # a schedule that went wrong
    with pytest.raises(ValueError, match=f"^{key} of group 1"):
        opt.step(lambda: 1.0)
    assert torch.equal(a, torch.ones(3))


def parameter(t: Tensor) -> nn.Parameter:
    return nn.Parameter(t, requires_grad=t.is_floating_point())


@pytest.mark.parametrize(
    ("params", "error", "word"),
    [
        ([], ValueError, "empty"),
        (iter(()), ValueError, "empty"),
        (torch.ones(3), TypeError, "one Tensor"),
        (3, TypeError, "params"),
        ([1.0], TypeError, "float"),
        ([{"lr": 1.0}], ValueError, "'params'"),
        ([parameter(torch.ones(3, dtype=torch.int64))], TypeError, "parameter 0.*int64"),
        ([("codes", parameter(torch.ones(3, dtype=torch.int64)))], TypeError, "codes.*int64"),
        ([nn.Parameter(torch.ones(3).double())], TypeError, "float64"),
        ([("w", nn.Parameter(torch.ones(3, 4).T))], ValueError, "w is .*strides"),
        ([("w", nn.Parameter(torch.ones(3, device="meta")))], ValueError, "w is .*meta"),
        (nn.ReLU(), ValueError, "requires_grad"),
        (nn.Linear(3, 2).requires_grad_(False), ValueError, "requires_grad"),
        (nn.Linear(3, 2).double(), TypeError, "weight.*float64"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,  # the same in every process that runs tests
)
def test_bad_params_are_refused_by_name(params, error, word):
    with pytest.raises(error, match=word):
        zokern.MeZO(params, 1e-3)


def test_a_generator_of_tensors_is_good():
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    zokern.MeZO((p for p in model.parameters()), 1e-3).step(scripted([2.0, 1.0]))
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "options", [{"placement": "shadow"}, {"layers": zokern.RandomBlocks(1)}], ids=["shadow", "layers"]
)
def test_what_needs_a_module_says_so(options):
    with pytest.raises(ValueError, match=r"nn\.Module"):
        zokern.MeZO(net().parameters(), 1e-3, **options)


def test_auto_placement_without_a_module_works_in_place():
    p = nn.Parameter(torch.ones(100).bfloat16())
    seen = []
    zokern.MeZO([p], 1e-3).step(lambda: seen.append(p.detach().clone()) or 1.0)
    assert not torch.equal(seen[0], torch.ones(100).bfloat16())


def test_a_bad_parameter_in_replaced_groups_is_refused_every_time():
    """A strided view has the address of the memory it looks at: a pass over it would write to its neighbours."""
    opt = zokern.MeZO(net(), 1e-2)
    base = torch.ones(8)
    strided = nn.Parameter(base[::2])
    opt.param_groups[0]["params"] = [strided]
    for _ in range(2):  # twice: a table of addresses made in the first try must not be used in the second
        with pytest.raises(ValueError, match="strides"):
            opt.step(scripted([1.0, 2.0]))
        assert torch.equal(base, torch.ones(8))


def test_a_parameter_made_strided_after_the_first_step_is_refused():
    """`p.data = ...` with the same address and size: the table of the first step must not be used for it."""
    base = torch.ones(8)
    p = nn.Parameter(base[:4])
    opt = zokern.MeZO([p], 1e-2)
    opt.step(lambda: 1.0)
    base.fill_(1.0)
    p.data = base[::2]
    with pytest.raises(ValueError, match="strides"):
        opt.step(scripted([1.0, 2.0]))
    assert np.array_equal(base.numpy(), np.ones(8, np.float32))


@PLACEMENTS
def test_a_step_inside_a_step_is_refused(placement):
    model, opt = make(placement)
    before = Snapshot(model)

    def closure() -> float:
        opt.step(model)
        return 1.0

    with pytest.raises(RuntimeError, match="inside a step of the same optimizer"):
        opt.step(closure)
    assert_clean(before, placement)
    assert_still_works(model, opt, placement, before)
