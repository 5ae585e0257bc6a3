"""The answer objective: a language model learns to say the answer of each row, and is judged by what it writes.

Loss of a row = minus the mean log-likelihood of its first answer's tokens, the end token included; of a batch, the mean
over its rows. At evaluations the model writes greedily after each prompt, and its text is compared with all answers of the
row.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zokern import ZokernWarning
from zokern.finetune import writing
from zokern.finetune.batches import Batch
from zokern.finetune.checkpoints import check_tokens
from zokern.finetune.data import TextSet
from zokern.finetune.fitting import Cut
from zokern.finetune.framing import Frame
from zokern.finetune.options import FinetuneError
from zokern.finetune.scored import Asked, Scored
from zokern.finetune.tasks import Judged
from zokern.tasks import metrics
from zokern.tasks.metrics import Metric


class Answers(Scored):
    """max_answer: tokens that an answer may have, the end token counted; longer ones are cut where they are learnt."""

    metric: Metric = metrics.METRICS["token_f1"]

    def __init__(self, model: nn.Module, tokenizer: Any, frame: Frame, limit: int, max_answer: int) -> None:
        super().__init__(model, tokenizer, frame, limit, [])
        self.max_answer = max_answer
        self.asks: dict[str, list[list[int]]] = {}  # the prompts of each set
        self.one_line = True  # no answer that is learnt has a line break
        self._warned = False
        self._check_room(max_answer)
        if tokenizer.eos_token_id is None:
            raise FinetuneError(
                "--answer: the tokenizer of --model has no end token, so no answer would ever end; give another"
            )
        check_tokens(model, tokenizer, {tokenizer.eos_token_id}, "the tokenizer's end token")
        writing.check(model, self._ends(), tokenizer.pad_token_id)

    def add(self, name: str, texts: TextSet) -> None:
        """Tokenise a set once; a row has its first answer."""
        rows, _, prompts = self.prompts(name, texts)
        first = [row.answers[0] for row in rows]
        found = self.frame.going_on(first, lambda i: f"the answer {first[i][:60]!r} (--answer)")
        ends = [[*ids, self.tokenizer.eos_token_id] for ids in found]
        if name == "train":
            self.one_line = not any("\n" in answer for answer in first)
            if (cut := Cut.of(list(map(len, ends)), self.max_answer)).count:
                most = self.limit - (0 if self.frame.encoder else self.max_length)
                needed = f"--max-answer {cut.longest} cuts none"
                if cut.longest > most:
                    needed = f"the longest has {cut.longest}, the model takes {most}"
                    needed += "" if self.frame.encoder else " behind --max-length"
                self.notes.append(
                    f"{name}: {cut.count} of {cut.total} answers are cut to {self.max_answer} tokens; {needed}"
                )
        self.keep(name, rows, prompts, [[end[: self.max_answer]] for end in ends])
        self.asks[name] = prompts

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of a batch, a scalar."""
        assert isinstance(batch, Asked)
        return -self.scores(batch).mean()

    def judged(self, batch: Batch, *, loss: bool = True) -> Judged:
        """What the model writes, and the sum of the losses."""
        assert isinstance(batch, Asked)
        total = -self.scores(batch).sum() if loss else torch.zeros((), device=self.device)
        answers = [list(self.kept[batch.name].texts[i].answers) for i in batch.wanted]
        return Judged(self.written([self.asks[batch.name][i] for i in batch.wanted]), answers, total)

    def told(self, judged: Judged) -> tuple[list[Any], list[Any]]:
        """The texts."""
        return list(judged.said), judged.asked

    def check_metric(self, metric: Metric) -> None:
        """Raises FinetuneError for what compares classes."""
        if metric.of == metrics.CLASSES:
            raise FinetuneError(
                f"--metric {metric.name} compares classes, and answers are texts; take exact_match or token_f1"
            )

    def notice(self, predictions: Sequence[str]) -> None:
        """Warns, once a run, of answers without a text."""
        empty = sum(not text for text in predictions)
        if empty and not self._warned:
            self._warned = True
            warnings.warn(
                f"{empty} of {len(predictions)} answers that the model wrote are empty: it ended at once. They count as "
                "wrong; does --template end where an answer begins, and is --max-answer long enough?",
                ZokernWarning,
                stacklevel=2,
            )

    def written(self, prompts: Sequence[list[int]]) -> list[str]:
        """What the model writes after each prompt, greedily, until its end token, --max-answer, or a line break, where no
        answer that it learns has one."""
        said = writing.greedily(
            self.model, prompts, most=self.max_answer, ends=self._ends(), padding=self.tokenizer.pad_token_id,
            encoder=self.frame.encoder,
        )  # fmt: skip
        texts = [text.strip() for text in self.tokenizer.batch_decode(said, skip_special_tokens=True)]
        return [text.partition("\n")[0].rstrip() for text in texts] if self.one_line else texts

    def _ends(self) -> list[int]:
        """The tokenizer's end token and the model's own, as of a turn in a chat."""
        own = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        return sorted({self.tokenizer.eos_token_id, *([own] if isinstance(own, int) else own or ())})
