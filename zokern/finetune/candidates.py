"""Objectives that score candidates after a prompt: of each row's own (`Choices`), or label words of an encoder-decoder
(`Spoken`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zokern.finetune.batches import Batch
from zokern.finetune.data import TextSet
from zokern.finetune.examples import Example
from zokern.finetune.framing import Frame
from zokern.finetune.options import FinetuneError
from zokern.finetune.scored import Asked, Scored
from zokern.finetune.tasks import Judged, Task
from zokern.passes.table import upload
from zokern.tasks import metrics
from zokern.tasks.metrics import Metric


@dataclass
class Choosing(Asked):
    """places: of each row in the logits, flattened. wrong: where these, (texts, candidates), have no right candidate."""

    places: Tensor
    wrong: Tensor


class Choices(Scored):
    """Each text has candidates of its own, of which some are right.

    Class logit = score of the candidate. Loss = -log of the softmax's share of the right ones: the cross entropy, where one
    is right.
    """

    def add(self, name: str, texts: TextSet) -> None:
        """Tokenise a set once; a row has all its candidates."""
        rows, _, prompts = self.prompts(name, texts)
        flat = [candidate for row in rows for candidate in row.candidates]
        ends = iter(self.frame.going_on(flat, lambda i: f"the candidate {flat[i]!r} (--choices)"))
        self.keep(name, rows, prompts, [[next(ends) for _ in row.candidates] for row in rows])

    def batch(self, name: str, wanted: Sequence[int]) -> Choosing:
        """The candidates of the texts with the indices `wanted`."""
        made = super().batch(name, wanted)
        texts = [self.kept[name].texts[i] for i in wanted]
        width = max(len(text.candidates) for text in texts)
        places = [i * width + c for i, text in enumerate(texts) for c in range(len(text.candidates))]
        wrong = torch.tensor([[c not in text.right for c in range(width)] for text in texts])
        whole = upload(torch.cat([torch.tensor(places), wrong.flatten().long()]), self.device)
        marks = whole[len(places) :].view(wrong.shape).bool()
        return Choosing(made.groups, made.order, made.targets, name, made.wanted, whole[: len(places)], marks)

    def logits(self, batch: Batch) -> Tensor:
        """(texts, candidates of the text that has most), in float32; -inf where a text has fewer."""
        assert isinstance(batch, Choosing)
        scores = self.scores(batch)
        logits = scores.new_full(batch.wrong.shape, float("-inf")).flatten()
        return logits.index_copy(0, batch.places, scores).view(batch.wrong.shape)

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of a batch, a scalar."""
        return self._losses(batch, self.logits(batch)).mean()

    def judged(self, batch: Batch, *, loss: bool = True) -> Judged:
        """The best candidates' places, and the sum of the losses."""
        assert isinstance(batch, Choosing)
        logits = self.logits(batch)
        texts = [self.kept[batch.name].texts[i] for i in batch.wanted]
        return Judged(logits.argmax(1), texts, self._losses(batch, logits).sum())

    def _losses(self, batch: Batch, logits: Tensor) -> Tensor:
        assert isinstance(batch, Choosing)
        return logits.logsumexp(1) - logits.masked_fill(batch.wrong, float("-inf")).logsumexp(1)

    def check_metric(self, metric: Metric) -> None:
        """Raises FinetuneError for what cannot compare candidates."""
        if metric.of == metrics.CLASSES and metric.name != "accuracy":
            raise FinetuneError(
                f"--metric {metric.name} compares classes, and candidates are none; take accuracy, exact_match or token_f1"
            )

    def told(self, judged: Judged) -> tuple[list[Any], list[Any]]:
        """For accuracy, places; for metrics of texts, the candidates."""
        assert isinstance(judged.said, Tensor)
        places = judged.said.tolist()
        if self.metric.name == "accuracy":
            return places, [
                p if p in text.right else text.right[0] for p, text in zip(places, judged.asked, strict=True)
            ]
        said = [text.candidates[p] for p, text in zip(places, judged.asked, strict=True)]
        return said, [[text.candidates[p] for p in text.right] for text in judged.asked]


class Spoken(Choices):
    """The prompt objective of an encoder-decoder: the label words are every text's candidates."""

    def __init__(
        self, model: nn.Module, tokenizer: Any, frame: Frame, limit: int, labels: list[str], words: list[str]
    ) -> None:
        super().__init__(model, tokenizer, frame, limit, labels)
        self.words = frame.going_on(words, lambda i: f"the label word {words[i]!r}")
        if len(set(map(tuple, self.words))) < len(self.words):
            raise FinetuneError(
                f"--verbalizers: two labels have the same tokens in {dict(zip(labels, words, strict=True))}"
            )

    def add(self, name: str, texts: TextSet) -> None:
        """Tokenise a set once."""
        rows, targets, prompts = self.prompts(name, texts)
        rows = [Example(row.parts, tuple(self.labels), (i,)) for row, i in zip(rows, targets, strict=True)]
        self.keep(name, rows, prompts, [self.words for _ in rows])

    def check_metric(self, metric: Metric) -> None:
        """Labels are classes."""
        Task.check_metric(self, metric)

    def told(self, judged: Judged) -> tuple[list[Any], list[Any]]:
        """The labels."""
        assert isinstance(judged.said, Tensor)
        return [self.labels[i] for i in judged.said.tolist()], [self.labels[text.right[0]] for text in judged.asked]
