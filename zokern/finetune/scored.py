"""Objectives that score texts which go on after a prompt: candidates of each row's own (`Choices`), label words of an
encoder-decoder (`Spoken`), and answers (answering.py).

A score is the mean log-likelihood of the text's tokens. A decoder reads prompt and text as one row; of an encoder-decoder
the encoder reads the prompt and the decoder says the text.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zokern.finetune import likelihood, virtual
from zokern.finetune.batches import Batch, Packed, Rows, cut
from zokern.finetune.data import TextSet
from zokern.finetune.examples import Example, Text, parts
from zokern.finetune.framing import Frame
from zokern.finetune.options import FinetuneError
from zokern.finetune.packer import accepts
from zokern.finetune.packing import Wanted, pack
from zokern.finetune.tasks import Judged, Task
from zokern.passes.table import upload
from zokern.tasks import metrics
from zokern.tasks.metrics import Metric


@dataclass
class Kept:
    """A set. texts: the rows that were kept. begins: text i has the rows begins[i] to begins[i + 1]. sizes, counts: of the
    tokens that are scored in each row, here and on the device. said, read: what a decoder of its own says, and reads before
    that."""

    texts: list[Example]
    begins: list[int]
    sizes: list[int]
    counts: Tensor
    most: int
    said: Rows | None = None
    read: Tensor | None = None


@dataclass
class Asked(Batch):
    """The batch of the texts `wanted` of a set."""

    name: str
    wanted: list[int]


@dataclass
class Choosing(Asked):
    """places: of each row in the logits, flattened. wrong: where these, (texts, candidates), have no right candidate."""

    places: Tensor
    wrong: Tensor


class Scored(Task):
    """Common part. limit: of the model, in tokens."""

    def __init__(self, model: nn.Module, tokenizer: Any, frame: Frame, limit: int, labels: list[str]) -> None:
        super().__init__(model, tokenizer, labels, frame.max_length)
        self.frame, self.limit = frame, limit
        self.kept: dict[str, Kept] = {}
        self.keeps = accepts(model, "logits_to_keep")
        self.reads = None if frame.encoder else "logits"
        if frame.encoder and not hasattr(model, "prepare_decoder_input_ids_from_labels"):
            raise FinetuneError(
                f"{type(model).__name__} has no prepare_decoder_input_ids_from_labels, which says what its decoder reads; "
                "give another encoder-decoder"
            )

    def lengths(self, name: str) -> list[int]:
        """Of each text, the tokens of its first row."""
        rows, kept = self.sets[name][0], self.kept[name]
        return [rows.lengths[begin] for begin in kept.begins[:-1]]

    def hashed(self, name: str) -> list[Rows]:
        """What the model reads, and what a decoder of its own says."""
        said = self.kept[name].said
        return [self.sets[name][0], *([] if said is None else [said])]

    def keep(
        self, name: str, texts: Sequence[Example], prompts: Sequence[list[int]], ends: Sequence[list[list[int]]]
    ) -> None:
        """A set, of which text i is the prompts[i], each with one of the ends[i] after it."""
        flat = [(prompt, end) for prompt, several in zip(prompts, ends, strict=True) for end in several]
        begins = [0, *itertools.accumulate(map(len, ends))]
        sizes = [len(end) for _, end in flat]
        kept = Kept(list(texts), begins, sizes, torch.tensor(sizes, device=self.device), max(sizes))
        self._check_room(kept.most)
        if self.frame.encoder:
            rows, kept.said = self._pack([prompt for prompt, _ in flat]), self._pack([end for _, end in flat])
            model: Any = self.model
            kept.read = model.prepare_decoder_input_ids_from_labels(labels=kept.said.ids)
        else:
            rows = self._pack([prompt + end for prompt, end in flat])
        self.sets[name] = (rows, [text.right[0] if text.right else 0 for text in texts])
        self.kept[name] = kept

    def _check_room(self, most: int) -> None:
        if self.frame.encoder and most > self.limit:
            raise FinetuneError(
                f"what the decoder is to say has up to {most} tokens (--max-answer, or the longest candidate or word), "
                f"and the model takes {self.limit}: make it shorter"
            )
        self.room = max(self.room, 0 if self.frame.encoder else most)
        if self.max_length + self.room > self.limit:
            raise FinetuneError(
                f"--max-length is {self.max_length}; allowed: at most {self.limit - self.room}, as the model takes "
                f"{self.limit} tokens{virtual.beside(self.model)} and what follows the prompt has up to {self.room}"
            )

    def prompts(self, name: str, texts: TextSet) -> tuple[list[Example], list[int], list[list[int]]]:
        """(rows, their targets, their prompts) of a set; those without any token are left out and counted."""
        found, self.cuts[name] = self.frame.prompts(texts.texts)
        some = [i for i, prompt in enumerate(found) if prompt]
        if not some:
            raise FinetuneError(f"{name}: no text has a token that the tokenizer knows")
        if len(some) < len(found):
            self.empty[name] = len(found) - len(some)
        rows = [_example(texts.texts[i]) for i in some]
        return rows, [texts.targets[i] for i in some], [found[i] for i in some]

    def batch(self, name: str, wanted: Sequence[int]) -> Asked:
        """The rows of the texts with the indices `wanted`."""
        rows, targets = self.sets[name]
        begins, sizes = self.kept[name].begins, self.kept[name].sizes
        each = [list(range(begins[i], begins[i + 1])) for i in wanted]
        right = [targets[i] for i in wanted]
        if self.packer is None:
            made = cut(rows, [row for own in each for row in own], right)
        else:
            counts = [[sizes[row] for row in own] for own in each]
            shared = [rows.lengths[own[0]] - sizes[own[0]] for own in each]
            made = pack(rows, [Wanted(*text) for text in zip(each, shared, counts, strict=True)], right)
        return Asked(made.groups, made.order, made.targets, name, list(wanted))

    def scores(self, batch: Asked) -> Tensor:
        """(rows,): the mean log-likelihood of each end, in float32, text by text."""
        kept, found = self.kept[batch.name], []
        for group in batch.groups:
            if isinstance(group, Packed):
                assert self.packer is not None
                found.append(self.packer.likelihoods(group))
                continue
            counts = kept.counts.index_select(0, group.rows)
            if kept.said is None or kept.read is None:
                found.append(likelihood.of_ends(self.model, group, counts, kept.most, keeps=self.keeps))
            else:
                read, said = (ids.index_select(0, group.rows) for ids in (kept.read, kept.said.ids))
                found.append(likelihood.of_decoded(self.model, group, read, said, counts))
        return batch.gather(found)


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


def _example(text: Text) -> Example:
    return text if isinstance(text, Example) else Example(parts(text))
