"""Whole steps on a real GPU: nothing waits, a captured step has an eager one's bits, and a GPU the weights of a CPU.

Every test here is skipped where PyTorch sees no NVIDIA GPU; test_graphed.py and test_no_waiting.py test the same on the
CPU, as far as a CPU can show it.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests.graphs.test_graphed import batches, dropped_out, eager, make, replayed, same
from tests.methods import METHODS, Case
from tests.models import Net

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="needs an NVIDIA GPU"),
]
NOT_CAPTURED = r"(?s)could not be captured in a CUDA graph: .*optimizer\.step"  # CUDA's words may be several lines
CASES = pytest.mark.parametrize("case", list(METHODS.values()), ids=list(METHODS))
PLACED = pytest.mark.parametrize(
    ("placement", "dtype"),
    [("inplace", torch.float32), ("shadow", torch.float16), ("stream", torch.bfloat16)],
    ids=["inplace-float32", "shadow-float16", "stream-bfloat16"],
)


def on_gpu(data: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: value.cuda() for name, value in batch.items()} for batch in data]


@PLACED
@CASES
def test_an_eager_step_does_not_wait(case: Case, placement: str, dtype: torch.dtype, no_waiting: None) -> None:
    data = on_gpu(batches(6))
    _, opt, closure, scheduler = make(case, placement, dtype, "cuda")
    opt.step(lambda: closure(data[0]))  # allocates copies and states
    torch.cuda.set_sync_debug_mode("error")
    for batch in data[1:]:
        opt.step(lambda batch=batch: closure(batch))
        scheduler.step()
    torch.cuda.set_sync_debug_mode("default")
    assert opt.counters["steps"] == 6
    assert opt.skipped_steps == 0


@PLACED
@CASES
def test_a_pipelined_step_has_the_bits_of_one_that_is_not(
    case: Case, placement: str, dtype: torch.dtype, gpu_backend: str
) -> None:
    if placement == "inplace":
        pytest.skip("inplace has no copies to fill")
    data = on_gpu(batches())
    same(*(eager(case, placement, dtype, data, device="cuda", backend=gpu_backend, pipelined=p) for p in (False, True)))


def third_does_not_wait(opt: zokern.optim.ZerothOrderOptimizer, closure, data: list[dict[str, Tensor]]) -> None:
    """Nor do those that follow it."""
    for batch in data[:2]:
        opt.step(lambda batch=batch: closure(batch))
    torch.cuda.set_sync_debug_mode("error")
    for batch in data[2:]:
        opt.step(lambda batch=batch: closure(batch))
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("placement", ["shadow", "stream"])
@pytest.mark.parametrize("name", ["mezo", "hizoo", "helene", "greedy-curved", "fzoo", "es"])
def test_a_pipelined_step_does_not_wait(name: str, placement: str, no_waiting: None) -> None:
    data = on_gpu(batches(4))
    _, opt, closure, _ = make(METHODS[name], placement, torch.bfloat16, "cuda", pipelined=True)
    third_does_not_wait(opt, closure, data)
    assert opt.skipped_steps == 0


@pytest.mark.parametrize("name", ["mezo", "hizoo", "helene", "greedy-curved", "fzoo", "es"])
@pytest.mark.parametrize("pipelined", [False, True])
def test_blocks_filled_ahead_have_the_bits_of_those_that_are_not(name: str, pipelined: bool, no_waiting: None) -> None:
    """Eager, and where the case can be captured; nothing waits."""
    data, case = on_gpu(batches()), METHODS[name]
    plain = eager(case, "stream", torch.bfloat16, data, device="cuda")
    same(plain, eager(case, "stream", torch.bfloat16, data, device="cuda", prefetch=True, pipelined=pipelined))
    if not pipelined:
        same(plain, replayed(case, "stream", torch.bfloat16, data, device="cuda", prefetch=True))
    _, opt, closure, _ = make(case, "stream", torch.bfloat16, "cuda", prefetch=True, pipelined=pipelined)
    third_does_not_wait(opt, closure, data)


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_large_model_has_the_bits_of_shadow_whatever_overtakes_what(prefetch: bool) -> None:
    """Passes and forwards that take their time, so that streams which did not wait for each other would be seen."""
    runs = []
    for placement, ahead in (("shadow", False), ("stream", prefetch)):
        torch.manual_seed(3)
        model = Net(depth=8, width=2048).to("cuda", torch.bfloat16).eval()
        opt = zokern.MeZO(model, 1e-6, placement=placement, prefetch=ahead, seed=5)
        tokens = torch.randint(0, 11, (512, 64), device="cuda")
        runs.append((model, opt, torch.stack([opt.step(lambda m=model, t=tokens: m(t).float().square().mean())
                                              for _ in range(5)])))  # fmt: skip
    same(*runs)


@PLACED
@CASES
def test_a_captured_step_has_the_bits_of_an_eager_one(case: Case, placement: str, dtype: torch.dtype) -> None:
    data = on_gpu(batches())
    a, b = (way(case, placement, dtype, data, device="cuda") for way in (eager, replayed))
    same(a, b)
    assert a[1].counters == b[1].counters
    start = make(case, placement, dtype)[0]
    assert not torch.equal(start.head.weight, b[0].head.weight.cpu())


def test_a_captured_step_does_not_wait(no_waiting: None) -> None:
    """Nor with a batch from the host, if that is pinned."""
    for name in ("mezo", "helene"):
        data = [{key: value.pin_memory() for key, value in batch.items()} for batch in batches(6)]
        _, opt, closure, scheduler = make(METHODS[name], "shadow", torch.bfloat16, "cuda")
        step = zokern.GraphedStep(opt, closure, data[0])
        for batch in data[:2]:  # helene captures its second kind of step here
            step(batch)
        torch.cuda.set_sync_debug_mode("error")
        for batch in data[2:]:
            step(batch)
            scheduler.step()
        torch.cuda.set_sync_debug_mode("default")
        assert opt.skipped_steps == 0


def test_a_captured_step_that_is_skipped() -> None:
    """It is told once, when the device has said so: while the steps go on, or at the next."""
    data, losses = on_gpu(batches(bad=2)), []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", zokern.ZokernWarning)
        _, opt, closure, _ = make(METHODS["hizoo"], "shadow", torch.bfloat16, "cuda")
        step = zokern.GraphedStep(opt, closure, data[0])
        for batch in data:
            losses.append(step(batch))
            torch.cuda.synchronize()  # else the count that is on its way may still be that of the first step
        opt.step(lambda: losses[0])
    assert torch.stack(losses).isnan().tolist() == [False, False, True, False, False]
    assert sum(warning.category is zokern.ZokernWarning for warning in told) == 1
    assert opt.skipped_steps == 1


def test_dropout_in_a_captured_step_draws_what_it_draws_in_an_eager_one() -> None:
    data, runs = on_gpu(batches()), []
    for captured in (False, True):
        model, opt, _, _ = make(METHODS["mezo"], "shadow", torch.float32, "cuda")
        opt.param_groups[0]["lr"] = 1e-5
        torch.cuda.manual_seed(3)
        if captured:
            step = zokern.GraphedStep(opt, lambda batch, model=model: dropped_out(batch, model), data[0])
            losses = [step(batch) for batch in data]
        else:
            losses = [opt.step(lambda m=model, b=batch: dropped_out(b, m)) for batch in data]
        runs.append((model, opt, torch.stack(losses)))
    same(*runs)


def test_a_closure_that_waits_cannot_be_captured_and_changes_nothing() -> None:
    data = on_gpu(batches())
    model, opt, closure, _ = make(METHODS["mezo"], "inplace", torch.float32, "cuda")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=NOT_CAPTURED):
        zokern.GraphedStep(opt, lambda batch: closure(batch) * closure(batch).item(), data[0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    opt.step(lambda: closure(data[0]))
    assert opt.counters["steps"] == 1


@PLACED
@CASES
def test_given_losses_make_the_weights_of_the_cpu(
    case: Case, placement: str, dtype: torch.dtype, gpu_backend: str
) -> None:
    """Coefficients are computed in float64 from the losses on either device, and the passes have the same bits."""
    if case.method == "mezo-greedy" and placement == "inplace":
        pytest.skip("on the CPU the best seed is known, and the weights move less between two directions that are one")
    given = torch.rand(200, generator=torch.Generator().manual_seed(1))
    results = []
    for device, backend in (("cpu", "cpu"), ("cuda", gpu_backend)):
        model, opt, _, scheduler = make(case, placement, dtype, device, backend=backend)
        losses, tokens = itertools.cycle(given.to(device)), batches(1)[0]["tokens"].to(device)

        def closure(model: nn.Module = model, losses: Iterator[Tensor] = losses, tokens: Tensor = tokens) -> Tensor:
            model(tokens)  # stream writes what the forward reads
            return next(losses)

        for _ in range(4):
            opt.step(closure)
            scheduler.step()
        results.append([p.detach().cpu() for p in model.parameters()])
    assert all(torch.equal(mine, wanted) for wanted, mine in zip(*results, strict=True))
