"""The chunk table: all tensors of a pass, one dtype on one device, as one kernel launch sees them.

`tensors` is int64 [T, COLUMNS]: numel, offset, tensor id, group, aligned, addresses of src, dst, two states and a probe.
`chunks` is int32 [C, 2]: row of `tensors`, number of a chunk of 2^14 consecutive global indices. The layout is
csrc/pass.h's and Triton's too. A table is built once and found again while the addresses stay the same. Where directions
are of low rank, matrices have a table of their own, which says where their factors are (factors.py).

A shard of a matrix along its last dimension has a row of `tensors` for each of its own rows, whose elements follow each
other in memory and in global indices; the stride from one to the next is in their offsets. So kernels know nothing of
strides, and take no instruction and no register for them.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from zokern.contract.streams import matrices
from zokern.passes import factors as factor_tables
from zokern.passes.factors import FactorTable

CHUNK = 1 << 14
COLUMNS = 10
NUMEL, OFFSET, ALIGNED, SRC, DST, PROBE = 0, 1, 4, 5, 6, 9  # from SRC on, addresses
MAX_CHUNKS = (1 << 31) - 1  # blocks of a CUDA grid
_CACHED_BYTES = 128 << 20  # of device memory: a model of 13 billion parameters has 6 MB of chunks
_CACHED_TABLES = 4096
Ints = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True)
class Gated:
    """What a table says where all blocks are open, and whose each row and chunk is: rows int64 [T, 2], numel and offset;
    numbers int32 [C]; of_row int64 [T] and of_chunk int64 [C], places among the gates."""

    rows: Tensor
    numbers: Tensor
    of_row: Tensor
    of_chunk: Tensor

    def kept(self) -> tuple[Tensor, ...]:
        return self.rows, self.numbers, self.of_row, self.of_chunk


@dataclass(frozen=True)
class Table:
    """One launch: `numel` elements of `dtype` with states of `state_dtype`, described by device tensors."""

    dtype: torch.dtype
    state_dtype: torch.dtype
    tensors: Tensor
    chunks: Tensor
    numel: int
    groups: int
    factors: FactorTable | None = None  # of directions of low rank
    gated: Gated | None = None
    _streams: dict[int, torch.cuda.Stream] = field(default_factory=dict, repr=False, compare=False)

    @functools.cached_property
    def place(self) -> tuple[int, int, int]:
        """Addresses of its rows and its chunks, and the number of these."""
        return self.tensors.data_ptr(), self.chunks.data_ptr(), self.chunks.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self._kept())

    def _kept(self) -> tuple[Tensor, ...]:
        more = [part.kept() for part in (self.factors, self.gated) if part is not None]
        return (self.tensors, self.chunks, *(t for each in more for t in each))

    def open(self, gates: Tensor) -> None:
        """Leaves out the blocks whose gate is 0, on the device, until it is called again: their rows have no elements and
        their chunks are the first ones of these, so that a kernel has nothing to read. (A chunk beyond the end of a tensor
        would not do: a GPU's kernel counts elements from the chunk's beginning, without a sign.)"""
        if self.gated is not None:
            rows, numbers, of_row, of_chunk = self.gated.kept()
            self.tensors[:, NUMEL : OFFSET + 1].copy_(rows * gates.index_select(0, of_row)[:, None])
            self.chunks[:, 1].copy_(numbers * gates.index_select(0, of_chunk))

    def read_on(self, stream: torch.cuda.Stream) -> None:
        """Takes note of a stream that a launch reads the table on."""
        self._streams[stream.cuda_stream] = stream

    def __del__(self) -> None:
        """The memory belongs to the stream that was current when it was built, and others may still be reading it."""
        for stream in self._streams.values():
            for t in self._kept():
                t.record_stream(stream)


def build(
    src: Sequence[Tensor],
    dst: Sequence[Tensor],
    ids: Sequence[int],
    offsets: Sequence[int],
    groups: Sequence[int],
    states: Sequence[Sequence[Tensor]] = (),
    probes: Sequence[Tensor | None] = (),
    strides: Sequence[int] = (),
    stacks: Sequence[factor_tables.Stack] = (),
    rank: int = 0,
    blocks: Sequence[int] = (),
) -> Table:
    """The table of tensors that share a dtype and a device; stacks: of matrices, where directions are of that rank; blocks:
    places among the gates, where there are some. 80 bytes a tensor (a row of one with a stride) and 8 a chunk, uploaded
    once."""
    rows: Ints = np.zeros((len(src), COLUMNS), np.int64)
    for i, (s, d, tensor_id, offset, group) in enumerate(zip(src, dst, ids, offsets, groups, strict=True)):
        addresses = [t.data_ptr() for t in (s, d, *(state[i] for state in states))]
        rows[i, : SRC + len(addresses)] = (s.numel(), offset, tensor_id, group, False, *addresses)
        if probes and (probe := probes[i]) is not None:
            rows[i, PROBE] = probe.data_ptr()
    state_dtype = states[0][0].dtype if states else torch.float32
    sizes = np.full(COLUMNS - SRC, state_dtype.itemsize)
    sizes[[0, DST - SRC, PROBE - SRC]] = src[0].element_size()
    tensor_of: Ints = np.arange(len(src))
    if any(strides):
        lengths = [s.shape[-1] if stride else 0 for s, stride in zip(src, strides, strict=True)]
        rows, tensor_of = _local_rows(rows, sizes, lengths, strides)
    # Blocks start at global indices divisible by 8: 16-byte accesses need those to lie on 16-byte boundaries.
    off = (rows[:, SRC:] - rows[:, OFFSET, None] % 8 * sizes) % 16
    rows[:, ALIGNED] = ((off == 0) | (rows[:, SRC:] == 0)).all(1)
    chunks, device = _chunks(rows), src[0].device
    factors = None
    if stacks:
        own = np.bincount(tensor_of[chunks[:, 0]], minlength=len(src))
        factors = factor_tables.build(stacks, ids, rank, tensor_of, own, CHUNK, lambda t: upload(t, device))
    on_device = upload(torch.from_numpy(rows), device), upload(torch.from_numpy(chunks), device)
    gated = None
    if blocks:
        of_row: Ints = np.array(blocks, np.int64)[tensor_of]
        places = (upload(torch.from_numpy(of), device) for of in (of_row, of_row[chunks[:, 0]]))
        gated = Gated(on_device[0][:, NUMEL : OFFSET + 1].clone(), on_device[1][:, 1].clone(), *places)
    return Table(
        dtype=src[0].dtype,
        state_dtype=state_dtype,
        tensors=on_device[0],
        chunks=on_device[1],
        numel=int(rows[:, NUMEL].sum()),
        groups=max(groups) + 1,
        factors=factors,
        gated=gated,
    )


def _local_rows(rows: Ints, sizes: Ints, lengths: Sequence[int], strides: Sequence[int]) -> tuple[Ints, Ints]:
    """A row of the table for each local row of the tensors that have a stride, and whose each is. sizes: bytes of an
    element, by address."""
    length, stride = np.array(lengths, np.int64), np.array(strides, np.int64)
    # Rows whose indices follow each other, as they do in memory, are one.
    whole = (stride == 0) | (stride == length)
    length[whole] = rows[whole, NUMEL]
    counts = np.where(whole, 1, rows[:, NUMEL] // np.maximum(length, 1))
    tensor, local = np.repeat(np.arange(len(rows)), counts), _counted(counts)
    length = length[tensor]
    rows = rows[tensor]
    rows[:, NUMEL] = length
    rows[:, OFFSET] += local * stride[tensor]
    rows[:, SRC:] += np.where(rows[:, SRC:] == 0, 0, (local * length)[:, None] * sizes)
    return rows, tensor


def _chunks(rows: Ints) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    """The chunks that each row of the table touches, in turn."""
    first = rows[:, OFFSET] // CHUNK
    touched = -(-(rows[:, OFFSET] + rows[:, NUMEL]) // CHUNK) - first
    wanted = int(touched.sum())
    if wanted > MAX_CHUNKS:
        raise ValueError(
            f"the tensors have {wanted} chunks of {CHUNK} elements, and one launch takes {MAX_CHUNKS}: "
            "give them in several calls"
        )
    chunks = np.empty((wanted, 2), np.int32)
    chunks[:, 0] = np.repeat(np.arange(len(rows)), touched)
    chunks[:, 1] = np.repeat(first, touched) + _counted(touched)
    return chunks


def _counted(counts: Ints) -> Ints:
    """0, 1, ... up to each of the counts, one after another."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


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
    strides: Sequence[int] = (),
    shapes: Sequence[Sequence[int]] = (),
    rank: int = 0,
    gates: Tensor | None = None,
    blocks: Sequence[int] = (),
) -> tuple[list[Table], bool]:
    """One table for each dtype, or two with directions of low rank (rank > 0), of matrices and of others; and whether they
    had to be built. `check` may refuse tensors not seen before.

    states: of the rule, each a list with one tensor for each of src; all of one dtype. probes: where a forked chain's last
    stage goes, for each of src, None where it is left out. strides: for each of src, global distance between the starts of
    neighbouring local rows, its last dimension; 0, or no strides, where it is one row. shapes: of the whole tensors, where
    src are shards; none where they are whole. gates, blocks: see operands.py; such tables are of these gates alone.
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
        tuple(strides) if any(strides) else (),
        (rank, tuple(map(tuple, shapes))) if rank else (),
        () if gates is None else (gates.data_ptr(), *blocks),
    )
    found = _cache.get(key)
    if found is not None:
        _cache.move_to_end(key)
        return found, False
    if check is not None:
        check()
    stacks = [matrices(shape, rank) for shape in (shapes or [s.shape for s in src])] if rank else [None] * len(src)
    together: dict[tuple[torch.dtype, bool], list[int]] = {}
    for i, (s, stack) in enumerate(zip(src, stacks, strict=True)):
        together.setdefault((s.dtype, stack is not None), []).append(i)
    built = [
        build(
            [src[i] for i in at],
            [dst[i] for i in at],
            [ids[i] for i in at],
            [offsets[i] for i in at],
            [groups[i] for i in at],
            [[state[i] for i in at] for state in states],
            [probes[i] for i in at] if probes else (),
            [strides[i] for i in at] if strides else (),
            [stack for i in at if (stack := stacks[i]) is not None],
            rank,
            [blocks[i] for i in at] if gates is not None else (),
        )
        for at in together.values()
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
