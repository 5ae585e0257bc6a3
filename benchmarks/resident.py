"""What a process holds in main memory, as Linux counts it: the resident set and its peak. The standard library alone."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

# For the environment of a process that is measured: glibc's malloc gives large blocks back at once. By default it keeps
# some for later, in pieces that nothing fits into: that is its doing, up to half of what a backward takes.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class NotMeasured(RuntimeError):
    """The system does not tell; the message says what is missing."""


def resident() -> int:
    """Bytes that this process holds now: VmRSS."""
    return _read("VmRSS")


def peak() -> int:
    """The most bytes that it has held since forget_peak(): VmHWM."""
    return _read("VmHWM")


def forget_peak() -> None:
    """From now on peak() begins at what is held."""
    try:
        RESET.write_text("5")
    except OSError as error:
        raise NotMeasured(
            f"the peak of memory is set back by writing to {RESET}, and that failed ({error}); run this on Linux, where "
            "the process may do so"
        ) from error


def settle() -> int:
    """Gives back to the system what Python and malloc keep for later, forgets the peak, and says what is left in bytes."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # another C library than glibc keeps less
        ctypes.CDLL(None).malloc_trim(0)
    forget_peak()
    return resident()


def _read(name: str) -> int:
    if not STATUS.exists():
        raise NotMeasured(f"memory is read from {STATUS}, which is not there; run this on Linux")
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
    return int(lines[name].split()[0]) * 1024
