"""AMD's code of Triton's passes: counted as NVIDIA's is (counts.py), and whether it computes what the contract asks.

A wave's instruction serves 64 lanes, each of which has eight elements: instructions / 8 are slots per element. A report
has what NVIDIA's has. registers: vector registers, of which 64 or fewer let a SIMD hold as many waves as it can;
stack_bytes: scratch. Besides: scalar_registers; scalar_spills, to lanes of vector registers, anywhere in the kernel, and
those in the hot loop are the pipe "spill"; lds, accesses to shared memory in the hot loop; and deviations.

Pipes of vector instructions: "packed" makes two float32 results at once, "product" multiplies 32-bit integers, "cvt"
converts, "trans" is transcendental, "valu" are the others. Not counted is what surrounds the loop over further seeds, once
for a tile: with several seeds some scalars are fetched there too.
"""

from __future__ import annotations

import re

from .counts import Report, of_triton
from .listing import Kernel, ffma, read_amd

AMD = {"gfx942": "MI300X", "gfx950": "MI355X"}
WAVE = 64
RESOURCES = {
    "registers": "vgpr_count", "scalar_registers": "sgpr_count", "spills": "vgpr_spill_count",
    "scalar_spills": "sgpr_spill_count", "stack_bytes": "private_segment_fixed_size",
}  # fmt: skip
# Subnormals are kept, everything is rounded to nearest even, and NaNs are as IEEE 754 has them.
MODES = {"float_denorm_mode_32": 3, "float_denorm_mode_16_64": 3, "float_round_mode_32": 0, "float_round_mode_16_64": 0,
         "ieee_mode": 1}  # fmt: skip


def architecture(text: str) -> int | str | None:
    """90 of "90" or "sm_90", or a name of AMD's; None of anything else."""
    number = text.removeprefix("sm_")
    return text if text in AMD else int(number) if number.isdigit() else None


def analyse(name: str, arch: str, assembly: str, llir: str, stored_size: int) -> Report:
    """Counts a pass. llir: the LLVM IR that the assembly was made of."""
    kernel = read_amd(assembly)
    resources = {key: _told(of, assembly) for key, of in RESOURCES.items()}
    counted = of_triton(name, kernel, stored_size)
    code = [i for loop in whole_tiles(kernel) for i in kernel.code(loop)]
    lds = sum(i.pipe == "lds" for i in code)
    return {"name": name, "arch": arch, **resources, **counted, "lds": lds,
            "deviations": deviations(kernel, assembly, llir)}  # fmt: skip


def _told(of: str, assembly: str) -> int:
    found = re.search(rf"^\s+\.{of}:\s+(\d+)", assembly, flags=re.MULTILINE)
    if found is None:
        raise ValueError(f"the assembly does not say its {of}")
    return int(found[1])


def _outermost(kernel: Kernel) -> list[frozenset[int]]:
    return [loop.blocks for loop in kernel.loops if not any(loop.blocks < other.blocks for other in kernel.loops)]


def whole_tiles(kernel: Kernel) -> list[frozenset[int]]:
    """The loops, with all inside, that store 16 bytes at a time and nothing else."""
    return [blocks for blocks in _outermost(kernel) if {i.stored for i in kernel.code(blocks)} - {0} == {16}]


def deviations(kernel: Kernel, assembly: str, llir: str) -> list[str]:
    """In which the code may compute other bits than docs/noise.md asks; none where all is well.

    A contracted product is a fused multiply-add that the LLVM IR has not. Looked at are the loops over tiles, whole and
    masked: outside of them LLVM divides integers by floats that it corrects.
    """
    wrong = []
    for mode, wanted in MODES.items():
        if (found := re.findall(rf"\.amdhsa_{mode} (\d)", assembly)) != [str(wanted)]:
            wrong.append(f"{mode} is {', '.join(found) or 'not told'} and should be {wanted}")
    code = [i for blocks in _outermost(kernel) for i in kernel.code(sorted(blocks))]
    if (asked := fused_in(llir)) != (done := ffma(code)):
        wrong.append(f"{asked} fused multiply-adds were asked and {done} are done")
    for i in code:
        if re.match(r"v_(pk_)?(mad|mac)\w*_f", i.opcode):
            wrong.append(f"{i.opcode} rounds its product")
        if re.match(r"v_fma_mix(lo|hi)", i.opcode):  # zokern/backends/triton/rounding.py
            wrong.append(f"{i.opcode} may round once where two roundings were asked")
        elif re.match(r"v_fma_mix|v_dot|v_(pk_)?(fma|mul|add|sub)\w*_f16|v_\w+_legacy_|v_cvt_pkrtz|s_setreg", i.opcode):
            wrong.append(f"{i.opcode} is none that is known to compute what was asked")
        if i.pipe == "trans":
            wrong.append(f"{i.opcode} is not correctly rounded")
        if "_f" in i.opcode and re.search(r"\bclamp\b|\b(mul|div):\d", i.operands):
            wrong.append(f"{i.opcode} {i.operands} changes its result")
    return wrong


def fused_in(llir: str) -> int:
    """Fused multiply-adds of the LLVM IR; one of a pair counts twice."""
    return sum(int(n or 1) for n in re.findall(r"call [^@\n]*@llvm\.fma\.(?:v(\d+))?f32\(", llir))
