"""Steps on a device never wait for it, by construction: run on PyTorch's device "meta", whose tensors have no values.

Asking one for its value, or for a copy on the host, is an error of PyTorch's own, and what goes to the device is counted.
An eager step may send numbers there; one that is captured in a graph may not even do that.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_methods import METHODS, Case
from test_pipelined import Net
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import zokern
from zokern.optim import parameters
from zokern.optim.base import ZerothOrderOptimizer
from zokern.optim.live import Live

DEVICE = torch.device("meta")
PLACEMENTS = pytest.mark.parametrize("placement", ["inplace", "shadow", "stream"])


class Transfers(TorchDispatchMode):
    """Counts copies from one device to another: (from, to)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name()
        source = args[1] if name.startswith("aten::copy_") else args[0] if name.startswith("aten::_to_copy") else None
        if isinstance(source, Tensor) and isinstance(out, Tensor) and source.device.type != out.device.type:
            self.seen.append((source.device.type, out.device.type))
        return out


def on_device(case: Case, placement: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Net, ZerothOrderOptimizer]:
    model = Net().bfloat16().to(DEVICE)
    monkeypatch.setattr(parameters, "check_parameter", lambda p, name: None)  # it refuses tensors without storage
    # The count of skipped steps comes to the host by a CUDA event, in its own time.
    monkeypatch.setattr(ZerothOrderOptimizer, "_remember_skipped", lambda self: None)
    made = {k: v() if callable(v) else v for k, v in case.options.items()}
    return model, getattr(zokern, case.cls)(model, 1e-3, placement=placement, **made)


def loss_of(model: Net) -> Tensor:
    return model(torch.zeros(2, 5, dtype=torch.int64, device=DEVICE)).float().square().mean()


@PLACEMENTS
@pytest.mark.parametrize("case", METHODS.values(), ids=list(METHODS))
def test_an_eager_step_asks_the_device_for_nothing(case: Case, placement: str, monkeypatch) -> None:
    model, opt = on_device(case, placement, monkeypatch)
    with Transfers() as transfers:
        for _ in range(3):
            loss = opt.step(lambda: loss_of(model))
    assert loss.device == DEVICE
    assert set(transfers.seen) == {("cpu", "meta")}


@PLACEMENTS
@pytest.mark.parametrize("case", METHODS.values(), ids=list(METHODS))
def test_a_captured_step_moves_nothing_between_host_and_device(case: Case, placement: str, monkeypatch) -> None:
    if case.remembers:
        pytest.skip("update='adamezo' is refused by GraphedStep")
    model, opt = on_device(case, placement, monkeypatch)
    live = Live(opt.seed, 1, len(opt.schedule(0)), DEVICE)

    def step() -> None:
        live.begin()
        opt.step_live(lambda: loss_of(model), live)

    step()
    step()  # as GraphedStep's warm-up: what is kept on the device is there now
    with Transfers() as transfers:
        step()
    assert transfers.seen == []


def test_a_step_that_waits_is_noticed(monkeypatch) -> None:
    model, opt = on_device(METHODS["mezo"], "shadow", monkeypatch)
    with pytest.raises(RuntimeError, match="meta"):
        opt.step(lambda: float(loss_of(model)))
