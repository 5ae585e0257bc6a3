"""Which blocks a captured step leaves out: a gate for each in device memory, filled before a launch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zokern.passes.update import CPU, Update, sent
from zokern.sweep import Member


@dataclass(frozen=True)
class Gated:
    """Of a sweep over all members, of whose blocks the device alone knows which are open.

    gates: int64 [blocks + 1], 1 for an open block; the last is of what lies outside the blocks, and always open.
    sizes: float64 [R, blocks + 1], on the device: elements of whole tensors by row and block.
    elements, dtypes: by block, of what this rank has. blocks: by row, those that have members of it.
    """

    gates: Tensor
    sizes: Tensor
    elements: Sequence[int]
    dtypes: Sequence[Set[torch.dtype]]
    blocks: Sequence[Set[int]]

    @staticmethod
    def of(gates: Tensor, members: Sequence[Member], blocks: Sequence[int]) -> Gated:
        """blocks: the members' places among the gates."""
        rows = 1 + max(m.row for m in members)
        sizes = torch.zeros(rows, len(gates), dtype=torch.float64, device=CPU)
        elements, dtypes = [0] * len(gates), [set[torch.dtype]() for _ in gates]
        of_rows = [set[int]() for _ in range(rows)]
        for m, block in zip(members, blocks, strict=True):
            sizes[m.row, block] += m.held.numel()
            elements[block] += m.param.numel()
            of_rows[m.row].add(block)
            if m.param.numel():
                dtypes[block].add(m.param.dtype)
        return Gated(gates, sent(sizes, gates.device), elements, dtypes, of_rows)

    def rows(self, dropped: Collection[int]) -> tuple[int, ...] | None:
        """Those that an eager step has which leaves out `dropped`, in its order; None for all."""
        seen = tuple(r for r, blocks in enumerate(self.blocks) if not blocks <= set(dropped))
        return None if len(seen) == len(self.blocks) else seen

    def cost(self, cost: Mapping[str, int], dropped: Collection[int]) -> dict[str, int]:
        """What an eager step that leaves out `dropped` adds to the counters, where this one has counted `cost`."""
        seen = [i for i in range(len(self.elements)) if i not in dropped]
        passes = cost["elements_moved"] // sum(self.elements), cost["launches"] // len(set().union(*self.dtypes))
        return {
            **cost,
            "elements_moved": passes[0] * sum(self.elements[i] for i in seen),
            "launches": passes[1] * len(set().union(*(self.dtypes[i] for i in seen))),
        }

    def of_rows(self) -> Tensor:
        """Elements that the open blocks have of each row, [R]."""
        return (self.sizes * self.gates).sum(dim=1)

    def shares(self) -> Tensor:
        """Of the rows in all elements that the step moves, [R]."""
        rows = self.of_rows()
        return rows / rows.sum().clamp(min=1.0)

    def masked(self, update: Update) -> Update:
        """What an eager step has no row of has no part here, so that no number of it is looked at."""
        seen = self.of_rows() > 0
        coefs = {name: torch.where(seen[:, None], c, 0.0) for name, c in update.coefs.items()}
        return replace(
            update, coefs=coefs, shared={**update.shared, "decay": torch.where(seen, update.shared["decay"], 1.0)}
        )
