"""LightningModules and their data, small."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.optim.lr_scheduler import StepLR

import zokern
from tests.models import Toy, small, tokens
from zokern.integrations.lightning import ForwardOnly

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
BATCHES = [tokens(i)[: 9 + i] for i in range(7)]  # an accumulation over 3 of them ends with an incomplete one
STEPS = [BATCHES[0:3], BATCHES[3:6], BATCHES[6:7]]


class Loader:
    """Batches, which a run that is taken up in the middle goes on with."""

    def __init__(self, batches: Sequence[Any] = BATCHES) -> None:
        self.batches, self.at = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        self.at %= len(self.batches)
        while self.at < len(self.batches):
            self.at += 1
            yield self.batches[self.at - 1]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Plain(lightning.LightningModule):
    """As a user has it. forwards: the lengths of the batches of training_step."""

    def __init__(self, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        super().__init__()
        self.net = small(dtype)
        self.options = {"lr": 1e-2, "update": "momentum", **options}
        self.forwards: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.forwards.append(len(batch))
        return self.net(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("validation", self.net(batch), batch_size=1)

    def configure_optimizers(self) -> Any:
        opt = zokern.MeZO(self.net, **self.options)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": StepLR(opt, 1, gamma=0.9), "interval": "step"}}


class Tuner(ForwardOnly, Plain):
    """The same, by forward passes."""


class Noted(lightning.Callback):
    """After each batch: what training_step gave, and how many steps there were."""

    def __init__(self) -> None:
        self.outputs: list[Any] = []
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs.append(outputs)
        self.steps.append(trainer.global_step)


def trainer(count: int = 3, epochs: int = 1, kind: Any = lightning.Trainer, **options: Any) -> Any:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return kind(
        accumulate_grad_batches=count, max_epochs=epochs, accelerator="cpu", num_sanity_val_steps=0, **quiet, **options
    )


def by_hand(epochs: int = 1, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Toy, list[Tensor]]:
    """The same steps without Lightning. weighted: by the batches' lengths."""
    weighted, model = options.pop("weighted", False), small(dtype).train()
    opt = zokern.MeZO(model, **{"lr": 1e-2, "update": "momentum", **options})
    scheduler, losses = StepLR(opt, 1, gamma=0.9), []
    for batches in STEPS * epochs:
        each = [float(len(batch)) for batch in batches] if weighted else None
        losses.append(opt.step(model, batches, batch_weights=each))
        scheduler.step()
    return model, losses
