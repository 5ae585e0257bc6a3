"""How long torch's CPU threads spin while they wait for each other.

GCC's OpenMP, which torch's wheels for Linux bring, reads this once, when it is loaded. Its threads spin for milliseconds,
and take the time of whatever else runs on those processors, the thread that they wait for included.
"""

from __future__ import annotations

import os

SPINS = "1000"  # rounds of a loop, some microseconds
ASKED_FOR = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def spin_briefly() -> None:
    """Before torch is imported. Whoever has set one of ASKED_FOR keeps it."""
    if not any(name in os.environ for name in ASKED_FOR):
        os.environ["GOMP_SPINCOUNT"] = SPINS
