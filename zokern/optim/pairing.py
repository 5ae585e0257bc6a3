"""Paired randomness: dropout and sampling that are the same in all forwards of a step.

An estimate compares losses. Where each forward draws its own dropout masks, what it compares is mostly the masks: the
i-th micro-batch of every probe therefore starts from the generators' states of the i-th micro-batch of the first probe.
The user's stream goes on once: after the step, the generators are where the first probe left them.

torch's generators are paired, of the host and of the devices that the parameters are on; not Python's, NumPy's or others.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_announced: set[str] = set()


def may_draw(module: nn.Module) -> bool:
    """Whether it may draw in training mode: a kind of dropout, or a module that calls one with a share of its own."""
    if isinstance(module, nn.modules.dropout._DropoutNd | nn.RReLU):
        return True
    return bool(_inside(module)) or any(
        "drop" in name and isinstance(share, float) for name, share in vars(module).items()
    )


def draws(module: nn.Module) -> bool:
    """Whether it does so now, or may."""
    return by_itself(module) or (module.training and any(child.p > 0.0 for child in _inside(module)))


def by_itself(module: nn.Module) -> bool:
    """Whether it draws now, as a kind of dropout or with a share of its own."""
    if not module.training:
        return False
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0.0
    if isinstance(module, nn.RReLU):
        return module.lower < module.upper
    return any("drop" in name and isinstance(share, float) and share > 0.0 for name, share in vars(module).items())


def _inside(module: nn.Module) -> list[nn.modules.dropout._DropoutNd]:
    """A module's own dropouts, whose share it may use by itself, as BERT's attention does in training mode (transformers
    5.24). Asked in each step, and children() takes more than twice as long."""
    return [child for child in module._modules.values() if isinstance(child, nn.modules.dropout._DropoutNd)]


def announce(module: nn.Module) -> None:
    """Says it once."""
    if "paired" not in _announced:
        _announced.add("paired")
        print(
            f"zokern: all is well: what a {type(module).__name__} draws is the same in all forwards of a step. The papers "
            "train without dropout: by model.eval(), under a Trainer dropout=False",
            file=sys.stderr,
        )


class Generators:
    """torch's, of the host and of these devices."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._every = [torch.default_generator]
        for device in devices:
            if device.type == "cuda":
                torch.cuda.init()
                self._every.append(torch.cuda.default_generators[device.index or 0])

    def states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._every]

    def go_to(self, states: list[Tensor]) -> None:
        for generator, state in zip(self._every, states, strict=True):
            generator.set_state(state)


class Looking:
    """Whether torch's generators move in a forward: something in it draws. False while a GPU's work is captured."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._generators = Generators(device for device in devices if device.type != "cuda" or not _captures())
        self._before = self._generators.states()

    def moved(self) -> bool:
        return not all(map(torch.equal, self._before, self._generators.states()))


def _captures() -> bool:
    return torch.cuda.is_current_stream_capturing()


class Draws:
    """Of one step: the generators' states at the start of each micro-batch of the first probe, and after it."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._generators = Generators(devices)
        self._starts: list[list[Tensor]] = []
        self._after: list[Tensor] | None = None

    def start(self, i: int) -> None:
        """Of the i-th micro-batch of a probe."""
        if self._after is None:
            self._starts.append(self._generators.states())
        else:
            self._generators.go_to(self._starts[i])

    def probed(self) -> None:
        """A probe has ended."""
        if self._after is None:
            self._after = self._generators.states()

    def end(self) -> None:
        """The step has: the user's stream goes on."""
        if self._after is not None:
            self._generators.go_to(self._after)
