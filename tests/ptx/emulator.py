"""A GPU that is not there: what is launched on it runs in the interpreter, on the tensors that the launch may touch."""

from __future__ import annotations

import ctypes
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .faults import Report
from .memory import Allocation


@dataclass
class Launch:
    kernel: str
    seconds: float
    report: Report


@dataclass
class Emulator:
    arch: int | str  # 90 for sm_90, or AMD's gfx942
    launches: list[Launch] = field(default_factory=list)
    programs: dict[str, Any] = field(default_factory=dict)  # by the kernel's name
    sources: dict[str, str] = field(default_factory=dict)  # their PTX, or AMD's assembly
    covered: dict[str, set[int]] = field(default_factory=dict)  # blocks that ran
    allocations: list[Allocation] = field(default_factory=list)  # of the pass that is being launched

    def program(self, name: str, text: Callable[[], str]) -> Any:
        if name not in self.programs:
            self.sources[name] = text()
            self.programs[name] = self.interpreter.program(self.sources[name])
        return self.programs[name]

    @property
    def interpreter(self) -> Any:
        """Of the architecture: tests/ptx/interpreter.py, or its like for AMD's."""
        return importlib.import_module(
            "tests.ptx.interpreter" if isinstance(self.arch, int) else "tests.gcn.interpreter"
        )

    def run(
        self,
        name: str,
        grid: int,
        block: int,
        arguments: bytes,
        more: list[Allocation] | None = None,
        shared: int = 0,
    ) -> None:
        """One launch; `more` memory belongs to its arguments alone, `shared` bytes are asked for by it."""
        known: dict[int, Allocation] = {}
        for a in [*self.allocations, *(more or [])]:
            if a.size:
                known.setdefault(a.address, a)
        start = time.perf_counter()
        machine = self.interpreter.Machine(self.programs[name], grid, block, arguments, list(known.values()), shared)
        report = machine.run()
        self.launches.append(Launch(name, time.perf_counter() - start, report))
        self.covered.setdefault(name, set()).update(report.blocks)

    def faults(self, first: int = 0) -> list[str]:
        """Of all launches from the first on."""
        return [told for launch in self.launches[first:] for told in launch.report.told()]

    def unset(self) -> list[str]:
        """Kernels that may read a register before it is set."""
        return [f"{name}: {', '.join(p.unset)} may be unset" for name, p in self.programs.items() if p.unset]

    def coverage(self) -> tuple[int, int]:
        """Instructions of the kernels that ran, and how many of them did."""
        sizes = {name: self.programs[name].sizes for name in self.covered}
        return sum(map(sum, sizes.values())), sum(sizes[name][b] for name, ran in self.covered.items() for b in ran)


def watch(module: Any, emulator: Emulator) -> None:
    """A backend's run and run_chain may touch what their tables name, and nothing else; of factors, which `fill` makes
    before, each side by itself, whatever memory is around it."""
    module.run = _watched(module.run, _of_pass, emulator)
    module.run_chain = _watched(module.run_chain, _of_chain, emulator)
    if hasattr(module, "fill"):
        module.fill = _filling(module.fill, emulator)


def _watched(
    function: Callable[..., None], found: Callable[..., list[Allocation]], emulator: Emulator
) -> Callable[..., None]:
    def run(table: Any, *rest: Any) -> None:
        emulator.allocations = found(table, *rest)
        try:
            function(table, *rest)
        finally:
            emulator.allocations = []

    return run


def _filling(function: Callable[..., None], emulator: Emulator) -> Callable[..., None]:
    def fill(factors: Any, piece: Any, seeds: Tensor, address: int) -> None:
        end = address + 4 * piece.of_seed * seeds.numel()
        # What is left of a piece before this one is free again, and this one's may lie there.
        before = [a for a in emulator.allocations if a.address + a.size <= address or a.address >= end]
        made = _sides(factors, piece, seeds.numel(), address)
        emulator.allocations = [
            *allocation(factors.sides, "sides"),
            *allocation(factors.side_chunks, "side chunks"),
            *allocation(seeds, "seeds"),
            *made,
        ]
        try:
            function(factors, piece, seeds, address)
        finally:
            emulator.allocations = before + [replace(a, writable=False, initialised=True) for a in made]
        if wrong := _differ_from_cpu(factors, piece, seeds, made, address):
            emulator.launches[-1].report.fault("factors", "fill", len(wrong), f"{wrong[0]} is not the CPU's")

    return fill


def _differ_from_cpu(factors: Any, piece: Any, seeds: Tensor, made: list[Allocation], address: int) -> list[str]:
    """The sides that have another bit than what the CPU makes: a pass shows few of a factor's bits."""
    from zokern.backends import cpu

    values = torch.empty(piece.of_seed * seeds.numel())
    cpu.fill(factors, piece, seeds, values.data_ptr())
    moved = values.data_ptr() - address
    return [a.name for a in made if ctypes.string_at(a.address, a.size) != ctypes.string_at(a.address + moved, a.size)]


def _sides(factors: Any, piece: Any, num_seeds: int, address: int) -> list[Allocation]:
    """U and V of each tensor of a piece and of each seed, with their exact sizes, before they are made."""
    sides, first, last = factors.sides.tolist(), *piece.sides
    found = []
    for n in dict.fromkeys(factors.side_chunks[first:last, 0].tolist()):
        numel, _, right, place = sides[n]
        for k in range(num_seeds):
            at = address + 4 * (k * piece.of_seed + place - piece.places[0])
            found.append(Allocation(f"{'UV'[right]}[{n // 2}] of seed {k}", at, 4 * numel, True, initialised=False))
    return found


def allocation(t: Tensor | None, name: str, writable: bool = False) -> list[Allocation]:
    return [] if t is None else [Allocation(name, t.data_ptr(), t.numel() * t.element_size(), writable)]


def _of_pass(table: Any, kind: Any, scalars: Any) -> list[Allocation]:
    written = min(kind.rule.written, 1) if kind.keep_second else kind.rule.written
    return [*_of_numbers(scalars), *_of_table(table, written)]


def _of_chain(table: Any, chain: Any) -> list[Allocation]:
    written = min(chain.rule.written, 1) if chain.keep_second else chain.rule.written
    found = allocation(chain.enabled, "enabled")
    for _, scalars in chain.stages:
        found += _of_numbers(scalars)
    return found + _of_table(table, written)


def _of_numbers(scalars: Any) -> list[Allocation]:
    return [
        *allocation(scalars.seeds, "seeds"),
        *allocation(scalars.coefs, "coefs"),
        *allocation(scalars.shared, "scalars"),
        *allocation(scalars.rounding_seed, "rounding_seed"),
        *allocation(scalars.enabled, "enabled"),
    ]


def _of_table(table: Any, written: int) -> list[Allocation]:
    """The table itself and what its rows point at, with its exact size; the first `written` states may be changed."""
    item, state_item = table.dtype.itemsize, table.state_dtype.itemsize
    found = [*allocation(table.tensors, "tensors"), *allocation(table.chunks, "chunks")]
    if table.factors is not None:
        found += allocation(table.factors.rows, "factor rows")
    for n, (numel, *_, src, dst, state0, state1, probe) in enumerate(table.tensors.tolist()):
        found.append(Allocation(f"dst[{n}]", dst, numel * item, True, initialised=src == dst))
        if src != dst:
            found.append(Allocation(f"src[{n}]", src, numel * item, False))
        for i, address in enumerate((state0, state1)):
            if address:
                found.append(Allocation(f"state{i}[{n}]", address, numel * state_item, i < written))
        if probe:
            found.append(Allocation(f"probe[{n}]", probe, numel * item, True, initialised=False))
    return found
