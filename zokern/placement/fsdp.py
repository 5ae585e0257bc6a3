"""Modules of FSDP2 (torch.distributed.fsdp.fully_shard), whose weights are gathered for a forward and let go after it.

A root keeps its gathered weights after a forward, and so does a module with reshard_after_forward=False: without a backward
pass, which would let go of them, the next forward sees the old ones. So they are let go of after every probe.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def modules_of(module: nn.Module) -> list[Any]:
    """Those that `fully_shard` was called on, in the order of the module's."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None else [child for child in module.modules() if isinstance(child, kind)]


def refuse_flat(module: nn.Module) -> None:
    """
    Raises:
        TypeError: for a module of FSDP1, which lays tensors end to end and cuts them anywhere.
    """
    for name, child in module.named_modules():
        if type(child).__name__ == "FullyShardedDataParallel":
            raise TypeError(
                f"params: {name or 'the module'} is a FullyShardedDataParallel (FSDP1), which lays its tensors end to end "
                "and cuts them anywhere: shard the model with torch.distributed.fsdp.fully_shard (FSDP2)"
            )


def groups_of(one: Any) -> list[Any]:
    """What gathers the weights of a module of FSDP2; torch 2.6 knows of one."""
    state = one._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)
    if several is None:
        several = [state._fsdp_param_group]
    return [group for group in several if group is not None]


def let_go(modules: list[Any]) -> None:
    """The modules' entries are their shards again, and the gathered weights are freed. Nothing is sent."""
    for one in modules:
        one.reshard()
        for group in groups_of(one):
            if not group.is_sharded:  # the closure has raised inside the module, which takes itself to be running still
                group._to_sharded()
