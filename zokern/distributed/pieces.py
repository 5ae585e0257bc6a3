"""Many bytes that the first rank has and all others need: a journal. In pieces, so that memory is bounded."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import BinaryIO

import torch
import torch.distributed as dist

from zokern.distributed.exchange import Exchange, RankError, _first_line, _on_hosts, forget

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
        _send(exchange, part, seconds, what)
        if source is None and failed is None:
            try:
                sink(part.numpy().tobytes())
            except OSError as error:
                failed = error
    if failed is not None:
        raise failed


def _send(exchange: Exchange, part: torch.Tensor, seconds: float, what: str) -> None:
    exchange.collectives += 1
    try:
        group = _on_hosts(exchange.places.ranks, seconds)
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = dist.get_group_rank(group, exchange.places.ranks[0]), 0
        options.timeout = datetime.timedelta(seconds=seconds)
        group.broadcast([part], options).wait()
    except RuntimeError as error:
        forget(exchange.places.ranks)
        exchange.broken = f"a rank was lost while {what} was sent to all"
        raise RankError(f"{exchange.broken} (torch: {_first_line(error)})") from error
