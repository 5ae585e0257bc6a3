"""The task of protocol.py: texts, template and words of task.py, but read as `zokern finetune` reads them on a CPU.

A batch's prompts lie end to end, without padding, and the head sees the last token of each: 16 sentences are some 450
tokens in place of 16 x 64. A prefix takes positions of its own, and cannot be packed: its batches are padded to their
longest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.convergence.tasks import Task
from benchmarks.llm import reviews
from benchmarks.llm.task import LONGEST
from zokern.finetune import adapted, models
from zokern.finetune.batches import Batch, Order
from zokern.finetune.data import TextSet
from zokern.finetune.options import Options
from zokern.finetune.prompts import Prompt
from zokern.finetune.tasks import choose_packing, evaluate

TOGETHER = 100  # texts of an evaluation


class Reviews(Task):
    """The model in eval mode, at its starting weights after reset(). sets: what reviews.read gives. why: why its rows are
    not packed, None where they are."""

    def __init__(self, model: nn.Module, tokenizer: object, sets: Mapping[str, TextSet]) -> None:
        self.tokenizer, self.texts = tokenizer, sets
        self._prompts = Prompt(model, tokenizer, list(reviews.LABELS), LONGEST, reviews.TEMPLATE, list(reviews.WORDS))
        if not self._prompts.single:
            raise SystemExit(f"the words {reviews.WORDS} are not one token each for this tokenizer")
        for name, texts in sets.items():
            self._prompts.add(name, texts)
        self.why = choose_packing(self._prompts, "auto")
        self.words = torch.tensor([word[0] for word in self._prompts.words])
        super().__init__(model)

    def take(self, name: str, chosen: list[int]) -> Batch:
        return self._prompts.batch(name, chosen)

    def batches(self, size: int, seed: int) -> Iterator[Batch]:
        """Endless training batches, the same for every method with the same seed."""
        order = Order(len(self.texts["train"]), seed)
        while True:
            yield self.take("train", order.draw(size))

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross entropy of the two words, a scalar."""
        return self._prompts.loss(batch)

    def logits(self, batch: Batch) -> Tensor:
        """(texts, 2), in float32."""
        return self._prompts.logits(batch)

    def evaluate(self, part: str) -> dict[str, float]:
        """Loss and share of texts classified rightly."""
        accuracy, loss = evaluate(self._prompts, part, TOGETHER)
        return {"loss": loss, "accuracy": accuracy}


def load(model: str, sets: Mapping[str, TextSet], adapter: str = "") -> Reviews:
    """model: as zokern finetune takes it. adapter: one of zokern finetune's, as it is there."""
    options = Options(model=model, objective="prompt", adapter=adapter or None)
    config = models.load_config(model)
    made, tokenizer = models.load(options, "prompt", list(reviews.LABELS), config, torch.float32)
    if adapter == "prefix":
        begin_as_tokens(made)
    return Reviews(made, tokenizer, sets)


@torch.no_grad()
def begin_as_tokens(model: Any, seed: int = 0) -> None:
    """A prefix begins as the keys and values of tokens drawn from the vocabulary, as in MeZO's paper. PEFT's own beginning,
    normal numbers, is far from all that the model knows."""
    plain: Any = adapted.plain(model)
    count = adapted.config_of(model).num_virtual_tokens
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(plain.config.vocab_size, (1, count), generator=draw)
    known = plain(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    both = [each for layer in known.layers for each in (layer.keys[0], layer.values[0])]  # (heads, tokens, size) each
    rows = torch.stack(both).permute(2, 0, 1, 3).flatten(1)  # a row for each token, as PEFT lays them out
    model.prompt_encoder[model.active_adapter].embedding.weight.copy_(rows)
