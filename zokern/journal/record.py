"""Writes down what an optimizer does to the weights: every pass that changed them, as the pass read its numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from zokern.contract.streams import derive_seed
from zokern.journal import format as journal

SEARCHED_STEPS = 1 << 10


@dataclass
class Recorder:
    """Collects the passes of a step and appends its record. Waits for the device: the numbers have to be on the host."""

    writer: journal.Writer
    run_seed: int
    layout: dict[str, Any]
    numbers: dict[str, int] = field(default_factory=dict)  # of signatures, by their JSON
    frames: list[journal.Frame] = field(default_factory=list)
    passes: list[dict[str, Any]] = field(default_factory=list)
    values: list[journal.Frame] = field(default_factory=list)
    known: dict[int, tuple[int, int]] = field(default_factory=dict)  # seed -> step and direction

    def add(
        self,
        rule: str,
        seeds: Sequence[int | Tensor],
        coefs: Tensor,
        shared: Tensor,
        enabled: Tensor | None,
        how: Mapping[str, bool],
    ) -> None:
        """A pass over the weights' own storage: coefs float32 [R, C, K], shared float32 [R, S]."""
        if enabled is not None and int(enabled) == 0:
            return
        self.passes.append(
            {
                "rule": rule,
                "seeds": [int(s) for s in seeds],
                "rows": shared.shape[0],
                **{k: v for k, v in how.items() if v},
            }
        )
        self.values += [x.detach().cpu().numpy().astype(np.float32).reshape(-1) for x in (coefs, shared)]

    def finish(
        self, step: int, flags: int, memory: Sequence[float], lrs: Sequence[float], loss: float, layout: dict[str, Any]
    ) -> None:
        """Appends the step's record. A step that broke off before any pass leaves none."""
        passes, self.passes = self.passes, []
        values, self.values = self.values, []
        if flags & journal.BROKEN_OFF and not passes:
            return
        if layout != self.layout:
            self.layout = layout
            self.writer.append_json(journal.LAYOUT, layout)
        for one in passes:
            one["seeds"] = [self._name(seed, step) for seed in one["seeds"]]
        extra = np.asarray(memory, np.float64).view(np.float32)
        frame = np.concatenate([*values, extra, np.asarray([*lrs, loss], np.float32)])
        signature = {"passes": passes, "memory": len(memory), "groups": len(lrs), "numbers": len(frame)}
        key = json.dumps(signature)
        if key not in self.numbers:
            self.numbers[key] = len(self.frames)
            self.frames.append(np.zeros(len(frame), np.float32))
            self.writer.append_json(journal.SIGNATURE, signature)
        number = self.numbers[key]
        self.writer.append(journal.encode_step(number, flags, frame, self.frames[number]))
        self.frames[number] = frame

    def _name(self, seed: int, step: int) -> tuple[int, int]:
        """How many steps ago the direction was drawn, and its number in that step: no seed is written down."""
        if seed not in self.known:
            self.known[seed] = next(
                ((at, k) for age in range(SEARCHED_STEPS) for at in [step - age] if at >= 0 for k in range(64)
                 if derive_seed(self.run_seed, at, k) == seed),
                (0, 0),
            )  # fmt: skip
        at, k = self.known[seed]
        if derive_seed(self.run_seed, at, k) != seed:
            raise RuntimeError(f"the direction with seed {seed} is none of this run's, so no journal can tell of it")
        return step - at, k
