"""MeZO's released loop (Malladi et al. 2023, large_models/), written by us from what it does; beside.py times it.

Forward, as it trains SST-2: each sentence is one row for each label, the prompt with the label's word behind it; rows are
padded on the left to the longest, and that to a multiple of 8. The model is called as it is, so there are logits at every
position, padding included. They are shifted by one and copied; log_softmax over the vocabulary makes as many numbers again;
of these the words' tokens are picked and averaged over a word. The loss is the cross entropy over the labels.

Step (zokern.bench.step_peers.Published), in the weights' dtype: torch.manual_seed(s); one tensor after another,
z = torch.normal(0, 1) and the parameter is given a new tensor, w + 1 * z * eps; forward; the same with -2; forward; the
difference of the losses over 2 eps comes to the host by .item(); the same with +1, which puts the weights back; then
w + c * z * -lr, for which z is drawn a fourth time.

Kinder than what is released: no term of weight decay (they compute one of 0), no Trainer around the step, and a tokeniser
that has done its work before. Float32, as everything on a CPU here; theirs runs in float16 on a GPU.

`one_row` is kinder still, and is not what they do: a row a sentence, the prompt alone, and no log_softmax. It takes words
of one token, for which both have one loss: the softmax over the vocabulary cancels in that over the labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MULTIPLE = 8  # of tokens, to which rows are padded
Tokens = Sequence[int]


@dataclass(frozen=True)
class Nested:
    """A batch. ids, mask: (rows, tokens). words: of each row, how many tokens its word has. targets: (sentences,)."""

    ids: Tensor
    mask: Tensor
    words: list[int]
    targets: Tensor


def nested(prompts: Sequence[Tokens], words: Sequence[Tokens], targets: Tokens, pad: int) -> Nested:
    """Each prompt with each word behind it, in that order."""
    rows = [[*prompt, *word] for prompt in prompts for word in words]
    width = -(-max(map(len, rows)) // MULTIPLE) * MULTIPLE
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return Nested(ids, mask, [len(word) for _ in prompts for word in words], torch.tensor(targets))


def loss(model: nn.Module, batch: Nested) -> Tensor:
    """Cross entropy over the labels, from log-likelihoods at every position."""
    logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits
    shifted, said = logits[..., :-1, :].contiguous(), batch.ids[..., 1:].clone()
    place = torch.arange(said.shape[1], 0, -1)
    spoken = place <= torch.tensor(batch.words)[:, None]
    likelihood = F.log_softmax(shifted, dim=-1)
    picked = likelihood.gather(-1, said.unsqueeze(-1)).squeeze(-1)
    scores = (picked * spoken).sum(-1) / spoken.sum(-1)
    return F.cross_entropy(scores.view(len(batch.targets), -1), batch.targets)


def one_row(model: nn.Module, batch: Nested, first: Tensor) -> Tensor:
    """Cross entropy over the labels. batch: nested() of the prompts and one empty word; first: (labels,), their tokens."""
    logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits
    return F.cross_entropy(logits[:, -1].index_select(1, first), batch.targets)
