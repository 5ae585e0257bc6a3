"""What an optimizer was given, as torch's parameter groups plus an id and a name for every tensor.

The tensor id decides which noise a parameter gets. For a module it is the position among all its parameters (tied ones
once), trainable or not, so that freezing or regrouping does not renumber; for anything else, the position in the order
given.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from zokern import _checks

Groups = list[dict[str, Any]]


class Registry:
    """Ids and names by parameter; new parameters (add_param_group) get the module's id, or the next free one."""

    def __init__(self, module: nn.Module | None) -> None:
        self.ids: dict[int, int] = {}
        self.names: dict[int, str] = {}
        self._keep: list[Tensor] = []  # an id() is only valid while its object lives
        if module is not None:
            for name, p in module.named_parameters():
                self.add(p, name)

    def add(self, p: Tensor, name: str | None = None) -> None:
        if id(p) not in self.ids:
            self.ids[id(p)] = max(self.ids.values(), default=-1) + 1
            self.names[id(p)] = name or f"parameter {self.ids[id(p)]}"
            self._keep.append(p)


def parse(params: object) -> tuple[Groups, nn.Module | None, Registry]:
    """Groups for torch.optim.Optimizer from a module, or from what torch's optimizers take."""
    if isinstance(params, nn.Module):
        registry = Registry(params)
        trainable = [p for p in params.parameters() if p.requires_grad]
        if not trainable:
            raise ValueError(f"params: {type(params).__name__} has no parameter with requires_grad=True")
        return [{"params": trainable}], params, registry
    if isinstance(params, Tensor):
        raise TypeError(
            "params must be an nn.Module or an iterable of tensors, named tensors or groups; got one Tensor"
        )
    if not isinstance(params, Iterable):
        raise TypeError(f"params must be an nn.Module or an iterable, got {type(params).__name__}")
    given = list(params)
    if not given:
        raise ValueError("params is empty: there is nothing to optimise")
    registry = Registry(None)
    groups: Groups = [dict(g) for g in given] if isinstance(given[0], dict) else [{"params": given}]
    for g, group in enumerate(groups):
        if "params" not in group:
            raise ValueError(f"params: group {g} has no 'params' entry")
        entries = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        named = [e if isinstance(e, tuple) else (None, e) for e in entries]
        for name, p in named:
            if not isinstance(p, Tensor):
                raise TypeError(
                    f"params: group {g} has a {type(p).__name__}; tensors or (name, tensor) pairs are needed"
                )
            registry.add(p, name)
        group["params"] = [p for _, p in named]
    return groups, None, registry


def check_parameter(p: Tensor, name: str) -> None:
    """Zero-size parameters are allowed here (they are skipped); everything else as for a pass."""
    if p.numel() or p.dtype not in _checks.DTYPES or p.device.type == "meta":
        _checks.check_tensor(p, name)


def check_group(group: dict[str, Any], index: int) -> None:
    where = f" of group {index}" if index else ""
    for key, low, strict in (("lr", 0.0, False), ("eps", 0.0, True), ("weight_decay", 0.0, False)):
        if key in group and not (isinstance(group[key], torch.Tensor) and group[key].device.type != "cpu"):
            _checks.check_number(group[key], key + where, low, open_low=strict)
