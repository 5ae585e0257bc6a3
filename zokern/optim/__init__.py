"""The optimizers: base.py has the step they share, and each method is one file and one entry in METHODS."""

from zokern.optim.base import ZerothOrderOptimizer
from zokern.optim.candidates import MeZOGreedy, MeZOGV
from zokern.optim.es import ES
from zokern.optim.fzoo import FZOO
from zokern.optim.helene import HELENE, ByLayer
from zokern.optim.hizoo import HiZOO
from zokern.optim.mezo import LeZO, MeZO

METHODS: dict[str, type[ZerothOrderOptimizer]] = {
    "mezo": MeZO,
    "lezo": LeZO,
    "hizoo": HiZOO,
    "helene": HELENE,
    "mezo-gv": MeZOGV,
    "mezo-greedy": MeZOGreedy,
    "fzoo": FZOO,
    "es": ES,
}

__all__ = [
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
