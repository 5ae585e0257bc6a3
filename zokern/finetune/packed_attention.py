"""Attention of packed rows, for models that take their attention from transformers' AttentionInterface (transformers 5).

Each row's queries, keys and values are gathered, padded on the right, and go through the attention that the model has had.
A causal one needs no mask for that: no token looks at padding behind it. Another gets a mask of the keys that are tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from zokern.finetune import adapted
from zokern.finetune.batches import Packed

NAME = "zokern_packed_rows"
_now: ContextVar[Packed | None] = ContextVar("zokern_packed_rows", default=None)


class Unpackable(Exception):
    """Why a model's rows cannot be packed."""


@contextlib.contextmanager
def rows_of(packed: Packed) -> Iterator[None]:
    """Inside, a forward of packed.ids attends within rows."""
    token = _now.set(packed)
    try:
        yield
    finally:
        _now.reset(token)


def attend_in_rows(model: nn.Module) -> None:
    """Gives a model attention that knows packed rows; without any it is the attention that the model has.

    Raises:
        Unpackable: for a model with another attention than transformers' SDPA, and with transformers before 5.
    """
    inner: Any = adapted.plain(model)
    before = getattr(inner.config, "_attn_implementation", None)
    if str(before).startswith(NAME):
        return
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        base = AttentionInterface()[before]
        mask = AttentionMaskInterface()[before]
    except (ImportError, KeyError, TypeError, AttributeError) as error:
        raise Unpackable(f"attention {before!r} is not transformers' SDPA") from error
    if base is not sdpa_attention_forward:
        raise Unpackable(f"attention {before!r} is not transformers' SDPA")

    def masked(*given: Any, **options: Any) -> Any:
        return None if _now.get() is not None else mask(*given, **options)

    name = f"{NAME}_{before}"
    AttentionInterface.register(name, _attend)
    AttentionMaskInterface.register(name, masked)
    attend_as(model, name)
    if inner.config._attn_implementation != name:
        raise Unpackable(f"a {type(inner).__name__} has an attention of its own")


def attend_as(model: nn.Module, name: str) -> None:
    """Gives a model the attention of a name, where its classes take one."""
    inner: Any = adapted.plain(model)
    with contextlib.suppress(AttributeError, ValueError):
        inner.set_attn_implementation(name)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, Any]:
    """As sdpa_attention_forward: query, key, value are (1, heads, N, size); returns (1, N, heads, size)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    packed = _now.get()
    if packed is None:
        found: tuple[Tensor, Any] = sdpa_attention_forward(module, query, key, value, attention_mask, **given)
        return found
    count = packed.ids.shape[1]
    if {query.shape[0], key.shape[0], value.shape[0]} != {1} or {t.shape[2] for t in (query, key, value)} != {count}:
        raise Unpackable("its attention reads other tokens than the rows'")
    if given.get("position_bias") is not None:
        raise Unpackable("its attention has a bias of its own")
    causal = given.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    parts = []
    for piece in packed.pieces:
        rows, longest = piece.places.shape
        places = piece.places.flatten()
        each = [
            t[0].transpose(0, 1).index_select(0, places).unflatten(0, (rows, longest)).transpose(1, 2)
            for t in (query, key, value)
        ]
        mask = None if causal else piece.inside[:, None, None].expand(rows, 1, longest, longest)
        parts.append(sdpa_attention_forward(module, *each, mask, **given)[0].flatten(0, 1))
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined.index_select(0, packed.owners)[None], None
