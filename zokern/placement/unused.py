"""Which matrices a closure does not use, under placement="forward": their updates go along what no loss has seen."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from zokern.placement import plus
from zokern.placement.plus import PlusLowRank

PROBES = 20  # one of them at least uses each matrix that a closure uses: experts take turns


class Unused:
    """Of one placement. probed: the last probes, with one set of stand-ins. told: once is enough."""

    def __init__(self) -> None:
        self.probed, self.told = 0, False

    def look(self, stand_ins: Sequence[PlusLowRank]) -> None:
        """After a probe with these: whether the last ones have used them all. Compiled code does not tell."""
        self.probed += 1
        if self.probed < PROBES or self.told or plus.TRACED[0]:
            return
        unused = [one.parameter for one in stand_ins if not one.seen[0]]
        self.probed = 0
        for one in stand_ins:
            one.seen[0] = False
        if unused:
            self.told = True
            names = ", ".join(unused[:3]) + ", ..." * (len(unused) > 3)
            print(
                f"zokern: {len(unused)} of {len(stand_ins)} matrices ({names}) were in no product or lookup of {PROBES} "
                "probes, but are updated. Freeze what the closure does not use; what it reads past torch (numpy, an alias, "
                "an engine) is not perturbed there: use placement='inplace'",
                file=sys.stderr,
            )
