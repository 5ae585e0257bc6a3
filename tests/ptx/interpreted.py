"""Does a kernel do for an element what was counted in its machine code? An interpreter of its PTX says so.

The counter (machine_code/counts.py) chooses one way round one loop; an interpreter goes where the data leads, and
counts every instruction of every thread. ptxas merges logic and drops moves, so the totals differ: PTX has 1.4 to 2.6
instructions for one of the machine's. But what computes stays: float32 sums and products, products of 32 x 32 to 64 bits,
conversions. What the machine code should take for a run is zokern/bench/model.py's `instructions`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zokern.bench import model

# Of PTX, by what they become. A packed one (f32x2) has two results.
PTX = {
    "float32 results": re.compile(r"(add|sub|mul|fma|mad)(\.\w+)*\.f32(x2)?"),
    "wide products": re.compile(r"(mul|mad)\.(wide|hi)\.[us]32"),
    "conversions": re.compile(r"cvt(\.\w+)*\.(f32|f16|bf16)(x2)?(\.\w+)*"),
}
# The same of machine code: how many of it an instruction of a pipe is (listing.py).
MACHINE = {
    "float32 results": {"fp32": 1, "fp32x2": 2},
    "wide products": {"imad.wide": 1},
    "conversions": {"convert": 1, "xu": 1},
}


@dataclass(frozen=True)
class Comparison:
    """Of one element. `counted` in the machine code, `executed` by the interpreter: by the names of PTX above."""

    counted: dict[str, float]
    executed: dict[str, float]
    slots: float
    instructions: float

    def differences(self, tolerance: float = 0.04) -> list[str]:
        """What differs by more than a part of itself, and by more than a tenth of an instruction."""
        return [
            f"{name}: {self.counted[name]:.2f} counted for an element, {self.executed[name]:.2f} executed"
            for name in PTX
            if abs(self.counted[name] - self.executed[name]) > max(0.1, tolerance * self.counted[name])
        ]


def compare(row: Mapping[str, Any], executed: Mapping[str, float], elements: int, **how: int) -> Comparison:
    """Lays an interpreter's run beside a row of machine_code.json, for the architecture whose PTX was run.

    Args:
        row: of the kernel that ran.
        executed: how often each PTX instruction ("fma.rn.f32") ran, all threads together.
        elements: that the run passed over: whole chunks (table.CHUNK), or the tail's slow path is in the counts,
            and without decay, which the counter leaves out where it is asked for at run time.
        how: seeds, stages and stochastic of the run, as `model.instructions` takes them.
    """
    pipes = model.instructions(row, **how)
    return Comparison(
        counted={name: sum(n * pipes.get(pipe, 0.0) for pipe, n in made.items()) for name, made in MACHINE.items()},
        executed={name: _results(executed, pattern) / elements for name, pattern in PTX.items()},
        slots=sum(pipes.values()),
        instructions=sum(executed.values()) / elements,
    )


def _results(executed: Mapping[str, float], pattern: re.Pattern[str]) -> float:
    found = [(opcode, times) for opcode, times in executed.items() if pattern.fullmatch(opcode)]
    return sum(times * (2 if opcode.endswith("f32x2") else 1) for opcode, times in found)
