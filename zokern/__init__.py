"""zokern: fused kernels and a drop-in optimizer for zeroth-order fine-tuning, with forward passes only.

What is named here is loaded when it is first used: `import zokern` alone does not load torch.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from zokern._version import __version__

if TYPE_CHECKING:
    from zokern import journal
    from zokern._checks import ZokernWarning
    from zokern.checking import check
    from zokern.deltas import add_deltas
    from zokern.directions import LowRank, Normal, Rademacher
    from zokern.distributed.exchange import RankError
    from zokern.graphs import GraphedStep
    from zokern.layers import RandomBlocks
    from zokern.noise import noise
    from zokern.ops import add_noise_
    from zokern.optim import ES, FZOO, HELENE, ByLayer, HiZOO, LeZO, MeZO, MeZOGreedy, MeZOGV
    from zokern.scales import scales

__all__ = [
    "ES",
    "FZOO",
    "HELENE",
    "ByLayer",
    "GraphedStep",
    "HiZOO",
    "LeZO",
    "LowRank",
    "MeZO",
    "MeZOGV",
    "MeZOGreedy",
    "Normal",
    "Rademacher",
    "RandomBlocks",
    "RankError",
    "ZokernWarning",
    "__version__",
    "add_deltas",
    "add_noise_",
    "check",
    "journal",
    "noise",
    "scales",
]
_HOMES = {
    "ByLayer": "optim",
    "GraphedStep": "graphs",
    "LowRank": "directions",
    "Normal": "directions",
    "Rademacher": "directions",
    "RandomBlocks": "layers",
    "RankError": "distributed.exchange",
    "ZokernWarning": "_checks",
    "add_deltas": "deltas",
    "add_noise_": "ops",
    "check": "checking",
    "noise": "noise",
    "scales": "scales",
}


class _Package(ModuleType):
    """`noise` and `scales` are the functions, also once the modules of those names are loaded, which Python puts here
    then."""

    def __setattr__(self, name: str, value: Any) -> None:
        of_function = name in ("noise", "scales") and isinstance(value, ModuleType)
        super().__setattr__(name, getattr(value, name) if of_function else value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """A public name, a method of the registry by its class's name, or a module."""
    found = None
    if name in _HOMES:
        found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif name[:1].isupper():
        methods = importlib.import_module(f"{__name__}.optim").METHODS.values()
        found = next((cls for cls in methods if cls.__name__ == name), None)
    elif name.isidentifier() and name[:1] != "_" and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        found = importlib.import_module(f"{__name__}.{name}")
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


if "torch" in sys.modules:  # graphs that were exported earlier find their operators, torch.ops.zokern
    importlib.import_module(f"{__name__}.sweep")
