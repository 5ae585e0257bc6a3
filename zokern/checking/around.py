"""What a closure may change beside the weights: random states, buffers, training flags. All are put back."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zokern.checking.subject import is_packed, like_a_weight


@dataclass
class Kept:
    """A buffer as it was: its place, the object, a copy, and torch's count of what was done to it at the last look."""

    owner: nn.Module
    name: str
    full_name: str
    buffer: Tensor
    value: Tensor
    version: int | None


class Around:
    """Taken once, and put back before every evaluation: each starts from the same random states and buffers.

    Buffers that hold a layer's weights (quantised, packed) are not copied; they may be as large as the model.
    """

    def __init__(self, module: nn.Module | None, devices: Iterable[torch.device]) -> None:
        self.devices = [device for device in devices if device.type != "cpu"]
        self.modules = [] if module is None else [(child, child.training) for child in module.modules()]
        self.buffers: list[Kept] = []
        self.changed: dict[str, None] = {}  # buffers that a closure has changed, by name
        for path, owner in [] if module is None else module.named_modules():
            for name, buffer in owner._buffers.items():
                if buffer is not None and not (like_a_weight(name, buffer) or is_packed(buffer) or buffer.is_meta):
                    full = f"{path}.{name}" if path else name
                    self.buffers.append(Kept(owner, name, full, buffer, buffer.detach().clone(), _version(buffer)))
        self.random = self._random()

    def _random(self) -> list[Any]:
        states: list[Any] = [torch.get_rng_state(), random.getstate(), np.random.get_state()]
        return states + [torch.get_device_module(device).get_rng_state(device) for device in self.devices]

    def rewind(self, *, closely: bool = False) -> None:
        """Everything as it was. closely: buffers' values are compared, not only torch's counts of what was done."""
        cpu, python, numpy, *others = self.random
        torch.set_rng_state(cpu)
        random.setstate(python)
        np.random.set_state(numpy)
        for device, state in zip(self.devices, others, strict=True):
            torch.get_device_module(device).set_rng_state(state, device)
        self.look(closely=closely, restore=True)
        for child, training in self.modules:
            if child.training != training:
                child.training = training

    def look(self, *, closely: bool = False, restore: bool = False) -> None:
        """Notes the buffers that have changed."""
        for kept in self.buffers:
            now = dict(kept.owner._buffers.items()).get(kept.name)
            replaced = now is not kept.buffer
            version = _version(kept.buffer)
            written = version is None or version != kept.version or closely
            if written:
                written = not _same(kept.buffer, kept.value)
            if replaced or written:
                self.changed[kept.full_name] = None
            if restore:
                if replaced:
                    kept.owner._buffers[kept.name] = kept.buffer
                if written:
                    kept.buffer.detach().copy_(kept.value)
                kept.version = _version(kept.buffer)


def _version(t: Tensor) -> int | None:
    return None if t.is_inference() else t._version


def _same(a: Tensor, b: Tensor) -> bool:
    """NaN is the same as NaN."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
