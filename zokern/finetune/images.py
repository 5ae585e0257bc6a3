"""The image objective: a model with a head for pictures sorts them into classes.

Pictures are files, or bytes in a data set; a batch's are opened and made into pixels when it is drawn, by the checkpoint's
own processor, so that memory does not grow with the pixels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zokern.finetune import models
from zokern.finetune.batches import Batch, Rows
from zokern.finetune.checkpoints import explain, place_of
from zokern.finetune.data import TextSet
from zokern.finetune.examples import Picture
from zokern.finetune.options import FinetuneError, Options
from zokern.finetune.tasks import Task
from zokern.passes.table import upload


@dataclass
class Pixels(Batch):
    """pixels: (pictures, channels, height, width), in the model's number format."""

    pixels: Tensor


class Pictures(Task):
    """processor: of transformers. Class logits are the head's output."""

    def __init__(self, model: nn.Module, processor: Any, labels: list[str]) -> None:
        super().__init__(model, processor, labels, 0)
        self.settings = [type(processor).__name__, processor.to_json_string()]  # which the pixels depend on
        self.pictures: dict[str, list[Picture]] = {}

    def add(self, name: str, texts: TextSet) -> None:
        """Keeps a set's pictures as they are."""
        self.pictures[name] = [picture for picture in texts.texts if isinstance(picture, Picture)]
        none = torch.empty(len(texts), 0, dtype=torch.long)
        self.sets[name] = (Rows(none, [0] * len(texts)), texts.targets)

    def batch(self, name: str, wanted: Sequence[int]) -> Pixels:
        """The pixels of the pictures with the indices `wanted`."""
        opened = [_open(self.pictures[name][i]) for i in wanted]
        pixels = self.tokenizer(images=opened, return_tensors="pt")["pixel_values"]
        pixels = upload(pixels.to(next(self.model.parameters()).dtype), self.device)
        targets = torch.tensor([self.sets[name][1][i] for i in wanted])
        return Pixels([], torch.arange(len(wanted)), upload(targets, self.device), pixels)

    def logits(self, batch: Batch) -> Tensor:
        """(pictures, classes), in float32."""
        assert isinstance(batch, Pixels)
        logits: Tensor = self.model(pixel_values=batch.pixels).logits
        return logits.float()


def _open(picture: Picture) -> Any:
    from PIL import Image

    try:
        with Image.open(picture.path if picture.content is None else io.BytesIO(picture.content)) as image:
            return image.convert("RGB")
    except (OSError, ValueError) as error:
        raise FinetuneError(f"the picture {picture.path!r} cannot be read ({error}); mend it or take it out") from error


def load(options: Options, labels: list[str], config: Any, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """(model in eval mode on the CPU, image processor). A new head comes from options.seed; the global RNG stays."""
    transformers = models.import_transformers()
    files = place_of(models.locate(options.model))
    if files.adapter:
        raise FinetuneError(
            f"--model {options.model!r} is an adapter of a model for pictures, and adapters are trained on models of texts "
            "here; merge it into its base (merge_and_unload) and give that"
        )
    named = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(files.path, **files.also)
        model: nn.Module = models.seeded(
            transformers.AutoModelForImageClassification, options.seed, files.path, dtype, **files.also, **named,
            num_labels=len(labels), ignore_mismatched_sizes=True,
        )  # fmt: skip
    except (OSError, ValueError, ImportError) as error:
        raise explain(error, options.model, "loaded for the image objective") from error
    return model.eval(), processor
