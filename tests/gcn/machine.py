"""Runs a translated kernel on all waves of a launch: tests/ptx/groups.py, with waves for its threads.

Lanes of a wave do not part: the compiler masks them.
"""

from __future__ import annotations

import numpy as np

from tests.ptx.groups import Groups
from tests.ptx.memory import PARAMS, Allocation
from tests.ptx.parse import PtxError

from .translate import Program
from .waves import EXEC, LANES, UNKNOWN, VCC, Waves, halves, pair

u1, u4, u8, i4 = np.uint8, np.uint32, np.uint64, np.int32
GARBAGE = u4(0xA5A5A5A5)  # what is in a register before it is set


class Machine(Groups):
    def __init__(
        self, program: Program, grid: int, block: int, arguments: bytes, allocations: list[Allocation], shared: int = 0
    ) -> None:
        """shared: bytes of LDS that the launch asks for."""
        kernel = program.kernel
        if len(arguments) != kernel.param_bytes:
            raise PtxError(f"{kernel.name} takes {kernel.param_bytes} bytes, not {len(arguments)}")
        if block > kernel.max_threads or block % LANES:
            raise PtxError(f"{block} threads, but {kernel.name} was compiled for {kernel.max_threads}")
        self.program, self.kernel, self._arguments = program, kernel, arguments
        super().__init__(grid, block, shared, 0, arguments, allocations)

    def begin(self) -> Waves:
        """As a wave begins: where its arguments are, the number of its block, those of its lanes."""
        each = self.block // LANES
        numbers = np.arange(self.grid * each, dtype=i4)
        S = np.full((EXEC + 2, len(numbers)), GARBAGE)
        V = np.full((self.kernel.vgprs, len(numbers), LANES), GARBAGE)
        S[0], S[1] = halves(u8(PARAMS))
        S[self.kernel.user_sgprs] = numbers // each
        S[EXEC : EXEC + 2] = u4(0xFFFFFFFF)
        V[0] = (numbers % each * LANES)[:, None] + np.arange(LANES)
        return Waves(numbers, S, V, np.full(len(numbers), UNKNOWN, u1))

    def together(self, groups: list[Waves]) -> Waves:
        return Waves.together(groups)

    def run_block(self, waves: Waves) -> None:
        for step in self.program.steps[waves.at]:
            step(waves, self)
        if waves.at == 0 and self.kernel.preloaded:
            self._check_preloaded(waves)

    def _check_preloaded(self, waves: Waves) -> None:
        """Firmware that fills these registers itself begins behind the first block, which must thus do the same."""
        count = self.kernel.preloaded
        wanted = np.frombuffer(self._arguments[: 4 * count], u4)[:, None]
        end = self.kernel.blocks[0].end
        if (waves.S[2 : 2 + count] != wanted).any() or end is None or end.opcode != "s_branch":
            self.report.fault("preload", "the first block", 1, f"it does not load {count} words of the arguments")

    def following(self, waves: Waves, alive: np.ndarray) -> list[Waves]:
        """Where waves go from the end of their block."""
        end, after = self.kernel.blocks[waves.at].end, waves.at + 1
        if end is not None and end.opcode == "s_endpgm":
            alive[waves.threads] = False
            return []
        if end is None or end.opcode == "s_barrier":
            waves.at, waves.waiting = after, end is not None
            return [waves]
        target = self.kernel.labels[end.args[0]]
        taken = self._taken(waves, end.opcode)
        if taken.all() or not taken.any():
            waves.at = target if taken.all() else after
            return [waves]
        return [waves.some(taken, target), waves.some(~taken, after)]

    def _taken(self, waves: Waves, opcode: str) -> np.ndarray:
        if opcode == "s_branch":
            return np.ones(len(waves.numbers), bool)
        asked = opcode.removeprefix("s_cbranch_")
        if asked in ("scc0", "scc1"):
            return waves.condition() == (asked == "scc1")
        zero = pair(waves.S, VCC if asked.startswith("vcc") else EXEC) == 0
        return {"vccz": zero, "execz": zero, "vccnz": ~zero, "execnz": ~zero}[asked]
