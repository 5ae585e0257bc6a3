"""Runs a translated kernel on all waves of a launch.

Waves at the same place run together; those that are furthest back run first, so that waves that went different ways meet
again. Lanes need no such thing: the compiler masks them.
"""

from __future__ import annotations

import numpy as np

from tests.ptx.faults import Report
from tests.ptx.memory import PARAMS, Allocation, Memory
from tests.ptx.parse import PtxError

from .translate import Program
from .waves import EXEC, LANES, UNKNOWN, VCC, Waves, halves, pair

u1, u4, u8, i4 = np.uint8, np.uint32, np.uint64, np.int32
GARBAGE = u4(0xA5A5A5A5)  # what is in a register before it is set
STEPS = 2_000_000  # of a group of waves


class Machine(Memory):
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

    def start(self) -> Waves:
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

    def run(self, limit: int = STEPS) -> Report:
        program, report, each = self.program, self.report, self.block // LANES
        groups, alive = [self.start()], np.ones(self.grid * each, bool)
        with np.errstate(all="ignore"):
            while groups:
                ready = [g for g in groups if not g.waiting]
                if not ready:
                    self._open_barriers(groups, alive.reshape(self.grid, each))
                    continue
                at = min(g.at for g in ready)
                waves = Waves.together([g for g in ready if g.at == at])
                groups = [g for g in groups if g.waiting or g.at != at]
                report.runs[at] += len(waves.T)
                report.steps += program.sizes[at]
                report.instructions += program.sizes[at] * len(waves.T)
                if report.steps > limit:
                    raise PtxError(f"{self.kernel.name} does not end")
                for step in program.steps[at]:
                    step(waves, self)
                if at == 0 and self.kernel.preloaded:
                    self._check_preloaded(waves)
                groups += self._next(waves, alive)
        self.write_back()
        return report

    def _check_preloaded(self, waves: Waves) -> None:
        """Firmware that fills these registers itself begins behind the first block, which must thus do the same."""
        count = self.kernel.preloaded
        wanted = np.frombuffer(self._arguments[: 4 * count], u4)[:, None]
        end = self.kernel.blocks[0].end
        if (waves.S[2 : 2 + count] != wanted).any() or end is None or end.opcode != "s_branch":
            self.report.fault("preload", "the first block", 1, f"it does not load {count} words of the arguments")

    def _next(self, waves: Waves, alive: np.ndarray) -> list[Waves]:
        """Where waves go from the end of their block."""
        end, after = self.kernel.blocks[waves.at].end, waves.at + 1
        if end is not None and end.opcode == "s_endpgm":
            alive[waves.numbers] = False
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

    def _open_barriers(self, groups: list[Waves], alive: np.ndarray) -> None:
        """All waves that are left wait: the barrier of every block opens."""
        places: dict[int, int] = {}
        for g in groups:
            for b in np.unique(g.T // self.block).tolist():
                if places.setdefault(b, g.at) != g.at:
                    self.report.fault("barrier", "waves of one block wait at different barriers", 1, f"block {b}")
        partial = alive.any(1) & ~alive.all(1)
        if partial.any():
            which = f"block {int(np.flatnonzero(partial)[0])}"
            self.report.fault("barrier", "some waves of a block have left before it", partial.sum(), which)
        self.races.barriers += i4(1)
        for g in groups:
            g.waiting = False
