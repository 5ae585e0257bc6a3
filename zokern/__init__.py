"""zokern: fused kernels and a drop-in optimizer for zeroth-order fine-tuning, with forward passes only."""

from zokern import journal
from zokern._checks import ZokernWarning
from zokern._version import __version__
from zokern.directions import Normal, Rademacher
from zokern.graphs import GraphedStep
from zokern.layers import RandomBlocks
from zokern.noise import noise
from zokern.ops import add_noise_
from zokern.optim import ES, FZOO, HELENE, ByLayer, HiZOO, LeZO, MeZO, MeZOGreedy, MeZOGV

__all__ = [
    "ES",
    "FZOO",
    "HELENE",
    "ByLayer",
    "GraphedStep",
    "HiZOO",
    "LeZO",
    "MeZO",
    "MeZOGV",
    "MeZOGreedy",
    "Normal",
    "Rademacher",
    "RandomBlocks",
    "ZokernWarning",
    "__version__",
    "add_noise_",
    "journal",
    "noise",
]
