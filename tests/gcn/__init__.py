"""AMD's GPUs without one: an interpreter of the machine code that Triton's compiler writes for gfx942 and gfx950.

    python -m tests.ptx --backend triton --arch gfx942     # the cases of tests/ptx, the same host code and checks

tests/ptx has all that does not depend on the instructions: cases, memory and its checks, the commands. Here each
instruction is one function on all waves that are at the same place; a wave has 64 lanes. What is not known raises
`PtxError`. Kernels in another mode than IEEE's (subnormals kept, rounded to nearest even) are refused. Reciprocals, which
the hardware rounds in a way of its own, are made off by as much as it may be: nothing may depend on their last bit.

A NaN is a NaN, whatever its payload. A kernel's first block loads arguments that newer firmware has loaded already; it is
run, and must load the same.

Not shown by it: waits (`s_waitcnt`) and other hazards, orders of memory accesses other than barriers', speed.

    parse                 the assembly to instructions, and those to basic blocks
    waves, operands       registers, and how an instruction reads them
    scalar, vector,       the instructions
    arithmetic, lanes,
    accesses
    translate, machine    blocks as lists of functions; waves, branches and barriers
    mutants               changed kernels, which cases must notice
    interpreter           all of it, for the emulator

Sources: AMD Instinct MI300 (CDNA3) Instruction Set Architecture; LLVM's "User Guide for AMDGPU Backend" for how a kernel
begins.
"""
