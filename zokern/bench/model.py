"""What a pass should take, from its machine code: a prediction to lay beside a measurement, not a measurement.

For an element, every pipe of a multiprocessor is busy for (instructions of that pipe) / (its rate) clocks, and the
schedulers for (all instructions) / (0.8 * 128); compute time is the largest of these. Memory time is bytes / copy
bandwidth. Where the two are far apart the larger decides; where they are near, neither overlaps the other wholly:

    time = (compute^4 + memory^4)^(1/4)        share of the copy bandwidth = memory / time

Rates per clock and multiprocessor: the table of arithmetic throughput in NVIDIA's CUDA C++ Programming Guide, as quoted
in docs/machine_code.md. Instruction counts: benchmarks/results/machine_code.json, made by
benchmarks/machine_code/rows.py; prediction.py says which of its rows is a benchmark's kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zokern.bench.cases import Case
from zokern.bench.limits import bytes_per_element

ISSUE = 128.0  # four schedulers, each a warp of 32 a clock
SCHEDULED = 0.8  # of these slots are filled at most, as axpy of 4 to 16 directions did on an H200
SHARPNESS = 4.0  # of the maximum of compute and memory time; infinity would be a perfect overlap
COPY_SHARE = 0.9  # of the data sheet's bandwidth, which a plain copy reaches

# Lanes per clock and multiprocessor. "fma": FP32 and integer products together, "heavy": products of integers alone.
RATES: dict[int, dict[str, float]] = {
    80: {"fma": 64, "heavy": 64, "alu": 64, "xu": 16},
    90: {"fma": 128, "heavy": 64, "alu": 64, "xu": 16},
    100: {"fma": 128, "heavy": 64, "alu": 64, "xu": 16},
}


@dataclass(frozen=True)
class Device:
    """`clock` in Hz (the highest that the data sheet or the driver names), `bandwidth` in bytes/s (the data sheet's)."""

    arch: int  # compute capability: 90 for 9.0
    multiprocessors: int
    clock: float
    bandwidth: float

    @property
    def copy_bandwidth(self) -> float:
        """Bytes per second, read plus written."""
        return COPY_SHARE * self.bandwidth


DEVICES: dict[str, Device] = {
    "A100": Device(80, 108, 1.41e9, 2.039e12),  # SXM, 80 GB
    "H100": Device(90, 132, 1.98e9, 3.352e12),  # SXM
    "H200": Device(90, 132, 1.98e9, 4.8e12),
    "B200": Device(100, 148, 1.965e9, 8.0e12),
}
OF_ARCH = {"sm_80": "A100", "sm_90": "H200", "sm_100": "B200"}


def short_name(name: str) -> str:
    """Of DEVICES: from an architecture, or from what torch.cuda.get_device_name says ("NVIDIA H100 80GB HBM3")."""
    words = OF_ARCH.get(name, name).upper().replace("-", " ").split()
    for known in DEVICES:
        if known in words:
            return known
    raise ValueError(f"device is {name!r}; there are figures of {', '.join([*DEVICES, *OF_ARCH])}")


def device_named(name: str) -> Device:
    return DEVICES[short_name(name)]


def clocks(pipes: Mapping[str, float], arch: int) -> dict[str, float]:
    """Clocks per element for which each unit of a multiprocessor is busy. pipes: instructions per element by pipe.

    IMAD.WIDE makes two words and counts twice. On sm_90 and sm_100 half of the FP32 lanes multiply integers as well. A
    packed pair of FP32 operations is one instruction for the schedulers and two for the lanes, which is an assumption.
    """
    if arch not in RATES:
        raise ValueError(f"arch is {arch!r}; there are rates of {', '.join(map(str, RATES))}")
    rates = RATES[arch]
    products = pipes.get("imad", 0.0) + 2 * pipes.get("imad.wide", 0.0)
    return {
        "fma": (pipes.get("fp32", 0.0) + 2 * pipes.get("fp32x2", 0.0) + products) / rates["fma"],
        "heavy": products / rates["heavy"],
        "alu": (pipes.get("int", 0.0) + pipes.get("convert", 0.0)) / rates["alu"],
        "xu": pipes.get("xu", 0.0) / rates["xu"],
        "issue": sum(pipes.values()) / (SCHEDULED * ISSUE),
    }


def slots_of_copy(bytes_per_element: float, device: str) -> float:
    """Instructions that the device issues in the time in which it copies an element's bytes."""
    target = device_named(device)
    return target.multiprocessors * target.clock * ISSUE * bytes_per_element / target.copy_bandwidth


def instructions(row: Mapping[str, Any], *, seeds: int = 1, stages: int = 1, stochastic: int = 0) -> dict[str, float]:
    """Instructions per element by pipe of a pass with `seeds`, or of a chain of `stages` with `seeds` in each.

    row: of machine_code.json. stochastic: how many of a chain's stages round stochastically (a pass has rows for each).

    Raises:
        ValueError: for more than one seed where the kernel takes one, or further ones were not counted.
    """
    if seeds > 1 and not row.get("pipes_extra"):
        raise ValueError(f"a further seed was not counted in {row['name']}")
    parts = [(stages - stochastic, row["pipes"]), (stages * (seeds - 1), row.get("pipes_extra", {}))]
    parts += [(stochastic, row.get("pipes_stochastic", {})), (1, row.get("pipes_once", {}))]
    total: dict[str, float] = {}
    for times, pipes in parts:
        for pipe, count in pipes.items() if times else ():
            total[pipe] = total.get(pipe, 0.0) + times * count
    return total


def compute_limit(row: Mapping[str, Any], device: str, pipes: Mapping[str, float] | None = None) -> tuple[str, float]:
    """The unit that is busy the longest and its seconds per element on the whole device.

    row: of machine_code.json, for the device's architecture. pipes: of `instructions`; by default those for one seed.
    """
    target = device_named(device)
    if row["arch"] != target.arch:
        raise ValueError(
            f"row is code for {row['arch']} and {device} has {target.arch}: take the row of that architecture"
        )
    busy = clocks(row["pipes"] if pipes is None else pipes, target.arch)
    unit, longest = max(busy.items(), key=lambda item: item[1])
    return unit, longest / (target.multiprocessors * target.clock)


def seconds(
    row: Mapping[str, Any], bytes_per_element: float, device: str, pipes: Mapping[str, float] | None = None
) -> float:
    """Seconds per element that the pass of `row` should take on `device`; arguments as those of predicted_share."""
    memory = bytes_per_element / device_named(device).copy_bandwidth
    _, compute = compute_limit(row, device, pipes)
    time: float = (memory**SHARPNESS + compute**SHARPNESS) ** (1 / SHARPNESS)
    return time


def predicted_share(
    row: Mapping[str, Any], bytes_per_element: float, device: str, pipes: Mapping[str, float] | None = None
) -> float:
    """Share of the copy bandwidth, in (0, 1], that the pass of `row` should reach on `device`.

    Args:
        row: a kernel of machine_code.json, for the device's architecture.
        bytes_per_element: read plus written, as the pass must move them (`bytes_moved`).
        device: "A100", "H100", "H200", "B200", a full name with one of these in it, or "sm_80", "sm_90", "sm_100".
        pipes: of `instructions`, for more seeds than one or for a chain.

    Raises:
        ValueError: for a device that there are no figures of, or a row of another architecture.
    """
    memory = bytes_per_element / device_named(device).copy_bandwidth
    return memory / seconds(row, bytes_per_element, device, pipes)


def bytes_moved(row: Mapping[str, Any]) -> int:
    """Bytes that a pass of this kind reads and writes per element: the weight, and each state."""
    return bytes_per_element(Case("", row["rule"], row["dtype"], state_dtype=row["state"]))
