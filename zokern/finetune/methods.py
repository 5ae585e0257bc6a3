"""The methods that `zokern finetune --method` knows: one entry each, a constructor and the settings it takes.

Adding a method is adding an entry here; its own options, if any, become fields of Options and options of the command.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import nn

    from zokern.finetune.options import Options


class Method(NamedTuple):
    """build(model, **settings) makes the optimizer; `takes` names the fields of Options it is given."""

    build: Callable[..., Any]
    takes: tuple[str, ...]
    forwards: Callable[[Options], int]  # closure calls a step, for the progress display


def _mezo(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    import zokern

    return zokern.MeZO(model, **settings)


METHODS: dict[str, Method] = {
    "mezo": Method(
        _mezo,
        ("lr", "eps", "weight_decay", "num_samples", "distribution", "seed", "rounding", "placement", "backend"),
        lambda options: 2 * options.num_samples,
    ),
}


def build(model: nn.Module, options: Options) -> Any:
    """The optimizer of `options.method` over the trainable parameters of `model`."""
    method = METHODS[options.method]
    return method.build(model, **{name: getattr(options, name) for name in method.takes})
