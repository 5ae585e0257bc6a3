"""Several processes that train one model under a framework: which part of each batch is whose, models that need no wrapper,
and the same weights to start from."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from zokern.distributed import finding
from zokern.distributed.exchange import RankError
from zokern.distributed.places import Places
from zokern.hashing import hash_of


@dataclass(frozen=True)
class Parts:
    """count: parts of each batch. own: this process', from 0. copies: processes that have the same part, and share the
    directions."""

    count: int = 1
    own: int = 0
    copies: int = 1


def of(found: Places | None, processes: int, integration: str) -> Parts:
    """found: of the optimizer, None for independent runs. processes: of the framework.

    Raises:
        ValueError: where the optimizer's ranks are not those that the framework hands batches to.
    """
    if processes == 1:
        return Parts()
    if found is None or found.size != processes:
        said = "None" if found is None else f"of {found.size} ranks"
        raise ValueError(
            f"{integration}: process_group is {said}, and each of {processes} processes is handed a part of every batch, "
            "so they would train apart: leave process_group out, with parallel='data' or parallel='directions', or give a "
            "group or a DeviceMesh of all of them"
        )
    count = max(found.data) + 1
    return Parts(count, found.data[found.me], processes // count)


def of_settings(settings: dict[str, Any], processes: int, integration: str) -> Parts:
    """Of an optimizer that is to be made. Says in its settings that each process has its part of the data, where they say
    nothing.

    Raises:
        ValueError, RuntimeError: for settings that do not go together.
    """
    if processes == 1:
        return Parts()
    group = settings.get("process_group", "auto")
    if group == "auto" and settings.get("parallel") is None:
        settings["parallel"] = "data"
    return of(finding.find(group, settings.get("parallel"), None, None, ()), processes, integration)


def unwrapped(accelerator: Any, module: nn.Module | None) -> None:
    """From now on the accelerator leaves a module without DistributedDataParallel, which has memory for all gradients, and
    sends buffers round in each forward; what that does first, giving all the weights of the first process, is done here.
    None: all models that it prepares to be trained."""
    prepare_model = accelerator.prepare_model

    @functools.wraps(prepare_model)
    def prepare(model: nn.Module, *args: Any, **named: Any) -> Any:
        if (module is not None and model is not module) or len(args) > 1 or named.get("evaluation_mode"):
            return prepare_model(model, *args, **named)
        made = prepare_model(model, *args, evaluation_mode=True, **named)
        same_start(model)
        return made

    accelerator.prepare_model = prepare


@contextlib.contextmanager
def handing_out(accelerator: Any, parts: Parts) -> Iterator[None]:
    """Inside, the accelerator prepares DataLoaders by these parts, and not by its number of processes."""
    from accelerate.data_loader import prepare_data_loader  # type: ignore[import-untyped,import-not-found]

    if parts.copies == 1 or "prepare_data_loader" in vars(accelerator):  # again is nothing
        yield
        return
    if accelerator.dispatch_batches:
        raise ValueError(
            "dispatch_batches=True cuts up each batch, and processes that share the directions need the whole of it; leave "
            "it out"
        )

    def prepare(loader: Any, device_placement: bool | None = None, slice_fn_for_dispatch: Any = None) -> Any:
        if getattr(loader, "_is_accelerate_prepared", False):
            return loader
        config = accelerator.dataloader_config
        made = prepare_data_loader(
            loader, accelerator.device, num_processes=parts.count, process_index=parts.own,
            split_batches=accelerator.split_batches,
            put_on_device=accelerator.device_placement if device_placement is None else device_placement,
            rng_types=accelerator.rng_types.copy(), dispatch_batches=False, even_batches=accelerator.even_batches,
            use_seedable_sampler=accelerator.use_seedable_sampler, data_seed=config.data_seed,
            non_blocking=accelerator.non_blocking, use_stateful_dataloader=accelerator.use_stateful_dataloader,
        )  # fmt: skip
        made._is_accelerate_prepared = True
        accelerator._dataloaders.append(made)
        return made

    accelerator.prepare_data_loader = prepare
    try:
        yield
    finally:
        del accelerator.prepare_data_loader


GATHERS = ("gather", "gather_for_metrics", "reduce", "pad_across_processes")


@contextlib.contextmanager
def by_itself(accelerator: Any) -> Iterator[None]:
    """Inside, the accelerator gathers nothing: where processes make different forwards, they would wait for each other."""
    for name in GATHERS:
        setattr(accelerator, name, _itself)
    try:
        yield
    finally:
        for name in GATHERS:
            delattr(accelerator, name)


def _itself(tensor: Any, *args: Any, **named: Any) -> Any:
    return tensor


def same_start(module: nn.Module) -> None:
    """All processes get the weights and buffers of the first, as DistributedDataParallel's do. All of them call."""
    for tensor in (*module.parameters(), *module.buffers()):
        if type(tensor.data) is not Tensor or tensor.device.type == "meta":
            continue  # quantised, and read from the same file
        if tensor.numel() > 1 and not any(tensor.stride()):
            continue  # a delta has one number
        sent = tensor.detach().contiguous()
        dist.broadcast(sent, src=0)
        if sent.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(sent)


def check_same(parts: Parts, batches: Iterable[Any], remedy: str) -> None:
    """Whether the processes that share the directions have been handed the same micro-batches. All of them call; waits for
    the device.

    Raises:
        RankError: on every process, naming one whose batch is another.
    """
    tensors = list(_tensors("", list(batches)))
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (parts.own, hash_of(tensors)))
    first: dict[int, tuple[int, str]] = {}
    for rank, (own, found) in enumerate(every):
        other, known = first.setdefault(own, (rank, found))
        if found != known:
            raise RankError(
                f"parallel is 'directions', and the batch of rank {rank} is not that of rank {other}, and all have to be "
                f"handed the same examples in the same order: {remedy}; nothing has been changed"
            )


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """In what holds a batch."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping | list | tuple):
        for key, one in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _tensors(f"{name}.{key}", one)
