"""What a pass costs at least: the bytes that it must move, and its operations as the source has them.

Bytes are those that the pass must move, not those that it moves: each weight read and written, each state read and,
where the rule changes it, written; a chain's sweep moves them once, and writes its probe. z and the table of chunks cost
nothing. What the compiled code makes of the operations, and what speed that allows, is model.py's.
"""

from __future__ import annotations

from zokern.bench.cases import SIZES, Case
from zokern.contract.rules import RULES

# Operations per element, counted in csrc/noise.h and csrc/rules.h. A fused multiply-add, an integer instruction and a
# conversion count as one each; key additions, which are the same for all elements, as none.
PHILOX = 10 * (2 + 4)  # a block: ten rounds of two wide multiplications and four exclusive ors
NORMAL = PHILOX / 8 + 34 / 2  # a block serves 8 elements; normal_pair takes 34 operations for two
SIGN = PHILOX / 128 + 2  # a block serves 128 elements; a shift, and the sign put into 1.0
ROUNDING = PHILOX / 8 + 1 + 2  # the 16 bits of a word; addition and shift
DECAY = 1
# For each seed beside the noise, and once at the end; an inverse root takes 9, an inverse 7.
RULE = {
    "axpy": (1, 0),
    "scaled_axpy": (1, 9 + 1),
    "hizoo": (1 + 2, 1 + 2 + 9 + 1),
    "hizoo_restore": (2 + 2, 9 + 1 + 1 + 2 + 9 + 1),
    "helene": (2 + 2, 2 + 2 + 1 + 7 + 1),
}


def bytes_per_element(case: Case) -> int:
    """Bytes of memory that an element of the pass must move, read and written."""
    rule = RULES[case.rule]
    return (2 + case.fork) * SIZES[case.dtype] + (len(rule.states) + rule.written) * SIZES[case.state_dtype]


def operations_per_element(case: Case) -> float:
    """Arithmetic of an element as the source has it; what an instruction set makes of it differs."""
    noise = SIGN if case.distribution == "rademacher" else NORMAL
    each, once = RULE[case.rule]
    rounded = case.stochastic_stages + (RULES[case.rule].written if case.state_dtype != "float32" else 0)
    return case.stages * (DECAY + case.seeds * (noise + each) + once) + rounded * ROUNDING


def memory_needed(case: Case, elements: int) -> int:
    """Bytes of device memory for a case, roughly: ours, the peers' and the copy's tensors, and `foreach`'s temporaries."""
    kept = SIZES[case.dtype] + len(RULES[case.rule].states) * SIZES[case.state_dtype]
    probe = case.fork * SIZES[case.dtype]
    temporaries = 4 * max(SIZES[case.dtype], SIZES[case.state_dtype])
    return elements * (2 * kept + probe + bytes_per_element(case) + temporaries)
