"""The backends, and the choice between them. Nothing falls back silently: `explain` says why each was refused.

A backend is a module with `unavailable_reason(device) -> str | None`, `run(table, spec, numbers)`, which runs one pass over
one table, and `run_chain(table, chain)`, which runs several; numbers may be anywhere. `near(numbers, device)` puts them
where `run` reads them, once for several tables; it is None where that makes no difference. Adding a backend is adding a
folder and its name here.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch

BACKENDS = ("cuda", "triton", "cpu", "reference")
# Best first. The reference is never chosen by itself: it is a specification, thousands of times slower.
PREFERENCE = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}
ENVIRONMENT = "ZOKERN_BACKEND"


def module(name: str) -> ModuleType:
    return importlib.import_module(f"zokern.backends.{name}")


def unavailable_reason(name: str, device: torch.device) -> str | None:
    """Why the backend cannot run on `device`, with the remedy; None if it can."""
    reason: str | None = module(name).unavailable_reason(device)
    return reason


def explain(device: torch.device | str) -> dict[str, str | None]:
    """Each backend's reason for not running on `device`, None where it runs."""
    device = torch.device(device)
    return {name: unavailable_reason(name, device) for name in BACKENDS}


def choose(name: str, device: torch.device) -> ModuleType:
    """The backend called `name`, or for "auto" the one in $ZOKERN_BACKEND, or the best that runs on `device`."""
    forced = name if name != "auto" else os.environ.get(ENVIRONMENT, "auto")
    if forced != "auto":
        if forced not in BACKENDS:
            source = "backend" if name != "auto" else ENVIRONMENT
            raise ValueError(
                f"{source} is {forced!r}; it must be one of 'auto', " + ", ".join(repr(b) for b in BACKENDS)
            )
        reason = unavailable_reason(forced, device)
        if reason is not None:
            raise RuntimeError(f"backend {forced!r} cannot run on {device}: {reason}")
        return module(forced)
    names = PREFERENCE.get(device.type)
    if names is None:
        raise RuntimeError(f"zokern has no kernels for device {device}; move the tensors to the CPU or an NVIDIA GPU")
    reasons = {candidate: unavailable_reason(candidate, device) for candidate in names}
    for candidate, reason in reasons.items():
        if reason is None:
            return module(candidate)
    raise RuntimeError(f"no backend can run on {device}: " + "; ".join(f"{n}: {r}" for n, r in reasons.items()))
