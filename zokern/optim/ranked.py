"""What an optimizer is to the ranks of a job: who takes part with it, found out before its first step."""

from __future__ import annotations

import sys

from zokern.distributed import finding
from zokern.distributed.places import Places
from zokern.optim.built import Built
from zokern.optim.ranks import Ranks


class Ranked(Built):
    def _places(self) -> Places | None:
        """
        Raises:
            RuntimeError, ValueError: where it is not known who takes part.
        """
        if self.reduce is not None and self.process_group == "auto" and self.parallel is None:
            return None  # the user's own
        return finding.find(self.process_group, self.parallel, self._wrapper, self.module, self._tensors())

    def _take_part(self) -> Ranks | None:
        """Once, before the first step."""
        found = self._places()
        self._decided, self._ranks = True, None
        if found is None:
            return None
        if self.reduce is not None:
            self._decided = False
            raise ValueError(
                "reduce is set, and process_group says that ranks train one model: they put the losses together already; "
                "leave reduce None, or give process_group=None"
            )
        self._ranks = Ranks(found)
        if found.me == 0:
            print(f"zokern: {found.describe()}", file=sys.stderr)
        return self._ranks

    @property
    def rank(self) -> int:
        """This process' place among the ranks that train the model with it, from 0; 0 for one process alone."""
        found = self._ranks.places if self._ranks is not None else self._places()
        return 0 if found is None else found.me

    @property
    def num_ranks(self) -> int:
        """How many ranks train the model together: 1 for one process alone."""
        found = self._ranks.places if self._ranks is not None else self._places()
        return 1 if found is None else found.size

    def wait_for_ranks(self) -> None:
        """Waits until all ranks have come here, however long that takes: after work that one of them does alone, as saving
        or evaluating, which may take longer than exchange_timeout. Does nothing for one process alone."""
        ranks = self._ranks if self._decided else self._take_part()
        if ranks is not None:
            ranks.wait(self)

    def exchanged(self) -> dict[str, int]:
        """ "collectives" and "bytes" that this rank has sent so far, all of its exchanges together."""
        if self._ranks is None:
            return {"collectives": 0, "bytes": 0}
        return {"collectives": self._ranks.exchange.collectives, "bytes": self._ranks.exchange.sent}
