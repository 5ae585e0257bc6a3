"""Forwards of packed rows, for models that are shown to give each row what it gets alone."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zokern.finetune import adapted, virtual
from zokern.finetune.batches import Packed, Rows
from zokern.finetune.packed_attention import Unpackable, attend_as, attend_in_rows, rows_of
from zokern.finetune.packing import Wanted, pack

# Of the largest output: what another order of sums may change in a model of many layers.
_CLOSE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward takes a keyword argument of this name."""
    return argument in inspect.signature(adapted.plain(model).forward).parameters


class Packer:
    """offset: the position of a row's first token, as the model counts them."""

    def __init__(self, model: nn.Module, *, offset: int = 0) -> None:
        self.model, self.offset = model, offset
        self._fixed: dict[str, Any] = {"use_cache": False} if accepts(model, "use_cache") else {}
        self._keeps = accepts(model, "logits_to_keep")
        config: Any = adapted.plain(model).config  # GPT-2 takes types too, and adds the embeddings of such tokens
        self._typed = accepts(model, "token_type_ids") and hasattr(config, "type_vocab_size")

    def hidden(self, packed: Packed) -> Tensor:
        """(N, size): the last hidden state of each token."""
        hidden: Tensor = self._forward(packed).last_hidden_state[0]
        return hidden

    def logits(self, packed: Packed) -> Tensor:
        """(k, vocabulary): what follows each token that is read."""
        if self._keeps:
            kept: Tensor = self._forward(packed, logits_to_keep=packed.reads).logits[0]
            return kept
        every: Tensor = self._forward(packed).logits[0]
        return every.index_select(0, packed.reads)

    def lasts(self, packed: Packed) -> Tensor:
        """(rows, vocabulary): what follows each row."""
        return self.logits(packed)[packed.ends[:, 0]]

    def means(self, packed: Packed) -> Tensor:
        """(rows, size): the mean of each row's last hidden states, in float32."""
        hidden, found = self.hidden(packed).float(), []
        for piece in packed.pieces:
            inside = piece.inside.unsqueeze(-1).to(hidden.dtype)
            found.append((hidden[piece.places] * inside).sum(1) / inside.sum(1))
        return torch.cat(found)

    def likelihoods(self, packed: Packed) -> Tensor:
        """(rows,): the mean log-likelihood of each row's end, in float32."""
        spoken = F.log_softmax(self.logits(packed).float(), dim=-1)[packed.ends, packed.said]
        inside = torch.arange(packed.ends.shape[1], device=spoken.device) < packed.counts[:, None]
        return torch.where(inside, spoken, 0.0).sum(1) / packed.counts

    def _forward(self, packed: Packed, **also: Any) -> Any:
        positions = packed.positions + self.offset if self.offset else packed.positions
        if self._typed:
            also["token_type_ids"] = torch.zeros_like(packed.ids)
        with rows_of(packed):
            return self.model(input_ids=packed.ids, position_ids=positions, **self._fixed, **also)


def proven(model: nn.Module, sets: Sequence[Rows], *, scores: bool) -> Packer:
    """A Packer of the model, which has attention for it from then on.

    sets: what it is to read. Its longest, shortest and middle rows are read packed and alone. scores: whether logits are
    read, and rows may begin alike.

    Raises:
        Unpackable: for a model to which rows are not the same packed and alone; it is then as it was.
    """
    plain: Any = adapted.plain(model)
    if not accepts(model, "position_ids"):
        raise Unpackable(f"a {type(plain).__name__} takes no positions")
    if virtual.room(model):
        raise Unpackable("the adapter has virtual tokens")
    samples, shared = _samples(sets, scores)
    alone = [_alone(model, samples, i, scores) for i in range(len(samples.lengths))]
    before = plain.config._attn_implementation
    attend_in_rows(model)
    why = "it reads rows otherwise when they are packed"
    padding = getattr(plain.config, "pad_token_id", None)
    for offset in (0, *([padding + 1] if isinstance(padding, int) else [])):
        packer = Packer(model, offset=offset)
        try:
            found = _together(packer, samples, shared, scores)
            if all(map(close, found, alone)) and _stays(found, packer, samples, shared, scores):
                return packer
        except Exception as error:  # of a model's own code, which may take no packed rows at all
            why = first_line(error)
    attend_as(model, before)
    raise Unpackable(f"a {type(plain).__name__} cannot do that ({why})")


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether two outputs of a model are the same, but for rounding. expected: in the model's number format."""
    largest = expected.abs().amax()
    return bool(((found - expected).abs().amax() <= _CLOSE.get(expected.dtype, 1e-4) * largest).item())


def first_line(error: Exception) -> str:
    """What an error says."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _samples(sets: Sequence[Rows], scores: bool) -> tuple[Rows, int]:
    """Rows of three lengths, and one more that begins as the third; how many tokens these have in common."""
    every = sorted((length, s, i) for s, rows in enumerate(sets) for i, length in enumerate(rows.lengths))
    chosen = [every[0], every[len(every) // 2], every[-1]]
    found = [sets[s].ids[i, :length].tolist() for length, s, i in chosen]
    shared = 0
    if scores and len(found[2]) > 1:
        shared = len(found[2]) // 2
        found.append(found[2][:shared] + found[2][shared:][::-1])
    return Rows.pack(found, 0, sets[0].ids.device), shared


def _wanted(shared: int) -> list[Wanted]:
    return [Wanted([0], 0, [0]), Wanted([1], 0, [0]), Wanted([2, 3], shared, [0, 0]) if shared else Wanted([2], 0, [0])]


@torch.no_grad()
def _alone(model: nn.Module, samples: Rows, i: int, scores: bool) -> Tensor:
    ids = samples.ids[i : i + 1, : samples.lengths[i]]
    found = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    if scores:
        last: Tensor = found.logits[0, -1]
        return last
    hidden: Tensor = found.last_hidden_state[0]
    return hidden.float().mean(0).to(hidden.dtype)


@torch.no_grad()
def _together(packer: Packer, samples: Rows, shared: int, scores: bool) -> list[Tensor]:
    batch = pack(samples, _wanted(shared), [])
    groups = [group for group in batch.groups if isinstance(group, Packed)]
    return list(batch.gather([packer.lasts(group) if scores else packer.means(group) for group in groups]))


def _stays(found: list[Tensor], packer: Packer, samples: Rows, shared: int, scores: bool) -> bool:
    """Whether another first row leaves the bits of the rest."""
    other, first = samples.ids.clone(), samples.lengths[0]
    other[0, :first] = samples.ids[2, samples.lengths[2] - first : samples.lengths[2]].flip(0)
    changed = _together(packer, Rows(other, samples.lengths), shared, scores)
    return all(torch.equal(a, b) for a, b in zip(found[1:], changed[1:], strict=True))
