"""AMD's table of docs/machine_code.md, from the rows of results/machine_code.json. No such GPU has run anything of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.parts import load, table
from zokern.bench import model

from .page import PASSES, of_pass
from .rows import STORED, Row

LANES = 64.0  # of vector instructions that a compute unit issues in a clock: four SIMDs, each a wave of 64 in four
COPY_SHARE = 0.8  # of the data sheet's bandwidth, which a plain copy is taken to reach
SLOWER = 4  # turns of a product of 32-bit integers and of a conversion, at worst
VECTOR = ("valu", "packed", "product", "cvt", "trans", "spill")


@dataclass(frozen=True)
class Device:
    """As AMD's data sheet has it; `clock` in Hz, the highest, `bandwidth` in bytes/s."""

    arch: str
    units: int
    clock: float
    bandwidth: float

    def slots_of_copy(self, bytes_per_element: float) -> float:
        """Vector instructions of a lane that it issues in the time in which it copies an element's bytes."""
        return self.units * self.clock * LANES * bytes_per_element / (COPY_SHARE * self.bandwidth)


DEVICES = {
    "MI300X": Device("gfx942", 304, 2.1e9, 5.3e12),
    "MI355X": Device("gfx950", 256, 2.4e9, 8.0e12),
}


def turns(row: Row) -> tuple[float, float]:
    """Vector instructions of an element: each as one, and with the slower ones as several."""
    pipes = row["pipes"]
    once = sum(pipes.get(pipe, 0.0) for pipe in VECTOR)
    return once, once + (SLOWER - 1) * (pipes.get("product", 0.0) + pipes.get("cvt", 0.0))


def amd_table(rows: Sequence[Row]) -> str:
    lines = []
    for title, wanted in PASSES.items():
        cells, further, registers = [], [], []
        for device in DEVICES.values():
            row = of_pass(rows, "triton", device.arch, wanted)
            assert row is not None, title
            least, most = turns(row)
            cells.append(f"{least:.0f} to {most:.0f} of {device.slots_of_copy(model.bytes_moved(row)):.0f}")
            further.append(f"{sum(row['pipes_extra'].get(pipe, 0.0) for pipe in VECTOR):.0f}")
            registers.append(str(row["registers"]))
        lines.append([title, *cells, ", ".join(further), ", ".join(registers)])
    return table(["pass", *DEVICES, "each further seed", "registers"], lines)


PAGES = {"docs/machine_code.md": {"amd": lambda: amd_table(load(STORED.name)["kernels"])}}
