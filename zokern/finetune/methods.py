"""The optimizer of a run, made from its options."""

from __future__ import annotations

from typing import Any

from torch import nn

from zokern.finetune import adapted, adapters, takers
from zokern.finetune.options import Options
from zokern.layers import RandomBlocks, find_blocks
from zokern.optim import ENTRIES, LeZO, MeZO, ZerothOrderOptimizer


def settings(options: Options, adapter: str = "") -> dict[str, Any]:
    """The arguments of the class: what was given, and lr; the rest are its own defaults. adapter: the kind of adapter that
    is trained, which has an lr and an eps of its own."""
    entry = ENTRIES[options.method]
    values: dict[str, Any] = {}
    for one in entry.cls.settings.values():
        given = {place: getattr(options, name) for name, place in takers.options(one)}
        if one.parts:
            if any(value is not None for value in given.values()):
                values[one.name] = tuple(
                    default if given[i] is None else given[i] for i, default in enumerate(one.default)
                )
        elif given.get(None) is not None:
            values[one.name] = one.kind.parse(given[None])
    if options.lr is None:
        values["lr"] = entry.lr_of.get(values.get("update", ""), entry.lr)
    if adapter:
        chosen = adapters.rates(adapter, options.method, values.get("update", ""))
        values |= {name: value for name, value in chosen.items() if getattr(options, name) is None}
    return values


def build(model: nn.Module, options: Options) -> ZerothOrderOptimizer:
    """The optimizer of `options.method` over the trainable parameters of `model`."""
    values, cls, dropped = settings(options, adapted.kind_of(model)), ENTRIES[options.method].cls, options.num_dropped
    if cls is LeZO:  # runs know it as what it is short for
        cls = MeZO
        if dropped is None:
            dropped = len(find_blocks(model)) * 3 // 4
    if dropped is not None:
        values["layers"] = RandomBlocks(dropped)
    # As runs of an earlier version are stored: ES climbed, on minus the loss (loop.py).
    optimizer = cls(model, maximize=cls.takes_rewards, **values)
    optimizer.check_way_back()  # before anything is written; here it may wait for a device
    return optimizer
