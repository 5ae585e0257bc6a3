"""What a pass costs at least: its bytes, its operations, and on a GPU the instructions that it must issue.

Bytes are those that the pass must move, not those that it moves: each weight read and written, each state read and,
where the rule changes it, written. z and the table of chunks cost nothing. The model of a GPU (docs/benchmarks.md):

    available = bytes / copy bandwidth * SMs * 128 * clock       instructions of a thread, per element
    predicted = min(1, available / slots)                        share of the copy bandwidth

with `slots` as benchmarks/machine_code.py counts them in the compiled code. It knows one limit of issue, not each
pipe's, and takes the highest clock, which a GPU under load may not hold: it is an upper bound.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from zokern.bench.cases import SIZES, Case
from zokern.rules import RULES

ISSUE_PER_CLOCK = 128  # of an SM: four schedulers, a warp of 32 threads each (sm_80 and later)

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
    return 2 * SIZES[case.dtype] + (len(rule.states) + rule.written) * SIZES[case.state_dtype]


def operations_per_element(case: Case) -> float:
    """Arithmetic of an element as the source has it; what an instruction set makes of it differs."""
    noise = SIGN if case.distribution == "rademacher" else NORMAL
    each, once = RULE[case.rule]
    rounded = (case.rounding == "stochastic") + (RULES[case.rule].written if case.state_dtype != "float32" else 0)
    return DECAY + case.seeds * (noise + each) + once + rounded * ROUNDING


def memory_needed(case: Case, elements: int) -> int:
    """Bytes of device memory for a case, roughly: ours, the peers' and the copy's tensors, and `foreach`'s temporaries."""
    kept = SIZES[case.dtype] + len(RULES[case.rule].states) * SIZES[case.state_dtype]
    return elements * (2 * kept + bytes_per_element(case) + 4 * max(SIZES[case.dtype], SIZES[case.state_dtype]))


@dataclass(frozen=True)
class Issue:
    """How fast a GPU issues: instructions of a thread per second, all SMs together."""

    multiprocessors: int
    clock_hz: float
    source: str  # of the clock

    @property
    def per_second(self) -> float:
        return self.multiprocessors * ISSUE_PER_CLOCK * self.clock_hz

    def predicted(self, slots: float, nbytes: float, copy_bytes_per_second: float) -> float:
        """Share of the copy bandwidth that an element of `nbytes` and `slots` can reach."""
        return min(1.0, nbytes / copy_bytes_per_second * self.per_second / slots)

    def facts(self) -> dict[str, Any]:
        return {**asdict(self), "per_second": self.per_second}


def issue(device: torch.device) -> Issue | str:
    """The device's rate of issue, or why it is not known."""
    if device.type != "cuda":
        return "the model is of GPUs"
    properties = torch.cuda.get_device_properties(device)
    kilohertz = getattr(properties, "clock_rate", None)  # PyTorch 2.8 and later have it
    if kilohertz:
        return Issue(properties.multi_processor_count, 1e3 * kilohertz, "torch.cuda.get_device_properties")
    # nvidia-smi numbers all GPUs, torch only the visible ones: ask for this one by its UUID.
    uuid = getattr(properties, "uuid", None)
    command = ["nvidia-smi", f"--id=GPU-{uuid}", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return Issue(properties.multi_processor_count, 1e6 * float(text), "nvidia-smi clocks.max.sm")
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        return f"neither torch nor nvidia-smi tells the clock ({error})"


_RULES_CUDA = {"axpy": "Axpy", "scaled_axpy": "ScaledAxpy", "hizoo": "HiZOO<false>", "hizoo_restore": "HiZOO<true>",
               "helene": "Helene"}  # fmt: skip
_TYPES_CUDA = {"float32": "float", "bfloat16": "__nv_bfloat16", "float16": "__half"}
_TYPES_TRITON = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def kernel_name(case: Case, backend: str) -> str | None:
    """The name of the case's kernel in the table of benchmarks/machine_code.py; None where that has none."""
    if backend == "triton":
        if case.state_dtype != "float32":
            return None  # counted with float32 states only
        return f"triton {case.rule}<{_TYPES_TRITON[case.dtype]}, {case.distribution}, {case.rounding}>"
    state = _TYPES_CUDA[case.state_dtype if RULES[case.rule].states else "float32"]
    kind = int(case.distribution == "rademacher"), int(case.rounding == "stochastic"), int(case.seeds > 1)
    numbers = "(zk::Distribution){}, (zk::Rounding){}, (zk::cuda::Seeds){}".format(*kind)
    return f"zk::cuda::rule_kernel<{_TYPES_CUDA[case.dtype]}, {state}, zk::gpu::{_RULES_CUDA[case.rule]}, {numbers}>"


def slots(case: Case, backend: str, kernels: Sequence[Mapping[str, Any]], arch: int) -> float | None:
    """Instruction slots per element of the case's kernel for compute capability `arch` (90 for 9.0); None: not counted."""
    name = kernel_name(case, backend)
    for entry in kernels:
        if entry["name"] == name and entry["arch"] == arch:
            one = entry["slots"] if "slots" in entry else entry["slots_per_element_k1"]
            more = entry.get("slots_per_extra_seed")
            if one is None or (case.seeds > 1 and more is None):
                return None
            return float(one) + (case.seeds - 1) * float(more or 0.0)
    return None
