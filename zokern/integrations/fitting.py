"""What a Lightning fit must be like for ForwardOnly: looked at once, before anything is trained."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch.distributed as dist

from zokern.integrations import limits, parts
from zokern.optim.base import ZerothOrderOptimizer

_ENGINES = {
    "DeepSpeedStrategy": "deepspeed",
    "FSDPStrategy": "fsdp",
    "ModelParallelStrategy": "model_parallel",
    "SingleDeviceXLAStrategy": "xla",
    "XLAStrategy": "xla",
}
_NONE_IS_MEANT = r"`training_step` returned `None`"  # Lightning's warning; it is so while micro-batches wait


def check(module: Any) -> parts.Parts:
    """A LightningModule whose trainer has its optimizers. Returns which part of the batches this process has.

    Raises:
        TypeError, ValueError, NotImplementedError: as ForwardOnly's docstring says.
    """
    trainer = module.trainer
    plugin = trainer.precision_plugin
    kinds = [kind.__name__ for kind in type(trainer.strategy).__mro__]
    limits.refuse(
        "Lightning",
        precision=str(trainer.precision),
        scaler=getattr(plugin, "scaler", None) is not None,
        engine=next((_ENGINES[kind] for kind in kinds if kind in _ENGINES), ""),
    )
    if not module.automatic_optimization:
        raise TypeError(
            "ForwardOnly makes the steps itself: leave out self.automatic_optimization = False, and return the loss from "
            "training_step; or leave out ForwardOnly, and call self.optimizers().optimizer.step(closure, batches)"
        )
    for optimizer in trainer.optimizers:
        if not isinstance(optimizer, ZerothOrderOptimizer):
            raise TypeError(
                "configure_optimizers must return one of zokern's optimizers, for example zokern.MeZO(self, lr=1e-6), and "
                f"returned a {type(optimizer).__name__}"
            )
        limits.averages(trainer.callbacks, optimizer.options["fold_every"])
    if trainer.gradient_clip_val:
        raise NotImplementedError(
            f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) would clip nothing, as there are no gradients; leave "
            "it out"
        )
    if getattr(module, "_compiler_ctx", None) is not None:
        raise NotImplementedError(
            "torch.compile(module) would compile the step too; compile what it runs, as self.model = torch.compile(model)"
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise TypeError(
            "training_step takes a dataloader_iter, and is run several times for a batch; take batch instead"
        )
    if trainer.accumulate_grad_batches > 1:
        warnings.filterwarnings("ignore", message=_NONE_IS_MEANT)
    return parts.of(trainer.optimizers[0]._places(), trainer.world_size, "Lightning")


def leave_bare(strategy: Any, mixin: type) -> None:
    """For modules of the mixin, a DDPStrategy makes no DistributedDataParallel, which has memory for all gradients, and
    sends buffers round in each forward."""
    configure = getattr(strategy, "configure_ddp", None)
    if configure is None or hasattr(configure, "_of_zokern"):
        return

    def configure_ddp() -> None:
        module = strategy.lightning_module
        if isinstance(module, mixin):
            parts.same_start(module)  # type: ignore[arg-type]
        else:
            configure()

    configure_ddp._of_zokern = True  # type: ignore[attr-defined]
    strategy.configure_ddp = configure_ddp


def of_all_ranks(trainer: Any, arguments: list[Any], weights: list[float]) -> list[dict[str, Any]]:
    """The micro-batches that wait in each process, which all of them call for."""
    every: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(every, {"arguments": arguments, "weights": weights})
    return every


def check_lengths(trainer: Any) -> None:
    """
    Raises:
        ValueError: on every process, where they have unequal numbers of batches in an epoch: Lightning ends it on some, and
            the others would wait for them.
    """
    if trainer.world_size > 1:
        lengths: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(lengths, trainer.num_training_batches)
        if len(set(lengths)) > 1:
            raise ValueError(
                f"the processes have {', '.join(map(str, lengths))} training batches in an epoch, and all have to make "
                f"the same steps: give Trainer(limit_train_batches={min(lengths)}), or a sampler that shares out evenly"
            )
