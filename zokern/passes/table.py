"""The chunk table: all tensors of a pass, one dtype on one device, as one kernel launch sees them.

`tensors` is int64 [T, COLUMNS]: numel, offset, tensor id, group, aligned, addresses of src, dst, two states and a probe.
`chunks` is int32 [C, 2]: row of `tensors`, number of a chunk of 2^14 consecutive global indices. The layout is
csrc/pass.h's and Triton's too. A table is built once and found again while the addresses stay the same.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 14
COLUMNS = 10
SRC, DST, PROBE = 5, 6, 9  # columns with addresses
MAX_CHUNKS = (1 << 31) - 1  # blocks of a CUDA grid
_CACHED_BYTES = 128 << 20  # of device memory: a model of 13 billion parameters has 6 MB of chunks
_CACHED_TABLES = 4096


@dataclass(frozen=True)
class Table:
    """One launch: `numel` elements of `dtype` with states of `state_dtype`, described by device tensors."""

    dtype: torch.dtype
    state_dtype: torch.dtype
    tensors: Tensor
    chunks: Tensor
    numel: int
    groups: int
    _streams: dict[int, torch.cuda.Stream] = field(default_factory=dict, repr=False, compare=False)

    @functools.cached_property
    def place(self) -> tuple[int, int, int]:
        """Addresses of its rows and its chunks, and the number of these."""
        return self.tensors.data_ptr(), self.chunks.data_ptr(), self.chunks.shape[0]

    @property
    def nbytes(self) -> int:
        return self.tensors.nbytes + self.chunks.nbytes

    def read_on(self, stream: torch.cuda.Stream) -> None:
        """Takes note of a stream that a launch reads the table on."""
        self._streams[stream.cuda_stream] = stream

    def __del__(self) -> None:
        """The memory belongs to the stream that was current when it was built, and others may still be reading it."""
        for stream in self._streams.values():
            self.tensors.record_stream(stream)
            self.chunks.record_stream(stream)


def build(
    src: Sequence[Tensor],
    dst: Sequence[Tensor],
    ids: Sequence[int],
    offsets: Sequence[int],
    groups: Sequence[int],
    states: Sequence[Sequence[Tensor]] = (),
    probes: Sequence[Tensor | None] = (),
) -> Table:
    """The table of tensors that share a dtype and a device. 80 bytes a tensor and 8 a chunk, uploaded once."""
    spans = [(offset // CHUNK, -(-(offset + s.numel()) // CHUNK)) for s, offset in zip(src, offsets, strict=True)]
    wanted = sum(last - first for first, last in spans)
    if wanted > MAX_CHUNKS:
        raise ValueError(
            f"the tensors have {wanted} chunks of {CHUNK} elements, and one launch takes {MAX_CHUNKS}: "
            "give them in several calls"
        )
    rows = np.zeros((len(src), COLUMNS), np.int64)
    parts: list[np.ndarray[tuple[int, int], np.dtype[np.int32]]] = []
    for i, (s, d, tensor_id, offset, group) in enumerate(zip(src, dst, ids, offsets, groups, strict=True)):
        # Blocks start at global indices divisible by 8: 16-byte accesses need those to lie on 16-byte boundaries.
        kept = [state[i] for state in states]
        probe = probes[i] if probes else None
        touched = (s, d, *kept) if probe is None else (s, d, *kept, probe)
        aligned = all((t.data_ptr() - offset % 8 * t.element_size()) % 16 == 0 for t in touched)
        addresses = [t.data_ptr() for t in (s, d, *kept)]
        rows[i, : 5 + len(addresses)] = (s.numel(), offset, tensor_id, group, aligned, *addresses)
        rows[i, PROBE] = 0 if probe is None else probe.data_ptr()
        first, last = spans[i]
        part = np.empty((last - first, 2), np.int32)
        part[:, 0] = i
        part[:, 1] = np.arange(first, last)
        parts.append(part)
    device = src[0].device
    return Table(
        dtype=src[0].dtype,
        state_dtype=states[0][0].dtype if states else torch.float32,
        tensors=upload(torch.from_numpy(rows), device),
        chunks=upload(torch.from_numpy(np.concatenate(parts)), device),
        numel=int(rows[:, 0].sum()),
        groups=max(groups) + 1,
    )


def upload(t: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`, without waiting for the device."""
    if device.type == "cpu" or t.device == device:
        return t
    if t.device.type != "cpu":
        return t.to(device)
    return t.pin_memory().to(device, non_blocking=True)


_cache: OrderedDict[object, list[Table]] = OrderedDict()
_held = [0]  # bytes in _cache


def _layout(tensors: Sequence[Tensor | None]) -> tuple[object, ...]:
    """What a table depends on, and what its check has looked at."""
    return tuple([None if t is None else (t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors])


def tables(
    src: Sequence[Tensor],
    dst: Sequence[Tensor],
    ids: Sequence[int],
    offsets: Sequence[int],
    groups: Sequence[int],
    check: Callable[[], None] | None = None,
    states: Sequence[Sequence[Tensor]] = (),
    probes: Sequence[Tensor | None] = (),
) -> tuple[list[Table], bool]:
    """One table for each dtype, and whether they had to be built. `check` may refuse tensors not seen before.

    states: of the rule, each a list with one tensor for each of src; all of one dtype. probes: where a forked chain's last
    stage goes, for each of src, None where it is left out.
    """
    key = (
        src[0].device,
        _layout(src),
        None if dst is src else _layout(dst),
        tuple(ids),
        tuple(offsets),
        tuple(groups),
        tuple(map(_layout, states)),
        _layout(probes),
    )
    found = _cache.get(key)
    if found is not None:
        _cache.move_to_end(key)
        return found, False
    if check is not None:
        check()
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i, s in enumerate(src):
        by_dtype.setdefault(s.dtype, []).append(i)
    built = [
        build(
            [src[i] for i in at],
            [dst[i] for i in at],
            [ids[i] for i in at],
            [offsets[i] for i in at],
            [groups[i] for i in at],
            [[state[i] for i in at] for state in states],
            [probes[i] for i in at] if probes else (),
        )
        for at in by_dtype.values()
    ]
    _cache[key] = built
    _held[0] += sum(table.nbytes for table in built)
    while len(_cache) > 1 and (_held[0] > _CACHED_BYTES or len(_cache) > _CACHED_TABLES):
        _, oldest = _cache.popitem(last=False)
        _held[0] -= sum(table.nbytes for table in oldest)
    return built, True


def cached() -> list[list[Table]]:
    """All tables that are there now, for who must keep them: a captured graph reads them long after."""
    return list(_cache.values())
