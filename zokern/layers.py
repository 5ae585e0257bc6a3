"""The transformer blocks of a model, and LeZO's draw of those that a step leaves out (Wang et al. 2024, arXiv 2410.09823).

Blocks are found by structure: the entries of every outermost nn.ModuleList of two or more modules of one class that
holds its share of the weights (an encoder-decoder has two such stacks). Parameters outside all blocks are always
active. The subset is a pure function of (run seed, step), so a replay finds it again.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import Tensor, nn

from zokern import _checks
from zokern.contract.streams import LAYERS_STREAM, derive_seed, splitmix64


def find_blocks(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, block) for each transformer block of `module`, in order; empty where there are none."""
    stacks: list[tuple[str, nn.ModuleList]] = []
    outer: list[str] = []  # the outermost lists hold the blocks; lists inside blocks hold experts and the like
    for name, child in module.named_modules():
        prefix = f"{name}." if name else ""
        if not isinstance(child, nn.ModuleList) or any(name.startswith(p) for p in outer):
            continue
        outer.append(prefix)
        if len(child) >= 2 and len({type(block) for block in child}) == 1:
            stacks.append((prefix, child))
    if not stacks:
        return []
    # Experts, projections and the like also come as lists: a stack of blocks is one that holds much of the weights.
    sizes = [sum(p.numel() for p in stack.parameters()) for _, stack in stacks]
    return [
        (f"{prefix}{i}", block)
        for (prefix, stack), size in zip(stacks, sizes, strict=True)
        if 2 * size * len(stacks) >= sum(sizes)
        for i, block in enumerate(stack)
    ]


def draw(run_seed: int, step: int, num_dropped: int, num_blocks: int) -> set[int]:
    """LeZO's subset of a step: the first entries of a Fisher-Yates shuffle of the blocks' numbers."""
    state = derive_seed(run_seed, step, LAYERS_STREAM)
    order = list(range(num_blocks))
    for i in range(num_dropped):
        # The modulo's bias is below count / 2^64.
        j = i + splitmix64(state, i + 1) % (num_blocks - i)
        order[i], order[j] = order[j], order[i]
    return set(order[:num_dropped])


@dataclass
class RandomBlocks:
    """Each step leaves out `num_dropped` blocks, drawn without replacement: no pass touches them in that step.

    Args:
        num_dropped: 0 .. number of blocks; published main setting about 75 % of them.
        blocks: the names of the blocks, where `find_blocks` does not find the right ones.

    Raises:
        ValueError: when the module has no blocks, a name is unknown, or num_dropped is out of range.
    """

    num_dropped: int
    blocks: list[str] | None = None
    _block_of: dict[int, int] = field(default_factory=dict, repr=False)
    names: list[str] = field(default_factory=list, repr=False)

    def bind(self, module: nn.Module | None) -> None:
        """Finds the blocks of `module`; called by the optimizer's constructor."""
        if module is None:
            raise ValueError(
                "layers needs the module to find its blocks in: pass the nn.Module instead of its parameters"
            )
        if self.blocks is None:
            found = find_blocks(module)
            if not found:
                raise ValueError(
                    f"layers: {type(module).__name__} has no nn.ModuleList of equal blocks; name them, for example "
                    "RandomBlocks(num_dropped, blocks=['encoder.0', 'encoder.1'])"
                )
        else:
            named = dict(module.named_modules())
            for name in self.blocks:
                if name not in named:
                    raise ValueError(f"layers: the module has no submodule {name!r}")
                others = list(self.blocks)
                others.remove(name)
                if any(f"{name}.".startswith(f"{other}.") for other in others):
                    raise ValueError(f"layers: block {name!r} is named twice, or lies in another block that is named")
            found = [(name, named[name]) for name in self.blocks]
        _checks.check_integer(self.num_dropped, "num_dropped", 0, len(found))
        self.names = [name for name, _ in found]
        self._block_of = {id(p): i for i, (_, block) in enumerate(found) for p in block.parameters()}

    def bind_again(self, module: nn.Module) -> None:
        """Its parameters have changed: the blocks have to be those that they were.

        Raises:
            RuntimeError: for other blocks.
        """
        fresh = RandomBlocks(self.num_dropped, self.blocks)
        try:
            fresh.bind(module)
        except (TypeError, ValueError) as error:
            raise RuntimeError(f"the module has changed: {error}; make a new optimizer") from error
        if fresh.names != self.names:
            raise RuntimeError(
                f"the module's blocks were {self.names} and are {fresh.names}; make a new optimizer after changing them"
            )
        self._block_of = fresh._block_of

    def dropped(self, run_seed: int, step: int) -> set[int]:
        """The numbers of the blocks that `step` leaves out."""
        return draw(run_seed, step, self.num_dropped, len(self.names))

    def block_of(self, param: Tensor) -> int | None:
        """The number of the block that holds a parameter; None outside the blocks."""
        return self._block_of.get(id(param))

    def is_active(self, param: Tensor, dropped: Collection[int]) -> bool:
        return self.block_of(param) not in dropped
