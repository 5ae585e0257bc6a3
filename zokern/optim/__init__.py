"""The optimizers: base.py has the step they share, and each method is one file and one row of ENTRIES."""

from zokern.optim.base import ZerothOrderOptimizer
from zokern.optim.candidates import MeZOGreedy, MeZOGV
from zokern.optim.es import ES
from zokern.optim.fzoo import FZOO
from zokern.optim.helene import HELENE, ByLayer
from zokern.optim.hizoo import HiZOO
from zokern.optim.mezo import LeZO, MeZO
from zokern.optim.registry import ENTRIES, METHODS

__all__ = [
    "ENTRIES",
    "ES",
    "FZOO",
    "HELENE",
    "METHODS",
    "ByLayer",
    "HiZOO",
    "LeZO",
    "MeZO",
    "MeZOGV",
    "MeZOGreedy",
    "ZerothOrderOptimizer",
]
