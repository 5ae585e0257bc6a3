"""Ranks that are not where the others are, and meshes in another order than torch's."""

from __future__ import annotations

import torch
import torch.distributed as dist

import zokern
from tests.distributed.ranks import run
from tests.distributed.test_ranks import both, directions_step
from tests.models import small


def on_a_mesh_out_of_order() -> tuple[bool, list[int]]:
    mesh = torch.distributed.device_mesh.DeviceMesh("cpu", torch.tensor([2, 0, 1]), mesh_dim_names=("directions",))
    same, _ = both("es", torch.float32, {"placement": "shadow"}, directions_step, process_group=mesh)
    opt = zokern.MeZO(small(), 1e-2, process_group=mesh)
    opt.wait_for_ranks()
    return same, opt._ranks.exchange.objects(dist.get_rank())


def test_a_mesh_out_of_order() -> None:
    assert run(3, on_a_mesh_out_of_order) == [(True, [2, 0, 1])] * 3
