"""Who takes part in a run, and which part of the work is whose: from a process group, a DeviceMesh, a DDP wrapper, or the
meshes of the parameters."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from zokern.kinds import Kind
from zokern.parts import is_dtensor
from zokern.placement import fsdp

PARALLEL = ("data", "directions")


def initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


class GroupKind(Kind):
    """A process group, a DeviceMesh, "auto", or None for independent runs."""

    def check(self, value: Any, name: str) -> Any:
        if value is None or value == "auto" or is_group(value) or is_mesh(value):
            return value
        if dist.is_available() and type(value) is int and value == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                f"{name} is what new_group() returns outside of the group, and this is rank {dist.get_rank()}: give each "
                "rank a group that it is in, or None"
            )
        got = repr(value) if isinstance(value, str | bool | int | float) else f"a {type(value).__name__}"
        raise TypeError(
            f"{name} is {got}; it must be 'auto', a process group, a DeviceMesh, or None for independent runs"
        )

    @property
    def in_words(self) -> str:
        return "'auto', a process group, a DeviceMesh, or None for independent runs"


class ParallelKind(Kind):
    """ "data", "directions", or one of them for each dimension of a mesh; on the command line with a comma between."""

    def check(self, value: Any, name: str) -> str | tuple[str, ...]:
        names = (value,) if isinstance(value, str) else value
        if not isinstance(names, tuple | list) or not names or any(one not in PARALLEL for one in names):
            raise ValueError(
                f"{name} is {value!r}; it must be 'data' or 'directions', or a tuple of these, one for each dimension of "
                "the mesh given as process_group"
            )
        return value if isinstance(value, str) else tuple(names)

    @property
    def allowed(self) -> str:
        return "data, directions"

    @property
    def in_words(self) -> str:
        return "data, directions, or one of them for each dimension of a DeviceMesh"


def is_group(value: object) -> bool:
    return dist.is_available() and isinstance(value, dist.ProcessGroup)


def is_mesh(value: object) -> bool:
    return dist.is_available() and isinstance(value, torch.distributed.device_mesh.DeviceMesh)


@dataclass(frozen=True)
class Places:
    """ranks: those that take part, by their numbers in the whole job; numbers are added in this order. me: this process'
    place among them. data: of each place, its part of the batch. share: of each, its share of a round's directions, of
    `shares`. counts: whether a place's losses count: of ranks that share a forward (tensor parallel) one does. parent: the
    group that they come from, None for the whole job. sharded: whether ranks hold parts of the weights. source: in words.
    """

    ranks: tuple[int, ...]
    me: int
    data: tuple[int, ...]
    share: tuple[int, ...]
    counts: tuple[bool, ...]
    source: str
    parent: Any = None
    sharded: bool = False

    @property
    def shares(self) -> int:
        return max(self.share) + 1

    @property
    def size(self) -> int:
        return len(self.ranks)

    def named(self, place: int) -> str:
        return f"rank {self.ranks[place]}"

    def backend(self, device: str) -> str | None:
        """What moves tensors on devices of this type between the ranks; None where nothing does."""
        group = dist.group.WORLD if self.parent is None else self.parent
        found = dist.distributed_c10d._get_default_group() if group is None else group
        config = dist.BackendConfig(dist.get_backend_config(found))  # type: ignore[arg-type]
        return config.get_device_backend_map().get(device)

    def describe(self) -> str:
        """For people, once."""
        parts, shares = max(self.data) + 1, self.shares
        what = [
            f"{parts} parts of each batch" if parts > 1 else "",
            f"{shares} shares of the directions" if shares > 1 else "",
        ]
        return f"{self.size} ranks train one model ({self.source}): {' and '.join(filter(None, what)) or 'one forward'}"


def wrapper(module: object) -> Any:
    """The DistributedDataParallel that a module is; None for any other."""
    if initialised() and isinstance(module, nn.parallel.DistributedDataParallel):
        return module
    return None


def wrapper_within(module: nn.Module | None) -> Any:
    """The DistributedDataParallel in a module, if there is one."""
    if module is None or not initialised():
        return None
    return next((one for one in module.modules() if isinstance(one, nn.parallel.DistributedDataParallel)), None)


def find(group: Any, parallel: Any, wrapped: Any, module: nn.Module | None, params: Iterable[Any]) -> Places | None:
    """Who takes part: None for this process alone.

    group, parallel: the settings. wrapped: the DDP wrapper that the optimizer was given, if it was.

    Raises:
        RuntimeError: where several ranks run and nothing says whether they train one model.
        ValueError: for settings that do not go together, and for a group or a mesh that this rank is not in.
    """
    if group is None:
        if parallel is not None:
            raise ValueError(
                f"process_group is None, for runs that do not know each other, and parallel is {parallel!r}; leave one out"
            )
        return None
    if not initialised():
        _check_alone(group)
        return None
    sharded = [p for p in params if is_dtensor(p)]
    if is_mesh(group):
        return _of_mesh(group, parallel, sharded, module)
    if isinstance(parallel, tuple):
        if len(parallel) > 1:
            raise ValueError(
                f"parallel is {parallel!r}, one for each dimension of a mesh, and process_group is no DeviceMesh; give "
                "the mesh"
            )
        parallel = parallel[0]
    if is_group(group):
        return _of_group(group, parallel, "process_group")
    wrapped = wrapped or wrapper_within(module)
    if wrapped is not None:
        _check_wrapper(wrapped, parallel)
        return _of_group(wrapped.process_group, parallel, "the DDP wrapper's group")
    if sharded:
        return _of_shards(sharded, module, parallel)
    if dist.get_world_size() == 1:
        return None
    if parallel is not None:
        return _of_group(None, parallel, "all ranks of the job")
    raise RuntimeError(
        f"this is rank {dist.get_rank()} of {dist.get_world_size()}, and nothing says whether the ranks train one model: "
        "give parallel='data' (each rank its own part of the batch), parallel='directions' (the same batch, each rank a "
        "share of the directions), a process_group, or process_group=None for independent runs. A model in "
        "DistributedDataParallel says it too, if the optimizer is given the wrapper"
    )


def _check_alone(group: Any) -> None:
    """One process, unless a launcher has started several."""
    world = os.environ.get("WORLD_SIZE", "1")
    if group == "auto" and world.isdigit() and int(world) > 1 and "RANK" in os.environ:
        raise RuntimeError(
            f"WORLD_SIZE is {world}, so this is one of several processes, and torch.distributed is not initialised, so "
            "they would train apart: call torch.distributed.init_process_group() before the optimizer is made, or give "
            "process_group=None for independent runs"
        )
    if group != "auto":
        raise RuntimeError(
            "process_group is given, and torch.distributed is not initialised: init_process_group() first"
        )


def _of_group(group: Any, parallel: str | None, source: str) -> Places | None:
    ranks = tuple(range(dist.get_world_size())) if group is None else tuple(dist.get_process_group_ranks(group))
    if dist.get_rank() not in ranks:
        raise ValueError(
            f"process_group has the ranks {list(ranks)}, and this is rank {dist.get_rank()}: give each rank a group that "
            "it is in, or None"
        )
    size = len(ranks)
    if size == 1:
        return None
    one, each = (0,) * size, tuple(range(size))
    shared = parallel == "directions"
    return Places(
        ranks,
        ranks.index(dist.get_rank()),
        one if shared else each,
        each if shared else one,
        (True,) * size,
        source,
        group,
    )


def _of_mesh(mesh: Any, parallel: Any, sharded: Sequence[Any], module: nn.Module | None) -> Places | None:
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


def _check_wrapper(wrapped: Any, parallel: str | None) -> None:
    if parallel == "directions" and wrapped.broadcast_buffers and any(True for _ in wrapped.module.buffers()):
        raise ValueError(
            "parallel is 'directions', where ranks do different numbers of forwards, and the DDP wrapper sends its buffers "
            "round in each forward: make it with broadcast_buffers=False, or give the optimizer the bare module and "
            "process_group"
        )


SHARED = (
    "in which the parameters are sharded: its ranks do each forward together, and cannot do different ones; give a "
    "DeviceMesh as process_group that has a dimension of whole replicas"
)


def _of_shards(params: Sequence[Any], module: nn.Module | None, parallel: str | None) -> Places | None:
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
    found = _of_mesh(mesh, "data", params, module)
    return None if found is None else dataclasses.replace(found, source=f"the sharded parameters' mesh: {found.source}")


def _root_of(mesh: Any) -> Any:
    """The mesh that a mesh is a part of."""
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    return dist.device_mesh._mesh_resources.get_root_mesh(mesh)  # torch before 2.8


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
