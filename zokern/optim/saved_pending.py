"""What an optimizer's state_dict holds of updates that wait, and how it is read: it may come from anywhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zokern import _checks
from zokern.placement.pending import Pending

_HASH = re.compile(r"[0-9a-f]{32}")
_ENTRIES = ("seeds", "coefs", "decay", "steps", "decays", "members", "weights", "folded")
WHERE = "state_dict: pending"


@dataclass(frozen=True)
class SavedPending:
    """members: tensor id and row of each parameter that it is of. weights, folded: hashes of these without and with it."""

    pending: Pending
    members: list[tuple[int, int]]
    weights: str
    folded: str

    def entry(self) -> dict[str, Any]:
        one = self.pending
        return {
            "seeds": [int(seed) for seed in one.seeds],
            "coefs": one.coefs.detach().to("cpu", copy=True),
            "decay": one.decay.detach().to("cpu", copy=True),
            "steps": one.steps,
            "decays": one.decays,
            "members": [list(pair) for pair in self.members],
            "weights": self.weights,
            "folded": self.folded,
        }


def read(given: Any) -> SavedPending | None:
    """
    Raises:
        TypeError, ValueError: naming what `SavedPending.entry` cannot have given.
    """
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise TypeError(f"{WHERE} is a {type(given).__name__}; it must be a dict")
    missing = [name for name in _ENTRIES if name not in given]
    if missing:
        raise ValueError(f"{WHERE} has no {', '.join(map(repr, missing))}; load it whole, as it was saved")
    seeds = [_checks.check_seed(s, f"{WHERE}: seeds[{k}]") for k, s in enumerate(_listed(given["seeds"], "seeds"))]
    members = []
    for i, pair in enumerate(_listed(given["members"], "members")):
        if len(_listed(pair, f"members[{i}]")) != 2:
            raise ValueError(f"{WHERE}: members[{i}] is no pair of a tensor id and a row")
        members.append((
            _checks.check_integer(pair[0], f"{WHERE}: members[{i}]", 0, _checks.MAX_TENSOR_ID),
            _checks.check_integer(pair[1], f"{WHERE}: members[{i}]", 0, len(given["members"])),
        ))  # fmt: skip
    rows = 1 + max((row for _, row in members), default=-1)
    coefs = _numbers(given["coefs"], "coefs", (rows, len(seeds)))
    decay = _numbers(given["decay"], "decay", (rows,))
    for name in ("weights", "folded"):
        if not isinstance(given[name], str) or not _HASH.fullmatch(given[name]):
            raise ValueError(f"{WHERE}: {name} is no hash of 128 bits")
    steps = _checks.check_integer(given["steps"], f"{WHERE}: steps", 1, _checks.MAX_SEED)
    decays = _checks.check_flag(given["decays"], f"{WHERE}: decays")
    pending = Pending(tuple(seeds), coefs, decay, steps, decays)
    return SavedPending(pending, members, given["weights"], given["folded"])


def _listed(value: Any, name: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{WHERE}: {name} is a {type(value).__name__}; it must be a list")
    return list(value)


def _numbers(value: Any, name: str, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{WHERE}: {name} is a {type(value).__name__}; it must be a tensor")
    if value.dtype != torch.float64 or not bool(torch.isfinite(value).all()):
        raise ValueError(f"{WHERE}: {name} is {_checks.describe(value)}; it must be finite float64")
    if value.numel() == 0 and 0 in shape:  # as text it has lost its shape
        value = value.reshape(shape)
    if value.shape != shape:
        raise ValueError(f"{WHERE}: {name} has shape {tuple(value.shape)}; it must be {shape}")
    kept: Tensor = value.to("cpu", copy=True)
    return kept
