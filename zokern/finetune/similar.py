"""The similarity objective: an encoder compares each text with a sentence about each label."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from zokern.finetune.batches import Batch, Group, Packed, cut
from zokern.finetune.data import TextSet
from zokern.finetune.options import FinetuneError
from zokern.finetune.packing import Wanted, pack
from zokern.finetune.tasks import Task


@dataclass
class _Labels:
    """The label sentences, embedded by the first of several batches. turn: of the batch that is to come next."""

    embedded: Tensor | None = None
    turn: int = 0


@dataclass
class Compared(Batch):
    """One of several batches. labels: theirs. turn: its place among them; the first has the label sentences' rows."""

    labels: _Labels
    turn: int


class Similarity(Task):
    """An encoder: cosine similarity between a text and a sentence about each label, divided by a temperature.

    Both sides move with the weights, so the label sentences are rows of a batch, after the texts: of every one, or, where
    rows are packed, of the first of those that are evaluated with the same weights.
    """

    packs, reads_logits = True, False

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        labels: list[str],
        max_length: int,
        sentences: list[str],
        temperature: float,
    ) -> None:
        super().__init__(model, tokenizer, labels, max_length)
        self.temperature = temperature
        self._label_tokens, cut = self._tokens(sentences)
        if cut.count:
            raise FinetuneError(
                f"{cut.count} of the labels' sentences (--descriptions) have more tokens than --max-length {max_length}, "
                f"the longest {cut.longest}; raise it, or shorten them"
            )

    def add(self, name: str, texts: TextSet) -> None:
        """Tokenise a set once; the label sentences follow its texts."""
        tokens, targets = self._tokenise(name, texts)
        self.sets[name] = (self._pack(tokens + self._label_tokens), targets)

    def batch(self, name: str, wanted: Sequence[int]) -> Batch:
        """The texts with the indices `wanted`, followed by the label sentences."""
        return self._cut(name, wanted, labels=True)

    def batches(self, name: str, wanted: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """Several batches, to be evaluated one after another with the same weights."""
        if self.packer is None:
            yield from super().batches(name, wanted)
            return
        labels = _Labels()
        for turn, one in enumerate(wanted):
            made = self._cut(name, one, labels=turn == 0)
            yield Compared(made.groups, made.order, made.targets, labels, turn)

    def _cut(self, name: str, wanted: Sequence[int], *, labels: bool) -> Batch:
        rows, targets = self.sets[name]
        chosen = [*wanted, *range(len(targets), len(rows.lengths))] if labels else list(wanted)
        right = [targets[i] for i in wanted]
        if self.packer is None:
            return cut(rows, chosen, right)
        return pack(rows, [Wanted([i], 0, [0]) for i in chosen], right)

    def logits(self, batch: Batch) -> Tensor:
        """(texts, classes): cosine / temperature, in float32."""
        embedded = F.normalize(batch.gather([self._means(group) for group in batch.groups]), dim=-1)
        texts, sentences = self._sides(batch, embedded)
        return texts @ sentences.T / self.temperature

    def _sides(self, batch: Batch, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """The texts and the label sentences."""
        count = len(self.labels)
        if not isinstance(batch, Compared):
            return embedded[:-count], embedded[-count:]
        labels = batch.labels
        if batch.turn == 0:
            embedded, labels.embedded = embedded[:-count], embedded[-count:]
        elif labels.turn != batch.turn:
            raise RuntimeError(f"batch {batch.turn} of several is evaluated where batch {labels.turn} was to come")
        labels.turn = batch.turn + 1
        assert labels.embedded is not None
        return embedded, labels.embedded

    def _means(self, group: Group | Packed) -> Tensor:
        """(rows, size): the mean of each row's last hidden states, in float32."""
        if isinstance(group, Packed):
            assert self.packer is not None
            return self.packer.means(group)
        hidden: Tensor = self.model(input_ids=group.ids, attention_mask=group.mask).last_hidden_state.float()
        mask = group.mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)
