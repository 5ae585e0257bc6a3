"""What a journal has of a step beside its numbers, written once for all steps that share it: passes, directions, counts.

A direction is named by how many steps ago it was drawn, and its number in that step: no seed is written down.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from zokern.contract.streams import derive_seed
from zokern.journal import format as journal
from zokern.journal.reader import Step
from zokern.optim.events import StepEvent
from zokern.passes.spec import PassNumbers, PassSpec

SEARCHED_STEPS = 1 << 10
KEPT = 1 << 16  # directions whose steps are remembered
Done = Sequence[tuple[PassSpec, PassNumbers]]


class Directions:
    """Of one run: where each seed comes from."""

    def __init__(self, run_seed: int) -> None:
        self.run_seed = run_seed
        self.known: dict[int, tuple[int, int]] = {}  # seed -> step and number

    def learn(self, drawn: Mapping[int, int], step: int) -> None:
        self.known.update({seed: (step, k) for seed, k in drawn.items()})
        if len(self.known) > 2 * KEPT:
            for seed in list(self.known)[:KEPT]:
                del self.known[seed]

    def read(self, step: Step) -> None:
        """What a journal says of a step's updates that wait: a later step's pass has their directions."""
        for one in step.signature["passes"]:
            for age, k in one["seeds"] if one.get("deferred") else ():
                at = step.number - age
                self.learn({derive_seed(self.run_seed, at, k): k}, at)

    def name(self, seed: int, step: int) -> tuple[int, int]:
        """
        Raises:
            RuntimeError: for a seed that is none of this run's.
        """
        found = self.known.get(seed)
        if found is None:
            found = self._search(seed, step)
            if found is None:
                raise RuntimeError(
                    f"the direction with seed {seed} is none of this run's, so no journal can tell of it"
                )
            self.known[seed] = found
        at, k = found
        return step - at, k

    def _search(self, seed: int, step: int) -> tuple[int, int] | None:
        return next(
            ((at, k) for age in range(SEARCHED_STEPS) for at in [step - age] if at >= 0 for k in range(64)
             if derive_seed(self.run_seed, at, k) == seed),
            None,
        )  # fmt: skip


class Signatures:
    """Of one journal: their numbers, and the last frame of each. `writer` gets those that are new."""

    def __init__(self, writer: journal.Writer, directions: Directions) -> None:
        self.writer, self.directions = writer, directions
        self.numbers: dict[str, int] = {}  # by their JSON
        self.frames: list[journal.Frame] = []
        self._quick: dict[Hashable, tuple[int, list[PassSpec]]] = {}  # specs are held: their ids stand for them

    def know(self, signatures: Sequence[dict[str, Any]], frames: Sequence[journal.Frame]) -> None:
        """What the journal has where this one goes on: its first signatures, and each one's last numbers."""
        self.numbers = {json.dumps(signature): i for i, signature in enumerate(signatures[: len(frames)])}
        self.frames = [np.array(frame) for frame in frames]

    def number(self, event: StepEvent, done: Done, seeds: Sequence[Sequence[int]], numbers: int) -> int:
        """Of the signature of a step with these passes, whose directions have these seeds; `numbers`: of its frame. Written
        where it is new."""
        key, names = self._key(event, done, seeds, numbers)
        found = self._quick.get(key)
        if found is None:
            passes = [_described(*one, named, event.deferred) for one, named in zip(done, names, strict=True)]
            groups, memory = len(event.lrs), len(event.memory)
            signature = {"passes": passes, "memory": memory, "groups": groups, "numbers": numbers}
            if len(self._quick) > 4 * SEARCHED_STEPS:
                self._quick.clear()
            found = self._quick[key] = self._written(signature), [spec for spec, _ in done]
        return found[0]

    def known(self, event: StepEvent, done: Done, seeds: Sequence[Sequence[int]], numbers: int) -> int | None:
        """The same, None where it is new."""
        found = self._quick.get(self._key(event, done, seeds, numbers)[0])
        return None if found is None else found[0]

    def _key(
        self, event: StepEvent, done: Done, seeds: Sequence[Sequence[int]], numbers: int
    ) -> tuple[Hashable, list[list[tuple[int, int]]]]:
        name, step = self.directions.name, event.step
        self.directions.learn(event.drawn, step)
        names = [[name(seed, step) for seed in drawn] for drawn in seeds]
        own = [
            (id(spec), told.rounding_seed is None, told.shared.shape[0], *named)
            for (spec, told), named in zip(done, names, strict=True)
        ]
        return (numbers, len(event.memory), len(event.lrs), event.deferred, *own), names

    def _written(self, signature: dict[str, Any]) -> int:
        key = json.dumps(signature)
        if key not in self.numbers:
            self.writer.append_json(journal.SIGNATURE, signature)
            self.frames.append(np.zeros(signature["numbers"], np.float32))
            self.numbers[key] = len(self.frames) - 1
        return self.numbers[key]


def _described(spec: PassSpec, told: PassNumbers, names: Sequence[tuple[int, int]], deferred: bool) -> dict[str, Any]:
    """What a signature has of a pass; flags that are not set are left out."""
    flags = {
        "stochastic": spec.rounding == "stochastic",
        "rounded": told.rounding_seed is not None,
        "square_of_sum": spec.square_of_sum,
        "keep_second": spec.keep_second,
        "deferred": deferred,
    }
    return {
        "rule": spec.rule.name,
        "seeds": names,
        "rows": told.shared.shape[0],
        **{name: value for name, value in flags.items() if value},
    }


def floats(values: Sequence[float | Tensor]) -> list[float]:
    return list(map(float, values))
