"""What the objectives share that score texts which go on after a prompt: candidates (candidates.py) and answers
(answering.py).

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

from zokern.finetune import adapted, likelihood, virtual
from zokern.finetune.batches import Batch, Packed, Rows, cut
from zokern.finetune.data import TextSet
from zokern.finetune.encoding import Encoded, once
from zokern.finetune.examples import Example, Text, parts
from zokern.finetune.framing import Frame
from zokern.finetune.options import FinetuneError
from zokern.finetune.packed_attention import Unpackable
from zokern.finetune.packer import accepts, close, first_line
from zokern.finetune.packing import Wanted, pack
from zokern.finetune.tasks import Task


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


class Scored(Task):
    """Common part. limit: of the model, in tokens."""

    packs = True
    once = False  # whether an encoder reads each text once for all its candidates

    def __init__(self, model: nn.Module, tokenizer: Any, frame: Frame, limit: int, labels: list[str]) -> None:
        super().__init__(model, tokenizer, labels, frame.max_length)
        self.frame, self.limit = frame, limit
        self.kept: dict[str, Kept] = {}
        self.keeps = accepts(model, "logits_to_keep")
        if frame.encoder and not hasattr(model, "prepare_decoder_input_ids_from_labels"):
            raise FinetuneError(
                f"{type(model).__name__} has no prepare_decoder_input_ids_from_labels, which says what its decoder reads; "
                "give another encoder-decoder"
            )
        if frame.encoder:
            self._check_begins(model)

    @staticmethod
    def _check_begins(model: Any) -> None:
        """Tried once, as each decoder has its own way to begin."""
        try:
            model.prepare_decoder_input_ids_from_labels(labels=torch.zeros(1, 1, dtype=torch.int64))
        except ValueError as error:
            raise FinetuneError(
                f"{type(model).__name__}'s decoder cannot begin ({str(error).strip().splitlines()[0]}): give its "
                'config.json what is missing, as "decoder_start_token_id"'
            ) from error

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

    def pack(self) -> None:
        """From here on rows are packed, or an encoder reads each text once."""
        name = next(iter(self.kept))
        if not self.frame.encoder:
            super().pack()
        elif len(self.kept[name].counts) > len(self.kept[name].texts):
            self._encode_once(name)

    @torch.no_grad()
    def _encode_once(self, name: str) -> None:
        """Raises Unpackable where a text's scores are not the same then."""
        if virtual.room(self.model):
            raise Unpackable("the adapter has virtual tokens")
        kept = self.kept[name]
        most = max(range(len(kept.texts)), key=lambda i: kept.begins[i + 1] - kept.begins[i])
        alone = self.scores(self.batch(name, [0, most]))
        try:
            self.once = True
            if close(self.scores(self.batch(name, [0, most])), alone):
                return
            why = "its scores are others"
        except Exception as error:  # of a model's own code
            why = first_line(error)
        self.once = False
        raise Unpackable(f"the encoder of a {type(adapted.plain(self.model)).__name__} cannot be used alone ({why})")

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
        if self.once:
            made = once(rows, each, right)
        elif self.packer is None:
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
            rows = group.said if isinstance(group, Encoded) else group.rows
            counts = kept.counts.index_select(0, rows)
            if kept.said is None or kept.read is None:
                found.append(likelihood.of_ends(self.model, group, counts, kept.most, keeps=self.keeps))
            else:
                read, said = (ids.index_select(0, rows) for ids in (kept.read, kept.said.ids))
                found.append(likelihood.of_decoded(self.model, group, read, said, counts))
        return batch.gather(found)


def _example(text: Text) -> Example:
    return text if isinstance(text, Example) else Example(parts(text))
