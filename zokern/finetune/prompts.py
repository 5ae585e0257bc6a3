"""The prompt objective: a text in a template, and the likelihood that a language model gives to each label's word
after it.

MeZO's own main setting (Malladi et al. 2023, section 3). Class logit = mean log-likelihood of the word's tokens.
Where every word is a single token, that is one forward over the prompts alone: the logits of those tokens at the
prompt's last position (the softmax over the vocabulary cancels in the softmax over the classes).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zokern.finetune import likelihood, virtual
from zokern.finetune.batches import Batch, Group, Packed, cut
from zokern.finetune.checkpoints import check_tokens
from zokern.finetune.examples import Text
from zokern.finetune.fitting import Cut
from zokern.finetune.framing import Frame
from zokern.finetune.options import FinetuneError
from zokern.finetune.packer import accepts
from zokern.finetune.packing import Wanted, pack
from zokern.finetune.tasks import Task


class Prompt(Task):
    """words[i]: the word of label i. limit: the model's, in tokens, words included. The rest: as of Frame."""

    packs = True

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        labels: list[str],
        max_length: int,
        template: str,
        words: list[str],
        *,
        space: bool = True,
        limit: int | None = None,
        cut: int | None = None,
        chat: bool = False,
    ) -> None:
        super().__init__(model, tokenizer, labels, max_length)
        self.frame = Frame(tokenizer, template, max_length, space=space, cut=cut, chat=chat)
        self.words = self.frame.going_on(words, lambda i: f"the label word {words[i].strip()!r}")
        if len({tuple(word) for word in self.words}) < len(self.words):
            raise FinetuneError(
                f"--verbalizers: two labels have the same tokens in {dict(zip(labels, words, strict=True))}"
            )
        for label, word in zip(labels, self.words, strict=True):  # a single token is never packed with the texts
            check_tokens(model, tokenizer, set(word), f"the word of the label {label!r} (--verbalizers)")
        self.single = all(len(word) == 1 for word in self.words)
        self.room = 0 if self.single else max(map(len, self.words))  # a single token is scored, never read
        if limit is not None and max_length + self.room > limit:
            raise FinetuneError(
                f"--max-length is {max_length}; allowed: at most {limit - self.room}, as the model takes {limit} tokens"
                f"{virtual.beside(model)} and the longest label word has {self.room}"
            )
        self._counts = torch.tensor([len(word) for word in self.words], device=self.device)
        self._first = torch.tensor([word[0] for word in self.words], device=self.device)
        self._keeps = accepts(model, "logits_to_keep")

    def batch(self, name: str, wanted: Sequence[int]) -> Batch:
        """The prompts with the indices `wanted`; where words have several tokens, each prompt once per label."""
        rows, targets = self.sets[name]
        each = 1 if self.single else len(self.words)
        right = [targets[i] for i in wanted]
        if self.packer is None:
            return cut(rows, [i * each + c for i in wanted for c in range(each)], right)
        if self.single:
            return pack(rows, [Wanted([i], 0, [0]) for i in wanted], right)
        counts = [len(word) for word in self.words]
        indices = [list(range(i * each, (i + 1) * each)) for i in wanted]
        return pack(rows, [Wanted(own, rows.lengths[own[0]] - counts[0], counts) for own in indices], right)

    def logits(self, batch: Batch) -> Tensor:
        """(texts, classes), in float32."""
        if self.single:
            return batch.gather([self._last(group) for group in batch.groups])
        return batch.gather([self._likelihood(group) for group in batch.groups]).view(-1, len(self.words))

    def _last(self, group: Group | Packed) -> Tensor:
        if isinstance(group, Packed):
            assert self.packer is not None
            return self.packer.lasts(group).index_select(1, self._first).float()
        end = group.lengths - 1
        logits, first = likelihood.vocabulary(self.model, group, group.shortest - 1, keeps=self._keeps)
        at_end = logits[torch.arange(len(end), device=end.device), end - first]
        return at_end.index_select(1, self._first).float()

    def _likelihood(self, group: Group | Packed) -> Tensor:
        if isinstance(group, Packed):
            assert self.packer is not None
            return self.packer.likelihoods(group)
        counts = self._counts.index_select(0, group.rows % len(self.words))
        return likelihood.of_ends(self.model, group, counts, max(map(len, self.words)), keeps=self._keeps)

    def _tokens(self, texts: Sequence[Text]) -> tuple[list[list[int]], Cut]:
        prompts, cut = self.frame.prompts(texts)
        return (prompts if self.single else [prompt + word for prompt in prompts for word in self.words]), cut
