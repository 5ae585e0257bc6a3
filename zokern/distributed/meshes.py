"""Who does what on a DeviceMesh: one that was given, or that of sharded parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from zokern.distributed.kinds import PARALLEL
from zokern.distributed.places import Places
from zokern.placement import fsdp

SHARED = (
    "in which the parameters are sharded: its ranks do each forward together, and cannot do different ones; give a "
    "DeviceMesh as process_group that has a dimension of whole replicas"
)


def of_mesh(mesh: Any, parallel: Any, sharded: Sequence[Any], module: nn.Module | None) -> Places | None:
    """Along dimensions in which ranks share a forward (tensor parallel) nothing is shared out, and one of them counts."""
    names = mesh.mesh_dim_names or ()
    if parallel is None:
        kinds = [("directions" if names and names[d] == "directions" else "data") for d in range(mesh.ndim)]
    else:
        kinds = [parallel] * mesh.ndim if isinstance(parallel, str) else list(parallel)
    if len(kinds) != mesh.ndim:
        raise ValueError(
            f"parallel has {len(kinds)} entries, and the mesh given as process_group {mesh.ndim} dimensions; give one "
            "for each"
        )
    ranks = tuple(mesh.mesh.flatten().tolist())
    if dist.get_rank() not in ranks:
        raise ValueError(
            f"process_group is a mesh of the ranks {list(ranks)}, and this is rank {dist.get_rank()}: give each rank a "
            "mesh that it is in, or None"
        )
    split, fully = _cut(mesh, sharded, module)
    for d in split:
        if kinds[d] == "directions":
            raise ValueError(f"parallel is 'directions' for dimension {d} of the mesh, {SHARED}")
    if len(ranks) == 1:
        return None
    joint = split - fully
    along = {kind: [d for d, one in enumerate(kinds) if one == kind and d not in joint] for kind in PARALLEL}
    shape = " x ".join(
        f"{size} {'forward' if d in joint else kinds[d]}" for d, size in enumerate(tuple(mesh.mesh.shape))
    )
    return Places(
        ranks, ranks.index(dist.get_rank()), _numbered(mesh.mesh, along["data"]), _numbered(mesh.mesh, along["directions"]),
        tuple(number == 0 for number in _numbered(mesh.mesh, sorted(joint))), f"a mesh of {shape}", sharded=bool(sharded),
    )  # fmt: skip


def _numbered(mesh: torch.Tensor, dims: Sequence[int]) -> tuple[int, ...]:
    """Of each rank of a mesh, in row-major order: its number along these dimensions."""
    number = torch.zeros(mesh.shape, dtype=torch.int64)
    for d in dims:
        along = torch.arange(mesh.shape[d]).reshape([-1 if i == d else 1 for i in range(mesh.dim())])
        number = number * mesh.shape[d] + along
    return tuple(number.flatten().tolist())


def of_shards(params: Sequence[Any], module: nn.Module | None, parallel: str | None) -> Places | None:
    """From the mesh of sharded parameters, with all dimensions of the mesh that it was cut from. Along those of FSDP, and
    along those in which no parameter is sharded, each rank has its own part of the batch."""
    if parallel == "directions":
        raise ValueError(f"parallel is 'directions', and the mesh of the parameters has dimensions {SHARED}")
    mesh = _root_of(max((p.device_mesh for p in params), key=lambda one: one.ndim))
    if mesh.size() != dist.get_world_size():
        raise RuntimeError(
            f"the mesh of the sharded parameters has {mesh.size()} ranks, and the job {dist.get_world_size()}: what the "
            "others do is not known. Give process_group: a DeviceMesh of all that train one model, or this mesh"
        )
    found = of_mesh(mesh, "data", params, module)
    return None if found is None else dataclasses.replace(found, source=f"the sharded parameters' mesh: {found.source}")


def _root_of(mesh: Any) -> Any:
    """The mesh that a mesh is a part of."""
    return mesh._get_root_mesh()


def _cut(mesh: Any, params: Sequence[Any], module: nn.Module | None) -> tuple[set[int], set[int]]:
    """The dimensions of a mesh along which a parameter is sharded, and those along which FSDP2 shards."""
    split: set[int] = set()
    for p in params:
        for d, placement in zip(_dims(p.device_mesh, mesh), p.placements, strict=True):
            if d is not None and not placement.is_replicate():
                split.add(d)
    fully: set[int] = set()
    for state in fsdp.states_of(fsdp.modules_of(module)) if module is not None else ():
        for group in fsdp.groups_of(state):
            fully |= {d for d in _dims(group.mesh_info.mesh, mesh) if d is not None}
    return split, fully


def _dims(own: Any, mesh: Any) -> list[int | None]:
    """Of each dimension of a mesh, which dimension of another it is; None where it is none of them."""
    if own == mesh:
        return list(range(mesh.ndim))
    names = mesh.mesh_dim_names or ()
    return [names.index(name) if name in names else None for name in own.mesh_dim_names or (None,) * own.ndim]
