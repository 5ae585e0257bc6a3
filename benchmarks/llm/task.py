"""The task of run.py: is a film review good? A language model says so by the word that it would write next.

Every batch has the same shape, so that a step can be captured: prompts are padded on the left to the longest of all, and
attention gets a mask of four dimensions, which transformers takes as it is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.convergence.tasks import Task
from benchmarks.llm import reviews
from zokern.finetune import models
from zokern.finetune.batches import Order
from zokern.finetune.data import TextSet
from zokern.finetune.options import Options
from zokern.finetune.prompts import Prompt
from zokern.passes.table import upload

LONGEST = 64  # tokens of a prompt; the text (never the template) is cut

Batch = Mapping[str, Tensor]


def padded(rows: Tensor, lengths: list[int]) -> dict[str, Tensor]:
    """ids (rows, T) padded on the right -> ids, mask (rows, 1, T, T; True: attends), positions; on the left.

    A place of padding attends to itself: a row of a mask without any True would make NaN.
    """
    count, width = rows.shape
    first = width - torch.tensor(lengths)[:, None]
    place = torch.arange(width)[None]
    ids = rows.gather(1, (place - first) % width)
    real = place >= first
    seen = (place[..., None] >= place[:, None, :]) & real[:, None, :]  # (rows, queries, keys)
    mask = seen | torch.eye(width, dtype=torch.bool)
    return {"ids": ids, "mask": mask[:, None], "positions": (place - first).clamp(min=0).expand(count, width)}


class Sentiment(Task):
    """The model in eval mode, at its starting weights after reset(), and its batches. sets: what reviews.read gives.

    Of each set all lies on the device, so that a batch is a choice of rows there.
    """

    def __init__(self, model: nn.Module, tokenizer: object, sets: Mapping[str, TextSet]) -> None:
        self.device = next(model.parameters()).device
        self.tokenizer = tokenizer
        prompts = Prompt(model, tokenizer, list(reviews.LABELS), LONGEST, reviews.TEMPLATE, list(reviews.WORDS))
        if not prompts.single:
            raise SystemExit(f"the words {reviews.WORDS} are not one token each for this tokenizer")
        self.words = torch.tensor([word[0] for word in prompts.words], device=self.device)
        self.sets: dict[str, dict[str, Tensor]] = {}
        for name, texts in sets.items():
            prompts.add(name, texts)
            rows, targets = prompts.sets[name]
            made = {**padded(_wide(rows.ids.cpu()), rows.lengths), "targets": torch.tensor(targets)}
            self.sets[name] = {key: value.contiguous().to(self.device) for key, value in made.items()}
        self._used = 0
        self.follow(model)

    def follow(self, model: nn.Module, *, compiled: bool = False) -> None:
        """Another model from now on, with its weights as the starting ones. compiled: in training batches, whose shape is
        always the same."""
        super().__init__(model)
        self._trained: Any = torch.compile(model) if compiled else model

    def watch_memory(self) -> None:
        """What is allocated from now on counts."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            self._used = torch.cuda.memory_allocated(self.device)
        self.forget_peak()

    def forget_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def memory(self) -> int | None:
        """Bytes at the peak since watch_memory(), or forget_peak(); on a CPU nobody counts them."""
        return torch.cuda.max_memory_allocated(self.device) - self._used if self.device.type == "cuda" else None

    @torch.no_grad()
    def inference(self, size: int) -> dict[str, float | None]:
        """A forward of a batch of training texts: seconds in eager mode, and bytes beyond the weights."""
        batch = self.take("train", list(range(size)))
        self.watch_memory()
        for _ in range(3):
            self.logits(batch).sum().item()
        start = time.perf_counter()
        for _ in range(10):
            self.logits(batch).sum().item()
        return {"seconds": (time.perf_counter() - start) / 10, "bytes": self.memory()}

    def take(self, name: str, chosen: list[int]) -> Batch:
        index = upload(torch.tensor(chosen), self.device)
        return {key: value.index_select(0, index) for key, value in self.sets[name].items()}

    def batches(self, size: int, seed: int) -> Iterator[Batch]:
        """Endless training batches, the same for every method with the same seed."""
        order = Order(len(self.sets["train"]["targets"]), seed)
        while True:
            yield self.take("train", order.draw(size))

    def logits(self, batch: Batch, model: Any = None) -> Tensor:
        """(texts, 2), in float32: of the two words after the prompt."""
        out = (self.model if model is None else model)(
            input_ids=batch["ids"], attention_mask=batch["mask"], position_ids=batch["positions"], logits_to_keep=1,
            use_cache=False,
        )  # fmt: skip
        logits: Tensor = out.logits
        return logits[:, -1].index_select(1, self.words).float()

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross entropy, a scalar."""
        return F.cross_entropy(self.logits(batch, self._trained), batch["targets"])

    @torch.no_grad()
    def evaluate(self, name: str, size: int = 250) -> dict[str, float]:
        """Loss and share of texts classified rightly."""
        count = len(self.sets[name]["targets"])
        right = loss = torch.zeros((), device=self.device)
        for start in range(0, count, size):
            batch = {key: value[start : start + size] for key, value in self.sets[name].items()}
            logits = self.logits(batch)
            right = right + (logits.argmax(1) == batch["targets"]).sum()
            loss = loss + F.cross_entropy(logits, batch["targets"], reduction="sum")
        return {"loss": loss.item() / count, "accuracy": right.item() / count}


def _wide(ids: Tensor) -> Tensor:
    """All sets have the same width."""
    return F.pad(ids, (0, LONGEST - ids.shape[1]))


def load(model: str, device: torch.device, dtype: torch.dtype) -> Sentiment:
    """model: as zokern finetune takes it."""
    options = Options(model=model, objective="prompt")
    config = models.load_config(model)
    made, tokenizer = models.load(options, "prompt", list(reviews.LABELS), config, dtype)
    return Sentiment(made.to(device), tokenizer, reviews.read())
