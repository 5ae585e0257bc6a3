"""Counts a kernel's hot loop: the one with the widest global stores, on the way that an ordinary iteration takes.

That way neither enters an inner loop nor touches memory in narrower pieces (masked slow paths), and where a kernel
decides at run time it draws normals, writes every state and rounds to nearest. An inner loop is the loop over further
seeds. Instructions of the uniform datapath take issue slots like any other.

A chain's kernel (csrc/cuda/chain.cu) has, in its loop over tiles with 16-byte stores, a loop over stages, and in that a
loop over seeds for each rule that a stage may have (its own, and the perturbation that goes with it). Counted of a stage
is its own rule with one seed and normals, without the stores of the stage that forks; twice: rounded to nearest, and with
stochastic rounding of weights. An element of a chain of n such stages takes

    once + n * (stage + (seeds - 1) * further seed)        slots.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from typing import Any

from .listing import (
    Block,
    Code,
    Instruction,
    Kernel,
    Loop,
    conversions,
    ffma,
    per_element,
    pipes,
    read_amd,
    stored,
)


@dataclasses.dataclass
class Report:
    """One kernel's costs. Slots are issued instructions per element; None where there is no such loop."""

    name: str
    arch: int
    registers: int
    stack_bytes: int
    spills: int  # loads and stores of local memory, anywhere in the kernel
    elements_per_iteration: int = 0
    slots_per_element_k1: float | None = None
    slots_per_extra_seed: float | None = None
    barriers_in_loop: int = 0
    global_bytes_in_loop: list[int] = dataclasses.field(default_factory=list)  # of each access on the hot path
    pipes: dict[str, int] = dataclasses.field(default_factory=dict)  # instructions on the hot path
    pipes_extra_seed: dict[str, int] = dataclasses.field(default_factory=dict)
    # Instructions by pipe, for one seed, together slots_per_element_k1; and the same of a further seed.
    per_element: dict[str, float] = dataclasses.field(default_factory=dict)
    extra_per_element: dict[str, float] = dataclasses.field(default_factory=dict)
    # Of chains alone, whose other figures are those of a stage: the tile's loop around the stages, and a stage with
    # stochastic rounding.
    once_per_element: dict[str, float] | None = None
    stochastic_per_element: dict[str, float] | None = None


def analyse(name: str, arch: int, kernel: Kernel, stored_size: int, registers: int, stack_bytes: int) -> Report:
    """Counts one kernel, which stores `stored_size` bytes for an element.

    Raises:
        ValueError: where the loops are not those of a chain, which the kernel's name says that it is.
    """
    spills = sum(bool(re.match(r"LDL|STL", i.opcode)) for i in kernel.code())
    if "::chain_kernel<" in name:
        counted = _chain(name, kernel)
    else:
        counted = _pass(_hot_loops(kernel), stored_size)
    return Report(name, arch, registers, stack_bytes, spills, **counted)


# ------------------------------------------------------------------------------------------------------------ a pass


@dataclasses.dataclass
class HotLoop:
    """A loop that stores elements: the code of its path, and of the loop over seeds inside it, if any."""

    store_width: int
    code: Code
    inner: Code

    @property
    def inner_elements(self) -> float:
        """Elements of an iteration of the inner loop, which may be unrolled, counted by their noise: three conversions
        make two normals; a sign costs one fused multiply-add in a rule without sums."""
        return conversions(self.inner) * 2 / 3 or ffma(self.inner)

    @property
    def extra(self) -> float:
        """Slots per element of one seed in the inner loop."""
        return len(self.inner) / self.inner_elements

    def per_element(self, stored_size: int) -> dict[str, float]:
        """Instructions per element by pipe, for one seed. It runs in the inner loop unless it is peeled off."""
        counts = Counter(per_element(self.code, stored(self.code) // stored_size))
        noise = conversions if conversions(self.inner) else ffma
        if noise(self.code) < noise(self.inner) / 2:
            counts.update(per_element(self.inner, self.inner_elements))
        return dict(counts.most_common())

    def slots(self, stored_size: int) -> float:
        """Slots per element for one seed."""
        return math.fsum(self.per_element(stored_size).values())


def _ordinary(kernel: Kernel, loop: Loop, without: set[int], uncounted: set[int] | None = None) -> Code:
    """The way round the loop that an ordinary iteration takes, avoiding the blocks `without`.

    It is that with the most normals (rather than signs), then the most stored (every state), then, in loops without
    normals, the most arithmetic (a guard for "no seeds" jumps over it), then the shortest (no fix-ups, and no stochastic
    rounding where that is asked at run time).
    """
    has_normals = conversions(kernel.code(loop.blocks)) > 0

    def score(code: Code) -> tuple[int, ...]:
        arithmetic = 0 if has_normals else sum(i.fp32_results for i in code)
        return conversions(code), stored(code), arithmetic, -len(code)

    return kernel.way(loop, score, without, uncounted or set())


def _hot_loops(kernel: Kernel) -> list[HotLoop]:
    """The loops with the widest stores, and most of them: several where a kernel has one for each kind of pass."""
    found = []
    for loop in kernel.loops:
        within = kernel.within(loop)
        inside = set().union(*(other.blocks for other in within))
        wide = max((i.stored for i in kernel.code(loop.blocks - inside)), default=0)
        narrow = {b for b in loop.blocks if any(0 < i.global_bytes < wide for i in _of_elements(kernel.blocks[b]))}
        code = _ordinary(kernel, loop, inside | narrow)
        if not code:  # no way leads past the loop over seeds: there is at least one
            code = _ordinary(kernel, loop, narrow - inside, inside)
        # The loop over seeds; of two, the shorter is that over the seeds whose keys are ready.
        inner = max((_ordinary(kernel, other, set()) for other in within), key=lambda c: (ffma(c), -len(c)), default=[])
        if stored(code):
            found.append(HotLoop(wide, code, inner if ffma(inner) else []))
    best = max(((h.store_width, stored(h.code)) for h in found), default=None)
    found = [h for h in found if (h.store_width, stored(h.code)) == best]
    for noise in (conversions, ffma):  # a loop of its own for "no seeds" is not hot
        if noisy := [h for h in found if noise(h.code + h.inner)]:
            return noisy
    return found


def _of_elements(block: Block) -> list[Instruction]:
    """Stores, and loads that are narrower than a word: other loads may fetch seeds and coefficients."""
    return [i for i in block.code if i.stored or i.global_bytes < 4]


def _pass(hot: list[HotLoop], stored_size: int) -> dict[str, Any]:
    if not hot:
        return {}
    one = min(hot, key=lambda h: h.slots(stored_size))
    more = min((h for h in hot if h.inner), key=lambda h: h.extra, default=None)
    extra = more.inner if more else []
    return {
        "elements_per_iteration": stored(one.code) // stored_size,
        "slots_per_element_k1": one.slots(stored_size),
        "slots_per_extra_seed": more.extra if more else None,
        "per_element": one.per_element(stored_size),
        "extra_per_element": per_element(more.inner, more.inner_elements) if more else {},
        **_of_loop(one.code, extra, one.code + extra, one.code),
    }


def _of_loop(one: Code, extra: Code, whole: Code, accesses: Code) -> dict[str, Any]:
    """What is told of the instructions themselves."""
    return {
        "barriers_in_loop": sum(i.pipe == "barrier" for i in whole),
        "global_bytes_in_loop": [i.global_bytes for i in accesses if i.global_bytes],
        "pipes": pipes(one),
        "pipes_extra_seed": pipes(extra),
    }


# ----------------------------------------------------------------------------------------------------------- a chain


def _words(code: Code) -> int:
    """Wide products, of which noise and rounding bits are made: the words of the rounding are what differs in them."""
    return sum(i.pipe == "imad.wide" for i in code)


def _round_nearest(code: Code) -> tuple[int, ...]:
    return -stored(code), conversions(code), -_words(code), ffma(code), -len(code)


def _round_stochastically(code: Code) -> tuple[int, ...]:
    return -stored(code), conversions(code), _words(code), ffma(code), -len(code)


def _store_most(code: Code) -> tuple[int, ...]:
    return stored(code), -len(code)


def _chain(name: str, kernel: Kernel) -> dict[str, Any]:
    nested = [loop for loop in kernel.loops if kernel.within(loop)]
    hot = []
    for tile in nested:
        for stage in (loop for loop in nested if loop.blocks < tile.blocks):
            once = kernel.way(tile, _store_most, uncounted=stage.blocks)
            if {i.stored for i in once} - {0} == {16}:
                hot.append((stage, once))
    if len(hot) != 1:
        raise ValueError(f"{name} has {len(hot)} loops over tiles with a loop over stages in it; a chain has one")
    stage, once = hot[0]
    of_rules = kernel.within(stage)
    own = max(of_rules, key=lambda loop: ffma(kernel.way(loop, _round_nearest)))  # a perturbation has fewer sums
    others = frozenset().union(*(loop.blocks for loop in of_rules if loop != own))
    one, rounded = (kernel.way(stage, score, without=others) for score in (_round_nearest, _round_stochastically))
    seed = kernel.way(own, _round_nearest)
    elements, of_seed = conversions(one) * 2 / 3, conversions(seed) * 2 / 3  # three conversions make two normals
    return {
        "elements_per_iteration": round(elements),
        "slots_per_element_k1": len(one) / elements,
        "slots_per_extra_seed": len(seed) / of_seed,
        "per_element": per_element(one, elements),
        "extra_per_element": per_element(seed, of_seed),
        "once_per_element": per_element(once, elements),
        "stochastic_per_element": per_element(rounded, elements),
        **_of_loop(one, seed, one + rounded + once, once),
    }


# -------------------------------------------------------------------------------------------------------- AMD's code

WAVE = 64


def analyse_amd(assembly: str, stored_size: int) -> dict[str, Any]:
    """The row of a Triton kernel for gfx942 (MI300X), but for its name.

    Simpler than NVIDIA's: the hot loop is the one with 16-byte stores and none narrower, and all of it is counted except
    the loop over further seeds inside it. A wave's instruction serves 64 lanes, each of which has eight elements; so
    instructions / 8 are slots per element. Registers are vector registers; scalar ones spill to lanes of these.
    """

    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1])  # type: ignore[index]

    def noise(code: Code) -> int:
        """Conversions of integers, or where there are none (signs) fused multiply-adds."""
        converted = sum(i.opcode.startswith("v_cvt_f32_") and "32_e" in i.opcode for i in code)
        return converted or sum("fma" in i.opcode or "fmac" in i.opcode for i in code)

    row: dict[str, Any] = {
        "slots": None, "slots_per_extra_seed": None, "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count"), "scalar_spills": number("sgpr_spill_count"), "vector_bytes": 0, "pipes": {},
    }  # fmt: skip
    kernel = read_amd(assembly)
    for loop in kernel.loops:
        within = kernel.within(loop)
        code = kernel.code(sorted(loop.blocks.difference(*(other.blocks for other in within))))
        if {i.stored for i in code} - {0} == {16}:
            elements = stored(code) // stored_size
            inner = max((kernel.code(sorted(other.blocks)) for other in within), key=noise, default=[])
            return row | {
                "slots": len(code) / elements, "slots_per_extra_seed": len(inner) / elements if inner else None,
                "vector_bytes": 16, "pipes": per_element(code, elements),
            }  # fmt: skip
    return row
