"""A hash of weights: what a journal starts from, and what its replay must end with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def hash_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """BLAKE2b (128 bits) of names, dtypes, shapes and bytes, in the order of the names."""
    total = hashlib.blake2b(digest_size=16)
    for name, t in sorted(tensors, key=lambda entry: entry[0]):
        total.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        flat = t.detach().reshape(-1).contiguous().view(torch.uint8)
        for piece in flat.split(1 << 26):  # bounded memory for tensors from a device
            total.update(piece.cpu().numpy())
    return total.hexdigest()
