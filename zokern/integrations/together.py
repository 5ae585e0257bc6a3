"""A Trainer in each of several processes (torchrun), which train one model: a step is made over the micro-batches of all of
them, and ends on all of them at once."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zokern.distributed import finding
from zokern.integrations import parts
from zokern.integrations.parts import Parts

try:
    from transformers import Trainer
    from transformers.trainer_utils import has_length
except ImportError as error:
    raise ImportError(
        "zokern.integrations.transformers needs transformers and accelerate; install zokern[trainer]"
    ) from error


_SAMPLER = "take the same data, data_seed and seed on all of them, and no sampler that shares out the data itself"


class Nothing(dict):  # type: ignore[type-arg]
    """In the place of a micro-batch, for a process that is out of data: one without rows, which loops may count."""


class Together(Trainer):  # type: ignore[misc]
    """What the Trainer's loop asks for, as several processes need it. With one, all of it is the Trainer's own."""

    parts = Parts()  # of the batches
    _apart = False  # processes may have done unequal work since the last step
    _compared = False  # they have been handed the same batches, where they are to be
    _uneven = False  # they have unequal numbers of micro-batches
    _counting = False  # the items of this process' batches alone
    _last: Any = None  # a micro-batch

    def join_ranks(self) -> None:
        """At the end of the construction: who has which part of the batches.

        Raises:
            ValueError, RuntimeError: for an optimizer whose ranks are not these processes.
        """
        if finding.initialised():  # also torchrun with one process has a wrapper otherwise
            parts.unwrapped(self.accelerator, None)
        processes = self.accelerator.num_processes
        if processes == 1:
            return
        if self.optimizer is not None:
            self.parts = parts.of(self.zo_optimizer._places(), processes, "ZOTrainer")
        else:
            self.parts = parts.of_settings(self._chosen.settings, processes, "ZOTrainer")

    def begin_together(self) -> None:
        """A training begins."""
        if self.accelerator.num_processes > 1:
            self.zo_optimizer.wait_for_ranks()
            self._compared = self.parts.copies == 1
            self._apart = True

    def meet(self, batches: list[Any]) -> None:
        """Before a step. Where processes may have done unequal work, they wait for each other."""
        if self._apart:
            self.zo_optimizer.wait_for_ranks()
            self._apart = False
            if not self._compared:
                parts.check_same(self.parts, batches, _SAMPLER)
                self._compared = True

    @contextlib.contextmanager
    def forward_alone(self) -> Iterator[None]:
        """Around a forward of a step. compute_loss gives this process' share of the sum over all of them, and not that
        times their number, which the Trainer makes of it for gradients that are averaged."""
        if self.accelerator.num_processes == 1:
            yield
            return
        unlike = self._uneven or self.parts.copies > 1
        with self._own_tokens(), parts.by_itself(self.accelerator) if unlike else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def _own_tokens(self) -> Iterator[None]:
        """Inside, the Trainer does as if each process counted its own alone."""
        averages, self.args.average_tokens_across_devices = self.args.average_tokens_across_devices, False
        try:
            yield
        finally:
            self.args.average_tokens_across_devices = averages

    def rank_share(self, num_items_in_batch: Any) -> float:
        """Of a sum of a process' shares among those of all: 1 where they are shares of the whole step, else each process
        has counted its own tokens, and the Trainer means the mean over processes."""
        counted = num_items_in_batch is not None and self.args.average_tokens_across_devices
        return 1.0 if counted else 1.0 / self.parts.count

    def of_all_ranks(self, lists: dict[str, list[float]]) -> dict[str, list[float]]:
        """What each process has seen, one after another. All of them call."""
        if self.accelerator.num_processes == 1:
            return lists
        every: list[Any] = [None] * self.accelerator.num_processes
        dist.all_gather_object(every, lists)
        names = {name: None for one in every for name in one}
        return {name: [value for one in every for value in one.get(name, ())] for name in names}

    def without_repeats(self, batch: Any) -> Any:
        """A batch of an evaluation, without the rows by which the last ones are filled up on several processes."""
        state, size = self.accelerator.gradient_state, len(batch["rows"])
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return batch
        left = min(max(state.remainder - self.accelerator.process_index * size, 0), size)
        return {name: value[:left] for name, value in batch.items()}

    # ----------------------------------------------------------------------------------------- what the Trainer asks for

    def get_tp_size(self) -> int:
        """How many processes have the same batches."""
        return int(super().get_tp_size()) * (1 if self._counting else self.parts.copies)

    def set_initial_training_values(self, args: Any, dataloader: Any, *more: Any, **named: Any) -> Any:
        """An epoch is as long for each process as for that with the most micro-batches.

        Raises:
            ValueError: on every process, where one has none at all.
        """
        if self.accelerator.num_processes > 1:
            lengths: list[int | None] = [None] * self.accelerator.num_processes
            dist.all_gather_object(lengths, len(dataloader) if has_length(dataloader) else None)
            known = [length for length in lengths if length is not None]
            if 0 in known and any(known):
                raise ValueError(
                    f"process {lengths.index(0)} of {len(lengths)} has no micro-batch in an epoch, which the others have: "
                    "start fewer processes, take a smaller per_device_train_batch_size, or leave out even_batches=False"
                )
            self._uneven = len(set(lengths)) > 1
            if self._uneven:
                dataloader = _Longest(dataloader, max(known))
        return super().set_initial_training_values(args, dataloader, *more, **named)

    def get_batch_samples(self, epoch_iterator: Any, *args: Any, **named: Any) -> Any:
        if self._uneven:
            epoch_iterator = self._filled(epoch_iterator)
        if self.parts.copies == 1:
            return super().get_batch_samples(epoch_iterator, *args, **named)
        return self._counted_once(super().get_batch_samples, epoch_iterator, *args, **named)

    def _counted_once(self, batch_samples: Any, *args: Any, **named: Any) -> Any:
        """With the items of batches that differ: before transformers 5.19 the Trainer adds up those of all processes."""
        self._counting = True
        try:
            with self._own_tokens():
                batches, items = batch_samples(*args, **named)
        finally:
            self._counting = False
        if items is not None and self.args.average_tokens_across_devices:
            own = torch.as_tensor(items, device=self.args.device)
            items = self.accelerator.gather(own).sum() // self.parts.copies
        return batches, items

    def _filled(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """With micro-batches without rows at the end."""
        for batch in iterator:
            self._last = batch
            yield batch
        empty = {name: value[:0] if isinstance(value, Tensor) else value for name, value in self._last.items()}
        yield from itertools.repeat(Nothing(empty))

    def _track_num_input_tokens(self, inputs: Any) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        self.state.num_input_tokens_seen = before + (self.state.num_input_tokens_seen - before) // self.parts.copies


class _Longest:
    """A DataLoader, as long as another process' is."""

    def __init__(self, loader: Any, length: int) -> None:
        self.loader, self.length = loader, length

    def __len__(self) -> int:
        return self.length

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


def handing_out(trainer: Together) -> AbstractContextManager[None]:
    """Around get_train_dataloader, also that of trainers that come first."""
    return parts.handing_out(trainer.accelerator, trainer.parts)
