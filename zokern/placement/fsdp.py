"""Modules of FSDP2 (torch.distributed.fsdp.fully_shard), whose weights are gathered for a forward and let go after it.

A root keeps its gathered weights after a forward, and so does a module with reshard_after_forward=False: without a backward
pass, which would let go of them, the next forward sees the old ones. So they are let go of after every probe.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from zokern.parts import is_dtensor


def modules_of(module: nn.Module | None) -> list[Any]:
    """Those that `fully_shard` was called on, outer ones first."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None or module is None else [child for child in module.modules() if isinstance(child, kind)]


def refuse_flat(module: nn.Module) -> None:
    """
    Raises:
        TypeError: for a module of FSDP1.
    """
    for name, child in module.named_modules():
        if type(child).__name__ == "FullyShardedDataParallel":
            raise TypeError(
                f"params: {name or 'the module'} is a FullyShardedDataParallel (FSDP1), which lays its tensors end to end "
                "and cuts them anywhere: shard the model with torch.distributed.fsdp.fully_shard (FSDP2)"
            )


def refuse_alone(params: Iterable[Any], module: nn.Module | None) -> None:
    """
    Raises:
        ValueError: for shards without their module, where `fully_shard` was called on any: nobody would let go of what it
            gathers, and forwards would see the old weights.
    """
    if module is not None or "torch.distributed.fsdp" not in sys.modules:
        return
    called = getattr(sys.modules.get("torch.distributed.fsdp._fully_shard._fully_shard"), "cls_to_fsdp_cls", True)
    if called and any(map(is_dtensor, params)):
        raise ValueError(
            "params: some are shards, and FSDP2 keeps gathered weights of a root from one forward to the next, which have "
            "to be let go of: give the nn.Module, or module= with its parameters"
        )


def states_of(modules: Sequence[Any]) -> list[Any]:
    """One for each call of `fully_shard`."""
    return list({id(state): state for state in (one._get_fsdp_state() for one in modules)}.values())


def groups_of(state: Any) -> list[Any]:
    """What gathers the weights of a state; PyTorch 2.10 knows of one."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def prepare(modules: Sequence[Any]) -> None:
    """Before anything is perturbed: a first forward may put shards elsewhere, to pad them."""
    for state in states_of(modules):
        state._lazy_init()


def let_go(modules: Sequence[Any]) -> None:
    """The modules have their shards again, and what was gathered is freed. Sends nothing.

    A forward without a backward pass leaves notes for that in lists, which would grow for as long as a run lasts.
    """
    states = states_of(modules)
    if any(state._training_state.name != "IDLE" for state in states):
        _reset(states)
    for one in modules:
        one.reshard()
    for state in states:
        for group in groups_of(state):
            group._post_forward_indices.clear()
            getattr(group.comm_ctx, "post_forward_order", []).clear()  # there after the first forward


def _reset(states: Sequence[Any]) -> None:
    """A closure has raised inside a module, which takes itself to be running since."""
    for state in states:
        state._training_state = type(state._training_state).IDLE
        state._state_ctx.iter_forward_root = None
        getattr(state, "_modules_to_run_forward", set()).clear()
        for group in groups_of(state):
            group._training_state = type(group._training_state).IDLE
            pending = group._all_gather_result
            if pending is not None and pending.all_gather_work is not None:
                pending.all_gather_work.wait()
            group._all_gather_result = None
