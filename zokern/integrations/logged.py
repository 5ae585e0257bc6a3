"""A micro-batch of a LightningModule, and what its training_step logs, once, however many forwards a step has."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_ON_EPOCH = 3  # its place among the arguments of log() after the value


class MicroBatch:
    """args: of its training_step, the batch first."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args = args
        self.logged: dict[str, tuple[list[Any], tuple[Any, ...], dict[str, Any]]] = {}

    def arguments(self) -> tuple[Any, ...]:
        """For one forward: a dict or list may be changed by it."""
        return tuple(arg.copy() if type(arg) in (dict, list) else arg for arg in self.args)

    def moved(self, module: Any) -> MicroBatch:
        """On the module's device."""
        return self._on(module, module.device)

    def on_host(self, module: Any) -> MicroBatch:
        return self._on(module, torch.device("cpu"))

    def _on(self, module: Any, device: torch.device) -> MicroBatch:
        return MicroBatch((module.transfer_batch_to_device(self.args[0], device, 0), *self.args[1:]))

    def log(self, name: str, value: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A forward's value, with log()'s other arguments."""
        value = value.detach().clone() if isinstance(value, Tensor) else value
        self.logged.setdefault(name, ([], args, named))[0].append(value)


class Logged:
    """Of the micro-batches of a step that has been made."""

    def __init__(self, module: Any, batches: Sequence[MicroBatch]) -> None:
        self.module, self.batches = module, batches

    def tell(self) -> None:
        """Logs each name once for each micro-batch, in their order."""
        for one in self.batches:
            for name, (values, args, named) in one.logged.items():
                on_epoch = args[_ON_EPOCH] if len(args) > _ON_EPOCH else named.get("on_epoch")
                if on_epoch and len(self.batches) > 1 and named.get("batch_size") is None:
                    # Lightning asks the batch that came last, which may be another
                    named = {**named, "batch_size": self._size(one.args[0])}
                self.module.log(name, mean(values), *args, **named)
            one.logged = {}

    def _size(self, batch: Any) -> int:
        base = next(kind for kind in type(self.module).__mro__ if kind.__name__ == "LightningModule")
        package = base.__module__.rpartition(".core")[0]  # lightning.pytorch, or pytorch_lightning
        return int(importlib.import_module(f"{package}.utilities.data").extract_batch_size(batch))


def mean(values: list[Any]) -> Any:
    """Of the forwards' numbers, as a tensor where they are tensors; what is no number is the last one, as torchmetrics'
    objects are."""
    if all(isinstance(value, Tensor) for value in values):
        every = torch.stack(values)
        return (every if every.is_floating_point() else every.to(torch.float32)).mean(dim=0)
    if all(isinstance(value, int | float) for value in values):
        return sum(values) / len(values)
    return values[-1]
