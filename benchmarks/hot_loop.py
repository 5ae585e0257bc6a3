"""Counts the hot loop of a kernel: the loop with the widest global stores, on the way that an ordinary iteration takes.

That way neither enters an inner loop nor touches memory in narrower pieces (masked slow paths), and where a kernel
decides at run time it draws normals, writes every state and rounds to nearest. An inner loop is the loop over further
seeds. Instructions of the uniform datapath take issue slots like any other. Chains have other loops: chain_loop.py.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter

from sass import Block, Instruction, Loop, code_of, conversions, ffma, find_loops


@dataclasses.dataclass
class Report:
    """One kernel's costs. Slots are issued instructions per element; None where there is no such loop."""

    name: str
    arch: int
    registers: int
    stack_bytes: int
    spills: int  # loads and stores of local memory, anywhere in the kernel
    elements_per_iteration: int
    slots_per_element_k1: float | None
    slots_per_extra_seed: float | None
    barriers_in_loop: int
    global_bytes_in_loop: list[int]  # of each access on the hot path
    pipes: dict[str, int]  # instructions on the hot path
    pipes_extra_seed: dict[str, int]
    per_element: dict[str, float]  # instructions by pipe, for one seed; together slots_per_element_k1
    extra_per_element: dict[str, float]  # the same of a further seed
    # Of chains alone, whose other figures are those of a stage: the tile's loop around the stages, and a stage with
    # stochastic rounding.
    once_per_element: dict[str, float] | None = None
    stochastic_per_element: dict[str, float] | None = None


def path(
    blocks: list[Block], loop: Loop, without: set[int], passing: frozenset[int] | set[int] = frozenset()
) -> list[Instruction]:
    """Code of the way round the loop, avoiding the blocks `without`, that an ordinary iteration takes.

    Through the blocks `passing`, those of inner loops, it goes without counting them and without going round.

    It is that with the most normals (rather than signs), then the most stored (every state), then, in loops without
    normals, the most arithmetic (a guard for "no seeds" jumps over it), then the shortest (no fix-ups, and no stochastic
    rounding where that is asked at run time).
    """
    has_normals = conversions(code_of(blocks, loop.blocks)) > 0

    @functools.cache
    def best(block: int) -> tuple[tuple[int, int, int, int], tuple[int, ...]] | None:
        code = [] if block in passing else code_of(blocks, [block])
        stored = sum(i.global_bytes for i in code if i.opcode.startswith("STG"))
        arithmetic = 0 if has_normals else sum(i.fp32_results for i in code)
        following: list[tuple[tuple[int, int, int, int], tuple[int, ...]]] = (
            [((0, 0, 0, 0), ())] if loop.header in blocks[block].successors else []
        )
        for successor in blocks[block].successors:
            again = block in passing and successor <= block
            if successor in loop.blocks and successor != loop.header and successor not in without and not again:
                following += [way for way in [best(successor)] if way is not None]
        if not following:
            return None
        (normals, more_stored, more, length), rest = max(following)
        cost = normals + conversions(code), more_stored + stored, more + arithmetic, length - len(code)
        return cost, (block, *rest)

    way = None if loop.header in without else best(loop.header)
    return code_of(blocks, [block for block in way[1] if block not in passing]) if way else []


@dataclasses.dataclass
class HotLoop:
    """A loop that stores elements: the code of its path, and of the loop over seeds inside it, if any."""

    store_width: int
    stored_bytes: int  # in an iteration
    code: list[Instruction]
    inner: list[Instruction]

    @property
    def inner_elements(self) -> float:
        """Elements of an iteration of the inner loop, which may be unrolled, counted by their noise: three conversions
        make two normals; a sign costs one fused multiply-add in a rule without sums."""
        return conversions(self.inner) * 2 / 3 or ffma(self.inner)

    @property
    def extra(self) -> float:
        """Slots per element of one seed in the inner loop."""
        return len(self.inner) / self.inner_elements

    @property
    def extra_per_element(self) -> dict[str, float]:
        return {pipe: n / self.inner_elements for pipe, n in Counter(i.pipe for i in self.inner).most_common()}

    def per_element(self, stored_size: int) -> dict[str, float]:
        """Instructions per element by pipe, for one seed. It runs in the inner loop unless it is peeled off."""
        elements = self.stored_bytes // stored_size
        counts = Counter({pipe: n / elements for pipe, n in Counter(i.pipe for i in self.code).items()})
        noise = conversions if conversions(self.inner) else ffma
        if noise(self.code) < noise(self.inner) / 2:
            inner_elements = len(self.inner) / self.extra
            counts.update({pipe: n / inner_elements for pipe, n in Counter(i.pipe for i in self.inner).items()})
        return dict(counts.most_common())

    def slots(self, stored_size: int) -> float:
        """Slots per element for one seed."""
        return math.fsum(self.per_element(stored_size).values())


def _hot_loops(blocks: list[Block]) -> list[HotLoop]:
    """The loops with the widest stores, and most of them: several where a kernel has one for each kind of pass."""
    loops, found = find_loops(blocks), []
    for loop in loops:
        within = [other for other in loops if other.blocks < loop.blocks]
        inside = set().union(*(other.blocks for other in within))
        stores = [i.global_bytes for i in code_of(blocks, loop.blocks - inside) if i.opcode.startswith("STG")]
        wide = max(stores, default=0)
        narrow = {b for b in loop.blocks if any(0 < i.global_bytes < wide for i in _element_accesses(blocks[b].code))}
        code = path(blocks, loop, inside | narrow)
        if not code:  # no way leads past the loop over seeds: there is at least one
            code = path(blocks, loop, narrow - inside, inside)
        stored = sum(i.global_bytes for i in code if i.opcode.startswith("STG"))
        # The loop over seeds; of two, the shorter is that over the seeds whose keys are ready.
        inner = max((path(blocks, other, set()) for other in within), key=lambda c: (ffma(c), -len(c)), default=[])
        if stored:
            found.append(HotLoop(wide, stored, code, inner if ffma(inner) else []))
    best = max(((h.store_width, h.stored_bytes) for h in found), default=None)
    found = [h for h in found if (h.store_width, h.stored_bytes) == best]
    for noise in (conversions, ffma):  # a loop of its own for "no seeds" is not hot
        if noisy := [h for h in found if noise(h.code + h.inner)]:
            return noisy
    return found


def count_spills(blocks: list[Block]) -> int:
    """Loads and stores of local memory."""
    return sum(bool(re.match(r"LDL|STL", i.opcode)) for i in code_of(blocks, range(len(blocks))))


def analyse(name: str, arch: int, blocks: list[Block], stored_size: int, registers: int, stack_bytes: int) -> Report:
    """Finds the hot loop of one kernel, which stores `stored_size` bytes for an element, and counts it."""
    spills = count_spills(blocks)
    hot = _hot_loops(blocks)
    if not hot:
        return Report(name, arch, registers, stack_bytes, spills, 0, None, None, 0, [], {}, {}, {}, {})
    one = min(hot, key=lambda h: h.slots(stored_size))
    more = min((h for h in hot if h.inner), key=lambda h: h.extra, default=None)
    extra_code = more.inner if more else []
    return Report(
        name, arch, registers, stack_bytes, spills, one.stored_bytes // stored_size, one.slots(stored_size),
        more.extra if more else None,
        barriers_in_loop=sum(i.pipe == "barrier" for i in one.code + extra_code),
        global_bytes_in_loop=[i.global_bytes for i in one.code if i.global_bytes],
        pipes=dict(Counter(i.pipe for i in one.code).most_common()),
        pipes_extra_seed=dict(Counter(i.pipe for i in extra_code).most_common()),
        per_element=one.per_element(stored_size),
        extra_per_element=more.extra_per_element if more else {},
    )  # fmt: skip


def _element_accesses(code: list[Instruction]) -> list[Instruction]:
    """Stores, and loads that are narrower than a word: other loads may fetch seeds and coefficients."""
    return [i for i in code if i.opcode.startswith("STG") or i.global_bytes < 4]
