"""The methods: one row each. What a row lists is found by the command, the benchmarks, the tests and the docs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from zokern.optim.base import ZerothOrderOptimizer
from zokern.optim.candidates import MeZOGreedy, MeZOGV
from zokern.optim.es import ES
from zokern.optim.fzoo import FZOO
from zokern.optim.helene import HELENE
from zokern.optim.hizoo import HiZOO
from zokern.optim.mezo import LeZO, MeZO


class Entry(NamedTuple):
    """about: what it does, in half a line. lr: what suits encoders of some ten million parameters; lr_of: likewise, for
    each `update`. forwards, passes and state (for each parameter) are for people, in the letter that stands for `many`."""

    cls: type[ZerothOrderOptimizer]
    title: str
    about: str
    lr: float
    forwards: str
    passes: str
    state: str = "0 bytes"
    many: str = ""
    also: str = ""
    lr_of: Mapping[str, float] = {}


_UPDATES = {"momentum": 5e-6, "adam": 5e-4, "adamezo": 1e-4, "sign": 3e-4}
ENTRIES: dict[str, Entry] = {
    "mezo": Entry(
        MeZO, "MeZO", "two forwards and plain steps", 5e-5, "2n", "2n + 1", "0 bytes (momentum 4, Adam 8)", "n samples",
        "; one-sided, signs, momentum, Adam, AdaMeZO", _UPDATES,
    ),
    "lezo": Entry(
        LeZO, "LeZO", "mezo on random blocks", 2e-4,
        "the method's", "the method's, of the active blocks only", "the method's",
        also=", or `layers=zokern.RandomBlocks(n)` with any method", lr_of=_UPDATES,
    ),
    "hizoo": Entry(
        HiZOO, "HiZOO", "a diagonal curvature from one forward more", 5e-5,
        "2n + 1", "2n + 1", "4 bytes (or 2)", "n samples",
    ),
    "helene": Entry(
        HELENE, "HELENE", "momentum over a curvature with a floor", 5e-6, "2n", "2n + 1", "8 bytes", "n samples"
    ),
    "mezo-gv": Entry(
        MeZOGV, "MeZO-GV", "a vector from several candidate directions", 1e-4, "M + 2", "M + 3", many="M candidates"
    ),
    "mezo-greedy": Entry(
        MeZOGreedy, "MeZO-Greedy", "the best of several candidate directions", 5e-5, "M + 1", "M + 2", many="M candidates"
    ),
    "fzoo": Entry(
        FZOO, "FZOO", "random signs, steps scaled by the losses' spread", 5e-6, "N + 1", "N + 1", many="N candidates"
    ),
    "es": Entry(
        ES, "Evolution strategies", "many directions weighted by reward", 5e-6, "N (antithetic 2N)", "N + 1 (2N + 1)",
        many="N directions",
    ),
}  # fmt: skip
METHODS: dict[str, type[ZerothOrderOptimizer]] = {name: entry.cls for name, entry in ENTRIES.items()}
