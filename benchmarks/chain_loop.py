"""Counts a chain's kernel (csrc/cuda/chain.cu): slots of a stage, of each further seed in it, and of the tile around.

Its hot loop, over tiles with 16-byte stores, has a loop over stages in it, and that a loop over seeds for each rule that
a stage may have (its own, and the perturbation that goes with it). Counted of a stage is its own rule with one seed and
normals, without the stores of the stage that forks; twice: rounded to nearest, and with stochastic rounding of weights.
An element of a chain of n such stages takes

    once + n * (stage + (seeds - 1) * further seed)        slots.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from hot_loop import Report
from sass import Block, Instruction, Loop, code_of, conversions, ffma, find_loops

Score = Callable[[list[Instruction]], tuple[int, ...]]


def _stored(code: list[Instruction]) -> int:
    return sum(i.global_bytes for i in code if i.opcode.startswith("STG"))


def _words(code: list[Instruction]) -> int:
    """Wide products, of which noise and rounding bits are made: the words of the rounding are what differs in them."""
    return sum(i.pipe == "imad.wide" for i in code)


def _round_nearest(code: list[Instruction]) -> tuple[int, ...]:
    return -_stored(code), conversions(code), -_words(code), ffma(code), -len(code)


def _round_stochastically(code: list[Instruction]) -> tuple[int, ...]:
    return -_stored(code), conversions(code), _words(code), ffma(code), -len(code)


def _store_most(code: list[Instruction]) -> tuple[int, ...]:
    return _stored(code), -len(code)


def way(
    blocks: list[Block],
    loop: Loop,
    score: Score,
    uncounted: frozenset[int] = frozenset(),
    without: frozenset[int] = frozenset(),
) -> list[Instruction]:
    """Code of the way round `loop`, through every loop inside at most once, whose sum of scores is the largest.

    It may go through the blocks `uncounted`, and may not through those `without`.
    """
    best: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    nothing = score([])
    for index in sorted(loop.blocks - without, reverse=True):
        following = [(nothing, ())] if loop.header in blocks[index].successors else []
        following += [best[s] for s in blocks[index].successors if s > index and s in best]
        if following:
            more, rest = max(following)
            here = score([] if index in uncounted else code_of(blocks, [index]))
            best[index] = tuple(a + b for a, b in zip(here, more, strict=True)), (index, *rest)
    taken = best[loop.header][1] if loop.header in best else ()
    return code_of(blocks, [index for index in taken if index not in uncounted])


def _per_element(code: list[Instruction], elements: float) -> dict[str, float]:
    return {pipe: n / elements for pipe, n in Counter(i.pipe for i in code).most_common()}


def analyse_chain(name: str, arch: int, blocks: list[Block], **resources: Any) -> Report:
    """The report of one chain kernel. resources: registers, stack_bytes and spills.

    Raises:
        ValueError: where the loops are not those of a chain.
    """
    loops = find_loops(blocks)
    stages = [loop for loop in loops if any(other.blocks < loop.blocks for other in loops)]
    hot = []
    for tile in stages:
        for stage in (loop for loop in stages if loop.blocks < tile.blocks):
            once = way(blocks, tile, _store_most, stage.blocks)
            stores = {i.global_bytes for i in once if i.opcode.startswith("STG")}
            if stores == {16}:
                hot.append((tile, stage, once))
    if len(hot) != 1:
        raise ValueError(f"{name} has {len(hot)} loops over tiles with a loop over stages in it; a chain has one")
    _, stage, once = hot[0]
    of_rules = [loop for loop in loops if loop.blocks < stage.blocks]
    own = max(of_rules, key=lambda loop: ffma(way(blocks, loop, _round_nearest)))  # a perturbation has fewer sums
    others = frozenset().union(*(loop.blocks for loop in of_rules if loop != own))
    one = way(blocks, stage, _round_nearest, without=others)
    rounded = way(blocks, stage, _round_stochastically, without=others)
    seed = way(blocks, own, _round_nearest)
    elements, of_seed = conversions(one) * 2 / 3, conversions(seed) * 2 / 3  # three conversions make two normals
    return Report(
        name=name,
        arch=arch,
        elements_per_iteration=round(elements),
        slots_per_element_k1=len(one) / elements,
        slots_per_extra_seed=len(seed) / of_seed,
        barriers_in_loop=sum(i.pipe == "barrier" for i in one + rounded + once),
        global_bytes_in_loop=[i.global_bytes for i in once if i.global_bytes],
        pipes=dict(Counter(i.pipe for i in one).most_common()),
        pipes_extra_seed=dict(Counter(i.pipe for i in seed).most_common()),
        per_element=_per_element(one, elements),
        extra_per_element=_per_element(seed, of_seed),
        once_per_element=_per_element(once, elements),
        stochastic_per_element=_per_element(rounded, elements),
        **resources,
    )
