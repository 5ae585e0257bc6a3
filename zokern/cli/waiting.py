"""How long torch's CPU threads spin while they wait for each other.

GCC's OpenMP, which torch's wheels for Linux bring, reads this once, when it is loaded. Its threads spin for milliseconds,
and take the time of whatever else runs on those processors, the thread that they wait for included.
"""

from __future__ import annotations

import os

# Rounds of a loop, some tens of microseconds. On two idle cores the demo's steps are as fast as with GCC's own 300,000, and
# a tenth slower with 1,000; beside a process that keeps one core busy they take a tenth longer than with 1,000, and with
# 300,000 four times as long.
SPINS = "10000"
ASKED_FOR = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def spin_briefly() -> None:
    """Before torch is imported. Whoever has set one of ASKED_FOR keeps it."""
    if not any(name in os.environ for name in ASKED_FOR):
        os.environ["GOMP_SPINCOUNT"] = SPINS
