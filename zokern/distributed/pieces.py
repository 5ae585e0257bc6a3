"""Many bytes that the first rank has and all others need: a journal. In pieces, so that memory is bounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO

import torch

from zokern.distributed.exchange import Exchange

PIECE = 1 << 20  # bytes


def from_first(
    exchange: Exchange, source: BinaryIO | None, sink: Callable[[bytes], object], size: int, seconds: float, what: str
) -> None:
    """The first `size` bytes of the first rank's `source`, from where it stands, to every other rank's `sink`.

    size: the same on all ranks. seconds: that a rank waits for each piece. what: this is, in words.

    Raises:
        OSError: where `source` cannot be read, or `sink` not written; the other ranks have had all pieces then.
        RankError: where a rank is lost.
    """
    failed: OSError | None = None
    piece = torch.empty(min(size, PIECE), dtype=torch.uint8, device="cpu")
    for at in range(0, size, PIECE):
        part = piece[: min(PIECE, size - at)]
        if source is not None:
            try:
                data = source.read(len(part))
                if len(data) != len(part):
                    raise OSError(f"{what} has become shorter while it was read")
                part.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            except OSError as error:
                failed = failed or error
            exchange.sent += len(part)
        exchange.from_first(part, seconds, what)
        if source is None and failed is None:
            try:
                sink(part.numpy().tobytes())
            except OSError as error:
                failed = error
    if failed is not None:
        raise failed
