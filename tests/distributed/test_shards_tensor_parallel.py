"""Tensor parallel, alone and under FSDP2, and pipeline stages: losses near a whole model's, updates with its bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import zokern
from tests.distributed.ranks import build_alone, run
from tests.distributed.test_shards_fsdp import compared
from tests.methods import METHODS, given, scripted
from tests.models import WORDS, seeded, tokens

WIDTH = 8


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 12)
        self.down = nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Network(nn.Module):
    """Sizes that two ranks share evenly, but for the words: sequence parallel wants that of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words[None])
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(self.norm(x))[0].double(), words.roll(1))


def network(dtype: torch.dtype) -> Any:
    return seeded(Network, dtype, 0.3)


def parallel(model: Any, mesh: DeviceMesh) -> None:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    parallelize_module(
        model,
        mesh,
        {
            "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        },
    )
    for layer in model.layers:
        plan = {
            "norm": SequenceParallel(),
            "up": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
            "down": RowwiseParallel(output_layouts=Shard(1)),
        }
        parallelize_module(layer, mesh, plan)
        parallelize_module(layer, mesh, {"up": ColwiseParallel()})


def tensor_parallel(model: Any) -> None:
    parallel(model, init_device_mesh("cpu", (torch.distributed.get_world_size(),)))


def both(model: Any) -> None:
    """FSDP2 over tensor parallel."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallel(model, mesh["tensor"])
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])


def replicated(model: Any) -> None:
    """Shards of two ranks each, twice."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def runs(
    shard: Any, names: list[str], dtype: torch.dtype, placements: list[str], options: dict[str, Any] | None = None
) -> list[str]:
    found = []
    for name in names:
        for placement in placements:
            wrong = compared(METHODS[name], shard, network, dtype, placement=placement, **(options or {}))
            found += [f"{name} {placement}: {one}" for one in wrong]
    return found


ALL = ["inplace", "shadow", "stream"]


def test_tensor_parallel() -> None:
    assert run(2, runs, tensor_parallel, ["mezo-adam", "hizoo"], torch.float32, ALL) == [[]] * 2


def test_tensor_parallel_with_sixteen_bits_and_low_rank() -> None:
    # Partial sums are rounded to 16 bits before they are added.
    options = {
        "rel": torch.finfo(torch.bfloat16).eps,
        "distribution": zokern.LowRank(2),
        "layers": zokern.RandomBlocks(1),
    }
    assert run(2, runs, tensor_parallel, ["mezo-momentum"], torch.bfloat16, ["auto", "shadow"], options) == [[]] * 2


def test_copies_that_are_filled_ahead() -> None:
    options = {"pipelined": True}
    found = run(2, runs, tensor_parallel, ["mezo"], torch.float32, ["shadow", "stream"], options)
    assert found == [[]] * 2


@pytest.mark.parametrize("shard", [both, replicated], ids=lambda shard: shard.__name__)
def test_meshes_of_two_dimensions(shard: Any) -> None:
    assert run(4, runs, shard, ["mezo-adam"], torch.float32, ALL) == [[]] * 4


# ------------------------------------------------------------------------------------------------------ pipeline stages


class Stage(nn.Module):
    """A rank's part of a network, out of the whole one's modules."""

    def __init__(self, whole: Any, rank: int) -> None:
        super().__init__()
        self.inner = nn.ModuleList([whole.layers[rank]])
        self.embedding = whole.embedding if rank == 0 else None
        self.norm, self.head = (whole.norm, whole.head) if rank == 1 else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        x = self.inner[0](x)
        return x if self.head is None else self.head(self.norm(x))


def stage_of(dtype: torch.dtype, rank: int) -> tuple[Any, Stage]:
    """The whole network, whose other stage has no memory here."""
    full, whole = network(dtype), network(dtype).to("meta")
    stage = Stage(whole, rank).to_empty(device="cpu")
    own = dict(full.named_parameters())
    with torch.no_grad():
        for name, p in whole.named_parameters():
            if not p.is_meta:
                p.copy_(own[name])
    return whole, stage


def stages(dtype: torch.dtype, placement: str, layers: bool) -> list[bool]:
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    rank, case = torch.distributed.get_rank(), METHODS["mezo-adam"]
    whole, stage = stage_of(dtype, rank)
    other = network(dtype)
    options = {"layers": zokern.RandomBlocks(1)} if layers else {}
    mine = [(name, p) for name, p in whole.named_parameters() if not p.is_meta]
    opt = build_alone(case, mine, module=whole, placement=placement, **options)
    theirs = build_alone(
        case, other, placement=placement, **{**options, **({"layers": zokern.RandomBlocks(1)} if layers else {})}
    )
    schedule = ScheduleGPipe(PipelineStage(stage, rank, 2, torch.device("cpu")), 2, loss_fn=entropy)
    seen: list[float] = []
    wanted: list[float] = []

    def loss(words: Tensor) -> Tensor:
        losses: list[Tensor] = []
        schedule.eval(*((words.view(2, -1),) if rank == 0 else ()), target=words.view(2, -1), losses=losses)
        every = torch.stack(losses).mean() if rank == 1 else torch.zeros((), dtype=torch.float64)
        torch.distributed.broadcast(every, 1)
        return every

    def closure(step: int, run_it: Any, into: list[float]) -> Any:
        losses = scripted(given(case, step))

        def call() -> Tensor:
            into.append(float(run_it(tokens(step))))
            return losses()

        return call

    for step in range(3):
        opt.step(closure(step, loss, seen))
        theirs.step(closure(step, lambda words: whole_loss(other, words), wanted))
    named = dict(other.named_parameters())
    return [seen == pytest.approx(wanted, rel=1e-6), *(torch.equal(p, named[name]) for name, p in mine)]


def whole_loss(model: Any, words: Tensor) -> Tensor:
    """The mean over two micro-batches of one sentence."""
    losses = []
    for sentence in words.view(2, 1, -1):
        x = model.embedding(sentence)
        for layer in model.layers:
            x = layer(x)
        losses.append(entropy(model.head(model.norm(x)), sentence))
    return torch.stack(losses).mean()


def entropy(out: Tensor, words: Tensor) -> Tensor:
    return nn.functional.cross_entropy(out.double().flatten(0, 1), words.flatten().roll(1))


@pytest.mark.parametrize("placement", ALL)
def test_pipeline_stages_with_the_whole_model_s_ids(placement: str) -> None:
    for layers in (False, True):
        for found in run(2, stages, torch.float32, placement, layers):
            assert found == [True] * len(found)
