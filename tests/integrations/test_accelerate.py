"""A loop with accelerate's accumulate(): every micro-batch is used, what comes out is the step's, a saved run goes on."""

from __future__ import annotations

import gc
import importlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

import zokern
from tests.methods import equal, weights
from tests.models import Toy, small, tokens

accelerate = pytest.importorskip("accelerate")
wrapped = importlib.import_module("zokern.integrations.accelerate")

BATCHES = [tokens(i)[: 9 + i] for i in range(7)]  # an accumulation over 3 of them ends with an incomplete one
STEPS = [BATCHES[0:3], BATCHES[3:6], BATCHES[6:7]]
PLACES = [(dtype, place) for dtype in (torch.float32, torch.bfloat16) for place in ("inplace", "shadow", "stream")]


@pytest.fixture(autouse=True)
def _apart() -> Iterator[None]:
    """accelerate's states are the process'."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def loader() -> Any:
    return DataLoader(BATCHES, batch_size=1, collate_fn=lambda items: items[0])  # type: ignore[arg-type]


class Run:
    """A model in a loop with accelerate; `forwards` are the batches that it has seen."""

    weighted = False

    def __init__(self, steps: int = 3, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.accelerator = accelerate.Accelerator(gradient_accumulation_steps=steps, cpu=True)
        self.model = small(dtype)
        opt = zokern.MeZO(self.model, **{"lr": 1e-2, "update": "momentum", **options})
        self.opt = wrapped.prepare(self.accelerator, opt)
        self.loader, self.scheduler = self.accelerator.prepare(loader(), StepLR(opt, 1, gamma=0.9))
        self.forwards: list[int] = []

    def closure(self, batch: Tensor) -> Tensor:
        self.forwards.append(len(batch))
        return self.model(batch)

    def go(self) -> list[Tensor | None]:
        losses = []
        for batch in self.loader:
            with self.accelerator.accumulate(self.model):
                weight = float(len(batch)) if self.weighted else None
                losses.append(self.opt.step(self.closure, batch, weight=weight))
                self.scheduler.step()
                self.opt.zero_grad()
        return losses


def by_hand(dtype: torch.dtype = torch.float32, weighted: bool = False, **options: Any) -> tuple[Toy, list[Tensor]]:
    """The same steps without accelerate."""
    model = small(dtype)
    opt = zokern.MeZO(model, **{"lr": 1e-2, "update": "momentum", **options})
    scheduler, losses = StepLR(opt, 1, gamma=0.9), []
    for batches in STEPS:
        each = [float(len(batch)) for batch in batches] if weighted else None
        losses.append(opt.step(model, batches, batch_weights=each))
        scheduler.step()
    return model, losses


@pytest.mark.parametrize(("dtype", "place"), PLACES)
def test_a_step_is_over_every_micro_batch(dtype, place):
    run = Run(dtype=dtype, placement=place)
    run.weighted = place == "stream"
    losses = run.go()
    model, expected = by_hand(dtype, run.weighted, placement=place)
    assert equal(weights(run.model), weights(model))
    assert [i for i, loss in enumerate(losses) if loss is not None] == [2, 5, 6]
    assert torch.equal(torch.stack([loss for loss in losses if loss is not None]), torch.stack(expected))
    assert run.forwards == [len(batch) for batches in STEPS for _ in range(2) for batch in batches]
    assert torch.equal(run.opt.metrics["loss"], expected[-1])
    assert run.opt.counters["steps"] == 3
    assert run.opt.skipped_steps == run.opt.flat_steps == 0
    assert run.scheduler.get_last_lr() == [pytest.approx(1e-2 * 0.9**3)]
    assert run.opt.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.9**3)


def test_without_accumulation_a_batch_may_be_left_out():
    run = Run(steps=1)
    expected = small()
    opt = zokern.MeZO(expected, 1e-2, update="momentum")
    assert torch.equal(run.opt.step(run.model), opt.step(expected))
    assert torch.equal(run.opt.step(run.closure, BATCHES[0]), opt.step(lambda: expected(BATCHES[0])))
    assert equal(weights(run.model), weights(expected))
    with pytest.raises(ValueError, match="weight and reduction are of a batch"):
        run.opt.step(run.model, weight=2.0)


def test_mixed_bfloat16_is_autocast_in_the_closure():
    Run().accelerator.free_memory()
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2, cpu=True)
    model, expected = small(), small()
    opt = wrapped.prepare(accelerator, zokern.MeZO(model, 1e-2))
    prepared = accelerator.prepare(model)
    other = zokern.MeZO(expected, 1e-2)

    def plain(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return expected(batch)

    for batch in BATCHES[:2]:
        with accelerator.accumulate(prepared):
            loss = opt.step(lambda b: prepared(b), batch)
    assert torch.equal(loss, other.step(plain, BATCHES[:2]))
    assert equal(weights(model), weights(expected))


def test_a_saved_run_goes_on_with_the_same_bits(tmp_path):
    run = Run(dtype=torch.bfloat16)
    run.accelerator.prepare(run.model)
    run.go()
    run.accelerator.save_state(str(tmp_path))
    run.go()
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    again = Run(dtype=torch.bfloat16)
    again.accelerator.prepare(again.model)
    with torch.no_grad():
        again.model.norm.weight.zero_()
    again.accelerator.load_state(str(tmp_path))
    assert again.opt.counters["steps"] == 3
    again.go()
    assert equal(weights(again.model), weights(run.model))
    assert again.scheduler.get_last_lr() == run.scheduler.get_last_lr()
    assert torch.equal(again.opt.metrics["loss"], run.opt.metrics["loss"])


def test_updates_that_wait_are_saved_once(tmp_path):
    """In the middle of a window: what is saved has them, and a run that goes on from there adds nothing twice. What is
    asked inside folded() sees them."""
    waits = {"update": "sgd", "distribution": "lowrank:1", "placement": "forward", "fold_every": 4, "eps": 0.1}
    run = Run(**waits)
    prepared = run.accelerator.prepare(run.model)
    run.go()
    assert run.opt.pending == 3
    before = weights(run.model)
    run.accelerator.save_state(str(tmp_path / "state"))
    run.accelerator.save_model(prepared, str(tmp_path / "model"), safe_serialization=False)
    states = run.accelerator.get_state_dict(prepared), torch.load(tmp_path / "model" / "pytorch_model.bin")
    plain = float(prepared(BATCHES[0]))
    with run.opt.folded():
        shown = float(run.accelerator.unwrap_model(prepared)(BATCHES[0]))
    assert equal(weights(run.model), before)
    run.go()
    assert run.opt.pending == 2
    again = Run(**waits)
    again.accelerator.prepare(again.model)
    again.accelerator.load_state(str(tmp_path / "state"))
    for state in states:  # of the bits that a run goes on from
        assert all(torch.equal(state[name], p) for name, p in again.model.named_parameters())
    assert abs(float(again.model(BATCHES[0])) - shown) < 1e-6 < abs(plain - shown)
    again.go()
    assert (again.opt.pending, again.opt.counters["steps"]) == (2, 6)
    assert run.opt.fold() == again.opt.fold() == 2
    assert run.opt.pending == again.opt.pending == 0
    for p, q in zip(run.model.parameters(), again.model.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-6)


def test_a_journal_is_of_the_optimizer_itself(tmp_path):
    run = Run(update="sgd")
    base = dict(small().named_parameters())
    with zokern.journal.write(run.opt, tmp_path / "run.zkj"):
        run.go()
    assert zokern.journal.Reader(tmp_path / "run.zkj").header["method"] == "MeZO"
    assert zokern.journal.replay(tmp_path / "run.zkj", base) == 3
    assert equal(list(base.values()), weights(run.model))
    with zokern.journal.resume(Run(update="sgd").opt, tmp_path / "run.zkj") as steps:
        assert steps == 3


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_prepare_in_either_order(first):
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=3, cpu=True)
    model = small()
    opt = zokern.MeZO(model, 1e-2)
    scheduler = StepLR(opt, 1, gamma=0.9)
    if first == "ours":
        ours = wrapped.prepare(accelerator, opt)
        model, same, scheduler = accelerator.prepare(model, ours, scheduler)
        assert same is ours
    else:
        model, theirs, scheduler = accelerator.prepare(model, opt, scheduler)
        ours = wrapped.prepare(accelerator, theirs)
    assert wrapped.prepare(accelerator, ours) is ours
    assert [id(one) for one in accelerator._optimizers] == [id(ours)]
    assert [id(one) for one in scheduler.optimizers] == [id(ours)]
    assert ours.optimizer is opt


# -------------------------------------------------------------------------------------------------------- what is refused


def waiting(run: Run, count: int = 1) -> None:
    for batch in BATCHES[:count]:
        with run.accelerator.accumulate(run.model):
            assert run.opt.step(run.closure, batch) is None


def test_what_a_step_refuses_changes_nothing():
    run = Run()
    waiting(run)
    before = weights(run.model)
    refused: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (TypeError, r"needs a closure and a batch.*in place of accelerator\.backward", (), {}),
        (TypeError, "needs the micro-batch as its second argument", (run.model,), {}),
        (TypeError, "closure must be a function of a batch, got Tensor", (BATCHES[1], BATCHES[1]), {}),
        (ValueError, "the 1 micro-batches before it in this step have none", (run.model, BATCHES[1]), {"weight": 2.0}),
        (ValueError, "weight is -1", (run.model, BATCHES[1]), {"weight": -1.0}),
        (TypeError, "weight must be a number, got str", (run.model, BATCHES[1]), {"weight": "2"}),
        (ValueError, "reduction is 'sum', and was 'mean'", (run.model, BATCHES[1]), {"reduction": "sum"}),
    ]
    for kind, message, arguments, named in refused:
        with pytest.raises(kind, match=message):
            run.opt.step(*arguments, **named)
    assert equal(weights(run.model), before)
    assert len(run.opt._waiting) == 1
    with pytest.warns(zokern.ZokernWarning, match="1 micro-batch had been collected"):
        run.opt.load_state_dict(run.opt.optimizer.state_dict())


def test_a_closure_that_raises_may_be_tried_again():
    run, expected = Run(placement="shadow"), small()
    waiting(run, 2)
    before = weights(run.model)

    def broken(batch: Tensor) -> Tensor:
        raise OSError("no more")

    with run.accelerator.accumulate(run.model):
        with pytest.raises(OSError, match="no more"):
            run.opt.step(broken, BATCHES[2])
        assert equal(weights(run.model), before)
        loss = run.opt.step(run.model, BATCHES[2])
    assert torch.equal(
        loss, zokern.MeZO(expected, 1e-2, update="momentum", placement="shadow").step(expected, STEPS[0])
    )
    assert equal(weights(run.model), weights(expected))


def give_up(held: list[Run]) -> None:
    held.clear()
    gc.collect()


def test_micro_batches_that_no_step_uses_are_told(tmp_path):
    run = Run()
    waiting(run, 2)
    with pytest.warns(
        zokern.ZokernWarning, match="state was saved, 2 micro-batches.* where accelerator.sync_gradients"
    ):
        run.accelerator.save_state(str(tmp_path))
    with pytest.warns(zokern.ZokernWarning, match="a state was loaded, 2 micro-batches"):
        run.accelerator.load_state(str(tmp_path))
    assert not run.opt._waiting
    run.accelerator.step = 0  # which a checkpoint has
    waiting(run)
    run.accelerator.free_memory()
    held = [run]
    del run
    with pytest.warns(zokern.ZokernWarning, match=r"given up, 1 micro-batch had .* accelerator\.prepare"):
        give_up(held)


@pytest.mark.parametrize("steps", [1, 4])
def test_accelerates_own_wrapper_under_accumulate_is_told_once(steps):
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=steps, cpu=True)
    model = small()
    opt = accelerator.prepare(zokern.MeZO(model, 1e-2))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for batch in accelerator.prepare(loader()):
            with accelerator.accumulate(model):
                opt.step(lambda batch=batch: model(batch))
        alone = zokern.MeZO(model, 1e-2)  # nobody hands it the last closure alone
        alone.step(model)
    found = [str(one.message) for one in told if "accumulates over 4" in str(one.message)]
    assert len(found) == (steps > 1)
    assert all("zokern.integrations.accelerate.prepare(accelerator, opt)" in one for one in found)


def test_what_is_no_optimizer_of_zokern_is_refused():
    accelerator, model = accelerate.Accelerator(cpu=True), small()
    with pytest.raises(TypeError, match=r"accelerator must be an accelerate\.Accelerator, got Toy"):
        wrapped.prepare(model, zokern.MeZO(model, 1e-2))
    with pytest.raises(TypeError, match=r"one of zokern's.* got SGD"):
        wrapped.prepare(accelerator, accelerator.prepare(torch.optim.SGD(model.parameters(), 1e-2)))


@pytest.mark.parametrize(
    ("fact", "value", "message"),
    [
        ("mixed_precision", "fp16", "mixed precision 'fp16' has a GradScaler"),
        ("distributed_type", accelerate.DistributedType.DEEPSPEED, "does not train under DeepSpeed"),
    ],
)
def test_an_accelerator_that_cannot_be_served_is_refused(fact, value, message, monkeypatch):
    accelerator, model = accelerate.Accelerator(cpu=True), small()
    monkeypatch.setattr(accelerate.Accelerator, fact, property(lambda self: value))
    with pytest.raises(NotImplementedError, match=message):
        wrapped.prepare(accelerator, zokern.MeZO(model, 1e-2))
    assert accelerator._optimizers == []
