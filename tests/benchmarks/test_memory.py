"""The memory table: its formulas against what models of a small shape have, counted byte for byte, and a measurement."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from multiprocessing import Pipe
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import resident
from benchmarks.memory import formulas, page, run, worker
from benchmarks.memory.shapes import LARGE, SMALL, Shape

pytest.importorskip("transformers")

TIED = Shape(96, 32, 40, 3, 4, 2, tied=True)
UNTIED = Shape(80, 24, 56, 2, 3, 3)
ROWS, LENGTH = 3, 8


def built(shape: Shape, *, lora: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = worker.build(shape).to(dtype)
    if lora:
        pytest.importorskip("peft")
        model = worker.adapted(model)
    return model


@pytest.mark.parametrize("shape", [TIED, UNTIED])
def test_numbers_of_a_shape_are_those_of_its_model(shape: Shape) -> None:
    model = built(shape)
    parameters = list(model.parameters())
    assert shape.parameters == sum(p.numel() for p in parameters)
    assert shape.largest == max(p.numel() for p in parameters)
    blocks = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]  # type: ignore[union-attr]
    assert blocks == [shape.block] * shape.layers
    assert shape.sides == sum(sum(p.shape) for p in parameters if p.dim() == 2)
    assert shape.norms == sum(p.numel() for p in parameters if p.dim() == 1)
    adapter = built(shape, lora=True)
    assert shape.adapter(formulas.RANK) == sum(p.numel() for p in adapter.parameters() if p.requires_grad)


@pytest.mark.parametrize("shape", [*SMALL.values(), *LARGE.values()], ids=[*SMALL, *LARGE])
def test_numbers_of_the_shapes_that_the_page_tells_of(shape: Shape) -> None:
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(dataclasses.replace(shape, layers=2).configuration())
    more = (shape.layers - 2) * shape.block
    assert shape.parameters == sum(p.numel() for p in model.parameters()) + more


def test_smollm2_is_the_largest_that_is_measured() -> None:
    assert SMALL["135M"].parameters == 134_515_008
    assert [round(shape.parameters / 1e9, 1) for shape in LARGE.values()] == [1.2, 6.7, 13.0, 69.0]


def saved_bytes(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Of what a forward keeps, each storage once; weights, buffers and the batch are there anyway."""
    there = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in there:
            kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss()
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize("shape", [TIED, UNTIED])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_counted_to_the_byte(shape: Shape, lora: bool, dtype: torch.dtype) -> None:
    model = built(shape, lora=lora, dtype=dtype)
    loss = worker.closure(model, shape, ROWS, LENGTH)
    assert saved_bytes(model, loss) == formulas.activations(shape, ROWS, LENGTH, dtype.itemsize, lora=lora)


@pytest.mark.parametrize("shape", [TIED, UNTIED])
@pytest.mark.parametrize("lora", [False, True])
def test_gradients_and_moments_are_counted_to_the_byte(shape: Shape, lora: bool) -> None:
    model = built(shape, lora=lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.Adam(trained, 1e-3)
    worker.closure(model, shape, ROWS, LENGTH)().backward()  # type: ignore[no-untyped-call]
    adam.step()
    gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
    moments = sum(s.nbytes for p in trained for s in adam.state[p].values() if s.shape == p.shape)
    count = shape.adapter(formulas.RANK) if lora else shape.parameters
    assert (gradients, moments) == (4 * count, 8 * count)
    without = formulas.activations(shape, ROWS, LENGTH, 4, lora=lora) + formulas.working(shape, ROWS, LENGTH, 4)
    if lora:
        assert formulas.lora_adam(shape, ROWS, LENGTH, 4) == without + gradients + moments + 4 * count
    else:
        ends = gradients + 2 * 4 * shape.largest
        begins = without + 4 * shape.vocabulary * shape.hidden
        assert formulas.full_adam(shape, ROWS, LENGTH, 4) == moments + max(begins, ends)


@pytest.mark.parametrize("shape", [TIED, UNTIED])
def test_what_placements_hold_is_counted(shape: Shape) -> None:
    import zokern
    from zokern.placement import forward, sites, stream

    model = built(shape)
    none = formulas.working(shape, ROWS, LENGTH, 4)
    assert formulas.in_place(shape, ROWS, LENGTH, 4) == none
    assert formulas.stream(shape, ROWS, LENGTH, 4) - none == stream.extra_bytes(model)
    assert formulas.shadow(shape, ROWS, LENGTH, 4) - none == 4 * sum(sites.padded_size(p) for p in model.parameters())
    from zokern.checking.cost import members_of

    optimizer = zokern.MeZO(model, 1e-3, placement="forward", distribution=zokern.LowRank(1))
    placed: Any = optimizer._placement
    held = forward.extra_bytes(placed, members_of(optimizer))
    rounded = held - (formulas.low_rank(shape, ROWS, LENGTH, 4) - none)
    assert 0 <= rounded < 4096  # each factor begins at a round address


@pytest.mark.parametrize("way", formulas.MEASURED)
def test_a_measurement_says_what_is_held_and_what_comes_on_top(way: str) -> None:
    if way == "LoRA, Adam":
        pytest.importorskip("peft")
    here, there = Pipe()
    worker.work(there, torch.get_num_threads(), way, TIED, ROWS, LENGTH)
    found = here.recv()
    assert found.keys() == {"resident", "extra"}
    assert 0 <= found["extra"] < found["resident"]


def test_the_peak_is_of_what_was_held_since_it_was_forgotten() -> None:
    before = resident.settle()
    assert resident.peak() >= before
    held = torch.ones(1 << 24)
    assert resident.peak() - before > 0.9 * held.nbytes
    del held
    assert resident.settle() - before < 1 << 24
    assert resident.peak() - before < 1 << 24


def test_a_system_that_does_not_tell_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(resident, "RESET", tmp_path / "none" / "clear_refs")
    with pytest.raises(resident.NotMeasured, match="run this on Linux, where the process may do so"):
        resident.forget_peak()
    monkeypatch.setattr(resident, "STATUS", tmp_path / "status")
    with pytest.raises(resident.NotMeasured, match="is not there; run this on Linux"):
        resident.peak()


def test_what_is_stored_is_not_measured_again(tmp_path: Any) -> None:
    path = tmp_path / "memory.json"
    assert run.former(path, {"threads": 1}) == {}
    path.write_text('{"settings": {"threads": 1}, "results": {"a": 1}}')
    assert run.former(path, {"threads": 1}) == {"a": 1}
    with pytest.raises(SystemExit, match="give --redo, or another --output"):
        run.former(path, {"threads": 2})


def test_the_page_tells_of_every_way_and_model() -> None:
    told = page.computed()
    assert all(name in told for name in (*LARGE, *page.LABELS.values()))
