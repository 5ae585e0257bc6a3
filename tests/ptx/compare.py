"""One case on an emulated backend and on another one: what is wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cases import Case
from .emulator import Emulator

CHECKSUMS = ((0, 1 << 21), (2**32 - 5000, 5000), (12345, 70000))  # first word, number of words


def same(a: Tensor, b: Tensor) -> int:
    """How many elements differ in a bit; a NaN is a NaN (docs/noise.md)."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    differs = a.contiguous().view(whole) != b.contiguous().view(whole)
    return int((differs & ~(a.isnan() & b.isnan())).sum())


def compare(case: Case, name: str, backend: Any, peer: Any, emulator: Emulator) -> list[str]:
    """The bits of all tensors, as many launches as there must be, no faulty access, and nothing in the text that must not
    be there."""
    mine, theirs, first = case.tensors(), case.tensors(), len(emulator.launches)
    case.run(backend, mine, case.device_seeds and name == "cuda")
    case.run(peer, theirs, False)
    wrong = []
    if differ := sum(same(a, b) for a, b in zip(mine.results(), theirs.results(), strict=True)):
        wrong.append(f"{differ} elements differ")
    if (launches := len(emulator.launches) - first) != (wanted := case.launches(name == "triton")):
        wrong.append(f"{launches} launches instead of {wanted}")
    kernels = {launch.kernel: emulator.sources[launch.kernel] for launch in emulator.launches[first:]}
    return wrong + emulator.faults(first) + emulator.interpreter.wrong_in(kernels)


def notices(case: Case, name: str, backend: Any, peer: Any, emulator: Emulator) -> list[str]:
    """A case must see that its kernel was changed, or what it says of the right one means nothing."""
    if wrong := compare(case, name, backend, peer, emulator):
        return wrong
    launch = emulator.launches[-1]
    text, original = emulator.sources[launch.kernel], emulator.programs[launch.kernel]
    where = emulator.interpreter.instructions_by_block(text)
    executed = {i for block in launch.report.blocks for i in where[block]}
    every = emulator.interpreter.mutants_of(launch.kernel, text, executed)
    found = (m for m in every if m.kind.endswith("fma without its product"))
    if (mutant := next(found, None)) is None:
        return [f"{launch.kernel} has nothing to be changed"]
    emulator.programs[launch.kernel] = emulator.interpreter.translate(mutant.apply(text))
    try:
        noticed = compare(case, name, backend, peer, emulator)
    finally:
        emulator.programs[launch.kernel] = original
    return [] if any("differ" in wrong for wrong in noticed) else [f"{mutant} was not noticed"]


def checksum(name: str, emulator: Emulator, first: int, words: int) -> list[str]:
    """The sum over the normals of some words, beside the CPU's."""
    from zokern.backends import native

    before = len(emulator.launches)
    if name == "cuda":
        got = native.extension.checksum(first, first + words)
    else:
        from zokern.backends.triton.checksum import normal_checksum

        got = normal_checksum(first, first + words, torch.device("cpu"))
    wanted = native.extension.cpu_normal_checksum(first, first + words, 1, native.extension.cpu_instruction_sets()[0])
    return ([] if got == wanted else [f"sum {got} instead of {wanted}"]) + emulator.faults(before)
