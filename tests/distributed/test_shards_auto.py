"""Which ranks of a mesh have a part of the batch of their own, found from the parameters: whose losses count."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import zokern
from tests.distributed.ranks import build_alone, run
from tests.distributed.test_shards_fsdp import nested, same, seeing, untied
from tests.distributed.test_shards_tensor_parallel import both, network, replicated, stage_of, tensor_parallel
from tests.methods import METHODS, build, given
from tests.models import tokens
from zokern.optim.losses import Losses


def losses_of(rank: int, step: int) -> list[float]:
    return given(METHODS["mezo"], 100 * rank + step)


def as_micro_batches(shard: Any, make: Any, counting: list[int], dtype: torch.dtype) -> bool:
    """Each rank has its own losses; one process with the whole model gets those of the counting ranks as micro-batches."""
    case = METHODS["mezo-adam"]
    model, other = make(dtype), make(dtype)
    shard(model)
    exact = "inplace" if dtype == torch.float32 else "shadow"
    opt, theirs = build(case, model), build_alone(case, other, placement=exact)
    for step in range(3):
        own = losses_of(dist.get_rank(), step)
        scripts = [iter(losses_of(rank, step)) for rank in counting]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt.step(seeing(model, step, own, []))
            theirs.step(lambda script: torch.tensor(next(script), dtype=torch.float64), scripts)
    return same(model, other)


@pytest.mark.parametrize(
    ("shard", "make", "world", "counting"),
    [
        (nested, untied, 3, [0, 1, 2]),
        (replicated, network, 4, [0, 1, 2, 3]),
        (tensor_parallel, network, 2, [0]),
        (both, network, 4, [0, 2]),
    ],
    ids=["FSDP2", "replicas of shards", "tensor parallel", "FSDP2 over tensor parallel"],
)
def test_whose_losses_count(shard: Any, make: Any, world: int, counting: list[int]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert all(run(world, as_micro_batches, shard, make, counting, dtype))


def no_directions() -> list[str]:
    told = []
    for shard, make in ((nested, untied), (tensor_parallel, network)):
        model = make(torch.float32)
        shard(model)
        with pytest.raises(ValueError, match="parallel") as error:
            zokern.MeZO(model, 1e-3, parallel="directions")
        told.append(str(error.value))
    return told


def test_ranks_that_share_a_forward_cannot_share_out_directions() -> None:
    for told in run(2, no_directions):
        assert all("its ranks do each forward together, and cannot do different ones" in text for text in told)


def on_a_submesh(what: str) -> Any:
    """Shards on one dimension of a mesh; the other one is of replicas, which no parameter tells of."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("directions", "shards"))
    model = untied(torch.bfloat16)
    own = mesh["shards"]
    if what == "apart":
        halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        own = DeviceMesh.from_group(halves[dist.get_rank() // 2], "cpu")
    for layer in model.layers:
        fully_shard(layer, mesh=own)
    fully_shard(model, mesh=own)
    if what == "apart":
        with pytest.raises(RuntimeError) as error:
            zokern.MeZO(model, 1e-3)
        return str(error.value)
    case = METHODS["mezo"]
    whole = {"process_group": mesh} if what == "directions" else {}
    opt = build(case, model, **whole)
    other = untied(torch.bfloat16)
    theirs = build_alone(case, other, placement="shadow")
    for step in range(2):
        d, rank = divmod(dist.get_rank(), 2)
        if what == "directions":  # two probes each, of four; both ranks of a row have a part of the batch
            losses = [losses_of(r, step) for r in range(2)]
            opt.step(seeing(model, step, losses[rank][2 * d : 2 * d + 2], []))
        else:
            losses = [losses_of(r, step) for r in range(4)]
            opt.step(seeing(model, step, losses[dist.get_rank()], []))
        theirs.step(lambda script: torch.tensor(next(script), dtype=torch.float64), [iter(one) for one in losses])
    return same(model, other)


def test_replicas_of_shards_that_only_the_mesh_tells_of() -> None:
    assert run(4, on_a_submesh, "data") == [True] * 4
    assert run(4, on_a_submesh, "directions") == [True] * 4


def test_shards_of_a_part_of_the_job_are_refused_where_nothing_tells_of_the_rest() -> None:
    assert all("has 2 ranks, and the job 4" in text for text in run(4, on_a_submesh, "apart"))


def a_stage_without_a_loss() -> list[bool]:
    """The last stage has the loss, and the other's closure returns None."""
    rank, case = dist.get_rank(), METHODS["mezo-adam"]
    whole, _ = stage_of(torch.float32, rank)
    other = network(torch.float32)
    mine = [(name, p) for name, p in whole.named_parameters() if not p.is_meta]
    opt, theirs = build(case, mine, module=whole, process_group=dist.group.WORLD), build_alone(case, other)
    for step in range(3):
        values, wanted = iter(losses_of(1, step)), iter(losses_of(1, step))
        opt.step(lambda values=values: torch.tensor(next(values), dtype=torch.float64) if rank == 1 else None)
        theirs.step(lambda wanted=wanted: torch.tensor(next(wanted), dtype=torch.float64))
    named = dict(other.named_parameters())
    return [torch.equal(p, named[name]) for name, p in mine]


def test_a_pipeline_s_loss_is_that_of_its_last_stage() -> None:
    for found in run(2, a_stage_without_a_loss):
        assert found == [True] * len(found)


def none_of_a_replica() -> str:
    model = untied(torch.float32)
    opt = zokern.MeZO(model, 1e-3, parallel="data")
    rank = dist.get_rank()
    with pytest.raises((TypeError, zokern.RankError)) as error:
        opt.step(lambda: model(tokens(0)) if rank == 0 else None)
    return str(error.value)


def test_a_replica_has_to_return_its_loss() -> None:
    first, second = run(2, none_of_a_replica)
    assert "rank 1 raised TypeError: closure must return the loss" in first
    assert second.startswith("closure must return the loss")


def test_a_process_alone_has_to_return_a_loss() -> None:
    with pytest.raises(TypeError, match="closure must return the loss"):
        zokern.MeZO(nn.Linear(2, 2), 1e-3).step(lambda: None)
    assert not Losses(lambda: None).partial
