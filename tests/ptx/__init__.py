"""The GPU kernels without a GPU: an interpreter of PTX that runs them as the project's own host code launches them. AMD's
machine code has one in tests/gcn, which the same commands run.

    make test-kernels                 # every case, every architecture, whole steps: python -m tests.ptx --help
    python -m tests.ptx --quick       # a selection, in seconds
    python -m tests.ptx.mutate        # how many one-instruction changes of the kernels the cases notice
    python -m pytest -p tests.ptx.plugin tests/backends/test_rules.py -k "cuda or triton"    # the suite's own tests

Tensors stay on the CPU. All bits are compared with the CPU backend's, and every access is checked: bounds of each tensor,
alignment, state space, bytes that were never written, races between threads, barriers. What the interpreter does not
know raises `PtxError`: it guesses nothing. Compiled things are kept in $ZOKERN_PTX_CACHE, by default in the temporary
folder.

Not shown by it: what ptxas makes of the PTX, orders of memory accesses other than barriers', registers, speed.

    parse, blocks, halves            PTX to instructions, and those to basic blocks with their live registers
    writer, floats, integers,        a block as a Python function on NumPy arrays, one element for each thread
    accesses, translate, arithmetic
    interpreter                      all of it, for the emulator; tests/gcn has its like
    groups, machine, memory, races,  threads, what they may touch, and the checks
    emulator, cuda_host,             the project's backends with the emulator in the place of a GPU
    triton_host, build, cache
    cases, selection, compare,       what is run, and what is right
    steps, lint
    __main__, runner, target,        the commands
    worker, mutate
    plugin                           for pytest
"""
