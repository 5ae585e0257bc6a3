"""A hash of weights: what a journal starts from, what its replay must end with, and what waiting updates belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from zokern import parts
from zokern._checks import is_composed


def hash_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """BLAKE2b (128 bits) of names, dtypes, shapes and bytes, in the order of the names. A quantised tensor of torchao
    counts as the tensors that it is made of. A DTensor counts as the whole tensor: one at a time is gathered, and all ranks
    have to ask."""
    total = hashlib.blake2b(digest_size=16)
    for name, t in sorted((part for one in tensors for part in _parts(*one)), key=lambda entry: entry[0]):
        total.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        one = parts.whole(t.detach())
        one = one[(0,) * one.dim()] if one.numel() > 1 and not any(one.stride()) else one  # a delta has one number
        flat = one.reshape(-1).contiguous().view(torch.uint8)
        for piece in flat.split(1 << 26):  # bounded memory for tensors from a device
            total.update(piece.cpu().numpy())
    return total.hexdigest()


def _parts(name: str, t: Tensor) -> Iterator[tuple[str, Tensor]]:
    if not is_composed(t):
        yield name, t
        return
    composed: Any = t
    for part in composed.__tensor_flatten__()[0]:
        yield from _parts(f"{name}.{part}", getattr(t, part))
