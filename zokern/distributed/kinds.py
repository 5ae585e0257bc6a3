"""What the settings process_group and parallel may be."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from zokern.kinds import Kind

PARALLEL = ("data", "directions")


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
