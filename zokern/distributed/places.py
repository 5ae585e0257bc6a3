"""Which part of the work is whose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


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
