"""The optimizers: base.py has the step they share, and each method is one file and one entry in METHODS."""

from zokern.optim.base import ZerothOrderOptimizer
from zokern.optim.mezo import LeZO, MeZO

METHODS: dict[str, type[ZerothOrderOptimizer]] = {"mezo": MeZO, "lezo": LeZO}

__all__ = ["METHODS", "LeZO", "MeZO", "ZerothOrderOptimizer"]
