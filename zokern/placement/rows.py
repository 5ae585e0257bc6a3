"""Which rows of a batch belong to which direction, while many directions run in one forward.

A batch is repeated N times along its first dimension, so the rows of a tensor that was computed from it are N blocks of
equal size, and block k sees direction k. A tensor whose first dimension is a multiple of the batch's is taken for such
rows, and any other is shared by all blocks. As both may agree by chance (positions [T] where T is N times the batch), a
first forward with a single block tells: what then is an N-th as long is rows, and what is as long is shared.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import Tensor


class NotInBlocks(Exception):
    """What a closure does cannot be done for all directions in one forward: they are evaluated one after another."""


class Rows:
    """Of a forward. count: of blocks, N. batch: rows of a block's batch. used: parameters that something was computed with;
    half: in 16 bits, as autocast has it. kinds: by use (the parameter, the function, which argument), whether what came
    there was rows, shared, or both. alone: the first dimensions that came there in a forward with one block."""

    def __init__(self, count: int, kinds: dict[Hashable, set[bool]] | None = None) -> None:
        self.count, self.batch = count, 1
        self.kinds: dict[Hashable, set[bool]] = {} if kinds is None else kinds
        self.alone: dict[Hashable, set[int]] = {}
        self.learning = kinds is None
        self.used: set[str] = set()
        self.half = False

    def are(self, x: Tensor, use: tuple[Hashable, ...]) -> bool:
        """Whether x is rows: a multiple of those of all blocks, N parts of equal length."""
        return self.have(x.shape, use)

    def have(self, shape: Sequence[int], use: tuple[Hashable, ...]) -> bool:
        """Whether a tensor of this shape would be."""
        size = shape[0] if shape else 0
        use = (*use, len(shape))
        if self.count == 1:
            self.alone.setdefault(use, set()).add(size)
            return size > 0 and size % self.batch == 0
        may_be = size > 0 and size % (self.count * self.batch) == 0
        if self.learning:
            return self._learn(use, size, may_be)
        known = self.kinds.get(use)
        if known is None:
            if size > 1:
                raise NotInBlocks(f"{use[0]} is used by {use[1]}, and was not while that was tested")
            return may_be
        if may_be and len(known) == 2:
            raise NotInBlocks(
                f"{use[0]} is used by {use[1]} with rows of the batch and with others, which cannot be told apart"
            )
        if known == {True} and not may_be and size > 1:
            raise NotInBlocks(
                f"{use[0]} is used by {use[1]} with {size} rows, no multiple of {self.count * self.batch}"
            )
        return may_be and True in known

    def _learn(self, use: Hashable, size: int, may_be: bool) -> bool:
        before, known = self.alone.get(use, set()), self.kinds.setdefault(use, set())
        if may_be and size in before and (size // self.count not in before or known == {False}):
            may_be = False
        if size > 1 or may_be:
            known.add(may_be)
        return may_be
