"""How often each instruction runs, for interpreted.py: python -m tests.ptx.counts cuda 90

A line of JSON for each rule: what ran, for how many elements, and how often each opcode did, all threads together; of AMD's
machine code, in loops. Passes over whole chunks of bfloat16 weights, float32 states, rounded to nearest, without decay, of
one seed and of three.
"""

from __future__ import annotations

import json
import sys

from .target import architecture

SEEDS = (1, 3)


def main() -> None:
    backend_name, arch = sys.argv[1], architecture(sys.argv[2])
    from zokern.contract.rules import RULES

    from . import cuda_host, triton_host
    from .cases import BF16, LAYOUTS, Case
    from .emulator import Emulator

    emulator = Emulator(arch)
    backend = (cuda_host if backend_name == "cuda" else triton_host).install(emulator)
    elements = LAYOUTS["chunks"][0][0]
    for rule in RULES:
        for k in SEEDS:
            # Seed 1: no decay. Triton's are counted as they are compiled where a step may be skipped.
            case = Case(rule, BF16, k=k, layout="chunks", seed=1, enabled=1 if backend_name == "triton" else None)
            case.run(backend, case.tensors(), False)
            launch = emulator.launches[-1]
            executed = emulator.interpreter.opcodes(emulator.sources[launch.kernel], launch.report.runs)
            print(json.dumps({"rule": rule, "seeds": k, "elements": elements, "executed": executed}), flush=True)


if __name__ == "__main__":
    main()
