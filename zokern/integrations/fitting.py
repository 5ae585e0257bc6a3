"""What a Lightning fit must be like for ForwardOnly: looked at once, before anything is trained."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from zokern.integrations import limits
from zokern.optim.base import ZerothOrderOptimizer

_ENGINES = {
    "DeepSpeedStrategy": "deepspeed",
    "FSDPStrategy": "fsdp",
    "ModelParallelStrategy": "model_parallel",
    "SingleDeviceXLAStrategy": "xla",
    "XLAStrategy": "xla",
}
_NONE_IS_MEANT = r"`training_step` returned `None`"  # Lightning's warning; it is so while micro-batches wait


def check(module: Any) -> None:
    """A LightningModule whose trainer has its optimizers.

    Raises:
        TypeError, NotImplementedError: as ForwardOnly's docstring says.
    """
    trainer = module.trainer
    plugin = trainer.precision_plugin
    kinds = [kind.__name__ for kind in type(trainer.strategy).__mro__]
    limits.refuse(
        "Lightning",
        world_size=trainer.world_size,
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
