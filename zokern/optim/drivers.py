"""A method says what it wants to know, a driver finds it out.

A method's `rounds()` is a generator: it yields the probes of a round, each {seed: multiple of eps}, is sent their losses,
and returns what they say. Probes of one round do not depend on each other, so who drives may evaluate them in turn, share
them out, or do all in one forward; no method knows which.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

from torch import Tensor

from zokern.optim.losses import Reduce
from zokern.optim.update import Estimate
from zokern.passes.update import Terms

Rounds = Generator[list[Terms], list[Tensor], Estimate]


def in_turn(rounds: Rounds, evaluate: Callable[[Terms], Tensor], gather: Reduce | None = None) -> Estimate:
    """One probe after another, in the order of the round; `gather` gets a round's losses at once."""
    return at_once(rounds, lambda probes: [evaluate(terms) for terms in probes], gather)


def at_once(rounds: Rounds, evaluate: Callable[[list[Terms]], list[Tensor]], gather: Reduce | None = None) -> Estimate:
    """`evaluate` gets all probes of a round, `gather` their losses."""
    losses: list[Tensor] | None = None
    try:
        while True:
            try:
                probes = next(rounds) if losses is None else rounds.send(losses)
            except StopIteration as done:  # of the method: a closure that raises it is no method that has ended
                estimate: Estimate = done.value
                return estimate
            losses = evaluate(probes)
            if gather is not None:
                losses = gather(losses)
    finally:
        rounds.close()
