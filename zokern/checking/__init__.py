"""`zokern.check`: does the loss react to the weights that an optimizer perturbs? To be asked before the first long run.

run.py asks; subject.py says which tensors, runs.py evaluates the closure, perturbed.py shows it one perturbed tensor,
eager.py watches what it reads, verdict.py judges, cost.py counts a step, result.py and table.py say it.
"""

from __future__ import annotations

from zokern.checking.cost import Cost
from zokern.checking.result import Finding, Result, Row
from zokern.checking.run import check

__all__ = ["Cost", "Finding", "Result", "Row", "check"]
