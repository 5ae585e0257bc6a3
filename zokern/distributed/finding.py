"""Who takes part in a run, and which part of the work is whose: from a process group, a DeviceMesh, a DDP wrapper, or the
meshes of the parameters."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import nn

from zokern.distributed.kinds import is_group, is_mesh
from zokern.distributed.meshes import of_mesh, of_shards
from zokern.distributed.places import Places
from zokern.parts import is_dtensor


def initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


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
        return of_mesh(group, parallel, sharded, module)
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
        return of_shards(sharded, module, parallel)
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


def _check_wrapper(wrapped: Any, parallel: str | None) -> None:
    if parallel == "directions" and wrapped.broadcast_buffers and any(True for _ in wrapped.module.buffers()):
        raise ValueError(
            "parallel is 'directions', where ranks do different numbers of forwards, and the DDP wrapper sends its buffers "
            "round in each forward: make it with broadcast_buffers=False, or give the optimizer the bare module and "
            "process_group"
        )
