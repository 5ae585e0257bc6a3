"""Where each backend's tensors lie in these tests. A test that names a backend asks here, and nowhere else.

On a GPU where there is one, for its backends; Triton runs on the CPU otherwise, in its interpreter. And both run there,
their kernels in an interpreter of PTX, under `python -m pytest -p tests.ptx.plugin`.
"""

from __future__ import annotations

import sys

import pytest
import torch

from zokern import backends

EMULATED = "tests.ptx.plugin" in sys.modules
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
DEVICE = {
    "cuda": CPU if EMULATED else torch.device("cuda"),
    "triton": CPU if EMULATED else GPU,
    "cpu": CPU,
    "reference": CPU,
}
# A launch takes seconds in Triton's interpreter, so that some tests take fewer or smaller tensors there.
SLOW = {"triton"} if GPU.type == "cpu" and not EMULATED else set()


def missing(backend: str) -> str | None:
    """Why a backend cannot run on its device."""
    reason = backends.unavailable_reason(backend, DEVICE[backend])
    return None if reason is None else f"{backend}: {reason}"


def device_of(backend: str) -> torch.device:
    """A backend's device; the test is skipped, with the reason, where the backend cannot run."""
    if (reason := missing(backend)) is not None:
        pytest.skip(reason)
    return DEVICE[backend]
