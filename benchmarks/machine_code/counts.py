"""Counts a kernel's hot loop: the one with the widest global stores, on the way that an ordinary iteration takes.

That way neither enters an inner loop nor touches memory in narrower pieces (masked slow paths), and where a kernel
decides at run time it draws normals, writes every state and rounds to nearest. An inner loop is the loop over further
seeds. Instructions of the uniform datapath take issue slots like any other.

A chain's kernel (csrc/cuda/chain.cu) has, in its loop over tiles with 16-byte stores, a loop over stages, and in that a
loop over seeds for each rule that a stage may have (its own, and the perturbation that goes with it). Counted of a stage
is its own rule with one seed and normals, without the stores of the stage that forks; twice: rounded to nearest, and with
stochastic rounding of weights. An element of a chain of n such stages takes

    once + n * (stage + (seeds - 1) * further seed)        slots.

A kernel of low-rank directions (csrc/cuda/lowrank.cu, lowrank_chain.cu) reads its directions: its loop over seeds has loops
over further factors in it, for each way to read them. Counted is that of rows of whole blocks, with one factor; a further
one takes slots_per_extra_rank. Triton's is compiled for one factor, and its loop over seeds has none inside; what a further
factor takes is counted in the kernel that is compiled for any number.

A report says of a kernel: name, arch, registers, stack_bytes, spills (loads and stores of local memory, anywhere in it);
elements of an iteration, slots (issued instructions per element; of a chain, of a stage) and slots_per_extra_seed, None
where there is no such loop; pipes and pipes_extra, the same by pipe; barriers in the loop; accesses, the bytes of each to
global memory, and vector_bytes, the narrowest. A chain's has slots_once and slots_stochastic too, and their pipes.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

from .listing import Code, Kernel, Loop, conversions, ffma, per_element, stored

Report = dict[str, Any]
Pipes = dict[str, float]


def analyse(name: str, arch: int, kernel: Kernel, stored_size: int, registers: int, stack_bytes: int) -> Report:
    """Counts one kernel, which stores `stored_size` bytes for an element.

    Raises:
        ValueError: where the loops are not those of a chain, which the kernel's name says that it is.
    """
    spills = sum(bool(re.match(r"LDL|STL", i.opcode)) for i in kernel.code())
    if "::low_rank" in name:
        counted = _low_rank_chain(name, kernel) if "_chain_kernel<" in name else _low_rank(name, kernel, stored_size)
    elif "::chain_kernel<" in name:
        counted = _chain(name, kernel)
    else:
        counted = of_triton(name, kernel, stored_size)
    resources = {"registers": registers, "stack_bytes": stack_bytes, "spills": spills}
    return {"name": name, "arch": arch, **resources, **counted}


def of_triton(name: str, kernel: Kernel, stored_size: int) -> Report:
    """What is counted of a pass by Triton, whoever's code it is, or of a dense one of CUDA's."""
    return _rank_1(name, kernel, stored_size) if ", low_rank, " in name else _pass(kernel, stored_size)


def _slots(pipes: Pipes) -> float | None:
    return math.fsum(pipes.values()) if pipes else None


def _busiest_first(pipes: Pipes) -> Pipes:
    return dict(Counter(pipes).most_common())


def _report(elements: float, one: Pipes, extra: Pipes, whole: Code, accesses: Code, **more: Pipes) -> Report:
    """whole: where barriers are counted. accesses: where memory is looked at."""
    widths = [i.global_bytes for i in accesses if i.global_bytes]
    report: Report = {
        "elements": round(elements), "slots": _slots(one), "slots_per_extra_seed": _slots(extra),
        "barriers": sum(i.pipe == "barrier" for i in whole), "accesses": widths,
        "vector_bytes": min(widths, default=0), "pipes": _busiest_first(one), "pipes_extra": _busiest_first(extra),
    }  # fmt: skip
    for name, pipes in more.items():
        report |= {f"slots_{name}": _slots(pipes), f"pipes_{name}": _busiest_first(pipes)}
    return report


# ------------------------------------------------------------------------------------------------------------ a pass


def _noise(inner: Code) -> float:
    """Elements of an iteration of the loop over seeds, which may be unrolled, counted by their noise: three conversions
    make two normals; a sign costs one fused multiply-add in a rule without sums."""
    return conversions(inner) * 2 / 3 or ffma(inner)


def _one_seed(code: Code, inner: Code, stored_size: int) -> Pipes:
    """Instructions per element by pipe, for one seed. It runs in the inner loop unless it is peeled off."""
    counts = Counter(per_element(code, stored(code) // stored_size))
    noise = conversions if conversions(inner) else ffma
    if noise(code) < noise(inner) / 2:
        counts.update(per_element(inner, _noise(inner)))
    return counts


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


def _hot_loops(kernel: Kernel) -> list[tuple[Code, Code]]:
    """The loops with the widest stores, and most of them: several where a kernel has one for each kind of pass.

    Of each the code of its way round, and that of the loop over seeds inside it, if any.
    """
    found = []
    for loop in kernel.loops:
        within = kernel.within(loop)
        inside = set().union(*(other.blocks for other in within))
        wide = max((i.stored for i in kernel.code(loop.blocks - inside)), default=0)
        # Loads as wide as a word may fetch seeds and coefficients.
        narrow = {b for b in loop.blocks if any(0 < i.global_bytes < (wide if i.stored else min(wide, 4))
                                                for i in kernel.blocks[b].code)}  # fmt: skip
        code = _ordinary(kernel, loop, inside | narrow)
        if not code:  # no way leads past the loop over seeds: there is at least one
            code = _ordinary(kernel, loop, narrow - inside, inside)
        # The loop over seeds; of two, the shorter is that over the seeds whose keys are ready.
        inner = max((_ordinary(kernel, other, set()) for other in within), key=lambda c: (ffma(c), -len(c)), default=[])
        if stored(code):
            found.append(((wide, stored(code)), code, inner if ffma(inner) else []))
    best = max((stores for stores, _, _ in found), default=None)
    hot = [(code, inner) for stores, code, inner in found if stores == best]
    for noise in (conversions, ffma):  # a loop of its own for "no seeds" is not hot
        if noisy := [(code, inner) for code, inner in hot if noise(code + inner)]:
            return noisy
    return hot


def _pass(kernel: Kernel, stored_size: int) -> Report:
    hot = [(_one_seed(code, inner, stored_size), code, inner) for code, inner in _hot_loops(kernel)]
    if not hot:
        return _report(0, {}, {}, [], [])
    one, code, _ = min(hot, key=lambda h: math.fsum(h[0].values()))
    inner = min((inner for _, _, inner in hot if inner), key=lambda c: len(c) / _noise(c), default=[])
    return _report(stored(code) // stored_size, one, per_element(inner, _noise(inner)), code + inner, code)


# ----------------------------------------------------------------------------------------------------------- a chain


def _staged(words: int) -> Any:
    """The score of a stage's way that does not fork. words: 1 for stochastic rounding, -1 for nearest: wide products, of
    which noise and rounding bits are made, are what differs in them."""

    def score(code: Code) -> tuple[int, ...]:
        products = sum(i.pipe == "imad.wide" for i in code)
        return -stored(code), conversions(code), words * products, ffma(code), -len(code)

    return score


def _chain(name: str, kernel: Kernel) -> Report:
    nested = [loop for loop in kernel.loops if kernel.within(loop)]
    hot, nearest, stochastic = [], _staged(-1), _staged(1)
    for tile in nested:
        for stage in (loop for loop in nested if loop.blocks < tile.blocks):
            once = kernel.way(tile, lambda code: (stored(code), -len(code)), uncounted=stage.blocks)
            if {i.stored for i in once} - {0} == {16}:
                hot.append((stage, once))
    if len(hot) != 1:
        raise ValueError(f"{name} has {len(hot)} loops over tiles with a loop over stages in it; a chain has one")
    stage, once = hot[0]
    of_rules = kernel.within(stage)
    own = max(of_rules, key=lambda loop: ffma(kernel.way(loop, nearest)))  # a perturbation has fewer sums
    others = frozenset().union(*(loop.blocks for loop in of_rules if loop != own))
    one, rounded = (kernel.way(stage, score, without=others) for score in (nearest, stochastic))
    seed, elements = kernel.way(own, nearest), _noise(one)
    return _report(
        elements, per_element(one, elements), per_element(seed, _noise(seed)), one + rounded + once, once,
        once=per_element(once, elements), stochastic=per_element(rounded, elements),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- low rank


def _wide_loads(code: Code) -> int:
    return sum(i.global_bytes == 16 and not i.stored for i in code)


def _blocks(loops: list[Loop]) -> frozenset[int]:
    return frozenset().union(*(loop.blocks for loop in loops))


def _of_factors(code: Code) -> tuple[int, ...]:
    """The score of a way that reads rows of V by whole blocks."""
    return _wide_loads(code), -len(code)


def _outermost(kernel: Kernel, loop: Loop) -> list[Loop]:
    """Of the loops inside that have loops inside."""
    nested = [other for other in kernel.within(loop) if kernel.within(other)]
    return [one for one in nested if not any(one.blocks < other.blocks for other in nested)]


def _tile(name: str, kernel: Kernel) -> tuple[Loop, Code]:
    """The loop in the loop over whole tiles, and what a tile takes around it."""
    found = []
    for tile in kernel.loops:
        for inner in _outermost(kernel, tile):
            once = kernel.way(tile, lambda code: (stored(code), -len(code)), uncounted=inner.blocks)
            if {i.stored for i in once} - {0} == {16}:
                found.append((tile, inner, once))
    tiles = [tile for tile, _, _ in found]  # a fork stores within the loop over stages
    outer = [some for some in found if not any(some[0].blocks < tile.blocks for tile in tiles)]
    if len(outer) != 1:
        raise ValueError(f"{name} has {len(outer)} loops over whole tiles with a nested loop in it; it should have one")
    _, inner, once = outer[0]
    return inner, once


def _further_factor(kernel: Kernel, seeds: Loop) -> Pipes:
    """Of the loop over factors that reads whole blocks: eight elements."""
    ways = (kernel.way(loop, _of_factors) for loop in kernel.within(seeds))
    return per_element(next(way for way in ways if _wide_loads(way)), 8)


def _low_rank(name: str, kernel: Kernel, stored_size: int) -> Report:
    seeds, once = _tile(name, kernel)
    one = kernel.way(seeds, _of_factors, without=_blocks(kernel.within(seeds)))
    elements = stored(once) // stored_size
    return _report(
        elements, per_element(once + one, elements), per_element(one, elements), once + one, once,
        per_extra_rank=_further_factor(kernel, seeds),
    )  # fmt: skip


def _rank_1(name: str, kernel: Kernel, stored_size: int) -> Report:
    """Triton's, which is compiled for one factor: its loop over seeds has none inside."""
    found = []
    for tile in kernel.loops:
        for seeds in kernel.within(tile):
            one = kernel.way(tile, lambda code: (stored(code), *_of_factors(code)))
            if {i.stored for i in one} - {0} == {16} and _wide_loads(kernel.code(seeds.blocks)):
                found.append((one, kernel.way(seeds, _of_factors)))
    if len(found) != 1:
        raise ValueError(f"{name} has {len(found)} loops over seeds in loops over whole tiles; it should have one")
    one, seed = found[0]
    elements, of_seed = stored(one) // stored_size, 4 * _wide_loads(seed)
    return _report(elements, per_element(one, elements), per_element(seed, of_seed), one, _without(one, seed))


def _without(code: Code, part: Code) -> Code:
    """Of `code` what is not of `part`, which it has in one piece: a seed's number of U has four bytes, rightly."""
    at = {id(i) for i in part}
    return [i for i in code if id(i) not in at]


def further_factor(name: str, kernel: Kernel) -> Pipes:
    """Instructions per element of one factor more, of Triton's kernel of any rank."""
    ways = [kernel.way(loop, _of_factors) for loop in kernel.loops if not kernel.within(loop)]
    whole = [way for way in ways if _wide_loads(way) and not stored(way)]
    if not whole:
        raise ValueError(f"{name} has no loop over factors that reads whole blocks")
    return min((per_element(way, 4 * _wide_loads(way)) for way in whole), key=lambda pipes: math.fsum(pipes.values()))


def _low_rank_chain(name: str, kernel: Kernel) -> Report:
    stage, once = _tile(name, kernel)
    of_rules = _outermost(kernel, stage)  # a perturbation has fewer sums
    own = max(of_rules, key=lambda loop: ffma(kernel.way(loop, _of_factors, without=_blocks(kernel.within(loop)))))
    others = _blocks([loop for loop in of_rules if loop != own]) | _blocks(kernel.within(own))

    def staged(words: int) -> Any:
        of_dense = _staged(words)
        return lambda code: (_wide_loads(code), *of_dense(code))

    one, rounded = (kernel.way(stage, staged(words), without=others) for words in (-1, 1))
    seed = kernel.way(own, _of_factors, without=_blocks(kernel.within(own)))
    return _report(
        8, per_element(one, 8), per_element(seed, 8), one + rounded + once, once,
        once=per_element(once, 8), stochastic=per_element(rounded, 8), per_extra_rank=_further_factor(kernel, own),
    )  # fmt: skip
