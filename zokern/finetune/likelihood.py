"""How likely a language model finds the end of a row: the mean log-likelihood of its last tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zokern.finetune.batches import Group
from zokern.finetune.encoding import read_once


def vocabulary(model: nn.Module, group: Group, first: int, *, keeps: bool) -> tuple[Tensor, int]:
    """(logits, the position of their first, `first` or earlier): most of the head's work is skipped.

    keeps: whether the model's forward takes logits_to_keep.
    """
    if not keeps:
        return model(input_ids=group.ids, attention_mask=group.mask).logits, 0
    keep = group.ids.shape[1] - first
    return model(input_ids=group.ids, attention_mask=group.mask, logits_to_keep=keep).logits, first


def of_ends(model: nn.Module, group: Group, counts: Tensor, most: int, *, keeps: bool) -> Tensor:
    """(rows,): of the last counts[i] tokens of row i, the mean log-likelihood, in float32. most: the largest count."""
    start = group.lengths - counts  # where the end begins; position p is predicted at p - 1
    logits, first = vocabulary(model, group, max(group.shortest - most - 1, 0), keeps=keeps)
    spoken = F.log_softmax(logits[:, :-1].float(), dim=-1)
    tokens = group.ids[:, first + 1 :]
    likelihood = spoken.gather(2, tokens.unsqueeze(2)).squeeze(2)
    position = torch.arange(first + 1, group.ids.shape[1], device=group.ids.device)
    inside = (position >= start[:, None]) & (position < group.lengths[:, None])
    return torch.where(inside, likelihood, 0.0).sum(1) / counts


def of_decoded(model: nn.Module, group: Group, read: Tensor, said: Tensor, counts: Tensor) -> Tensor:
    """(rows,): of what an encoder-decoder says after reading a group, the mean log-likelihood, in float32.

    read, said: what the decoder reads and is to say, (rows, tokens) each. counts: how many tokens of each row count.
    """
    logits = model(**read_once(model, group), decoder_input_ids=read).logits
    likelihood = F.log_softmax(logits.float(), dim=-1).gather(2, said.unsqueeze(2)).squeeze(2)
    inside = torch.arange(said.shape[1], device=said.device) < counts[:, None]
    return torch.where(inside, likelihood, 0.0).sum(1) / counts
