"""Texts that an encoder reads once, whatever number of candidates its decoder says after each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zokern.finetune import adapted
from zokern.finetune.batches import Batch, Group, Rows, cut, from_parts, in_parts
from zokern.passes.table import upload

_ROWS = 64  # that a decoder says at once, but for a text that has more


@dataclass(kw_only=True)
class Encoded(Group):
    """Its ids are those of the texts. text: (candidates,), which of them each candidate follows. said: (candidates,), their
    rows in the set."""

    text: Tensor
    said: Tensor


def once(rows: Rows, texts: Sequence[list[int]], targets: Sequence[int]) -> Batch:
    """The batch of the texts that have these rows each. Its groups are Encoded; their results are one for each row."""
    device = rows.ids.device
    counts, groups = list(map(len, texts)), []
    parts = in_parts(counts, [rows.lengths[own[0]] for own in texts], _ROWS)
    for part in parts:
        text = upload(torch.tensor([place for place, i in enumerate(part) for _ in texts[i]]), device)
        said = upload(torch.tensor([row for i in part for row in texts[i]]), device)
        for group in cut(rows, [texts[i][0] for i in part], [], whole=True).groups:
            assert isinstance(group, Group)
            groups.append(
                Encoded(group.ids, group.mask, group.lengths, group.rows, group.shortest, text=text, said=said)
            )
    back, classes = (upload(torch.tensor(list(one)), device) for one in (from_parts(parts, counts), targets))
    return Batch(groups, back, classes)


def read_once(model: nn.Module, group: Group) -> dict[str, Any]:
    """What the model is given of a group: its tokens, or what its encoder makes of them, for each candidate."""
    if not isinstance(group, Encoded):
        return {"input_ids": group.ids, "attention_mask": group.mask}
    plain: Any = adapted.plain(model)
    read = plain.get_encoder()(input_ids=group.ids, attention_mask=group.mask)
    each = type(read)(last_hidden_state=read.last_hidden_state.index_select(0, group.text))
    return {"encoder_outputs": each, "attention_mask": group.mask.index_select(0, group.text)}
