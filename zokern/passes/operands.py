"""The tensors of passes on one device, checked before a backend, which sees addresses alone, gets to know them."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from zokern import _checks
from zokern.contract.streams import matrices
from zokern.passes.table import Table, tables


@dataclass(eq=False)
class Operands:
    """dst None works in place. states: of the rule, a list each. probes: where a forked chain's last stage goes, None for
    those that it leaves out. strides: where one of src is a shard of a matrix along its last dimension, global distance
    between the starts of neighbouring rows, else 0; none for zeros. rank: of the directions, 0 where their elements are
    independent. shapes: of the whole tensors, where src are shards of them; none where they are whole. gates int64, on the
    device: a pass leaves out the tensors whose gate is 0, gates[blocks[i]], and reads nothing of them.

    Who runs passes on the same operands again holds the tensors meanwhile, and makes others when anything about them
    changes: addresses take long to ask for. `written`: those that a pass changes, for autograd.
    """

    src: list[Tensor]
    dst: list[Tensor] | None
    states: Sequence[list[Tensor]]
    tensor_ids: list[int]
    offsets: list[int]
    groups: list[int]
    probes: Sequence[Tensor | None] = ()
    strides: Sequence[int] = ()
    rank: int = 0
    shapes: Sequence[Sequence[int]] = ()
    gates: Tensor | None = None
    blocks: Sequence[int] = ()
    found: tuple[str, ModuleType, list[Table]] | None = field(default=None, init=False)  # what a backend reads

    @functools.cached_property
    def device(self) -> torch.device:
        return self.src[0].device

    @functools.cached_property
    def written(self) -> list[Tensor]:
        return [t for t in self.results if not t.is_inference()]

    @property
    def results(self) -> list[Tensor]:
        return self.src if self.dst is None else self.dst

    def tables(self) -> list[Table]:
        """One for each dtype, with directions of low rank one more for matrices.

        Raises:
            TypeError, ValueError: naming the tensor that a pass cannot work on, when it is first seen.
        """
        found, _ = tables(
            self.src, self.results, self.tensor_ids, self.offsets, self.groups, self.check, self.states, self.probes,
            self.strides, self.shapes, self.rank, self.gates, self.blocks,
        )  # fmt: skip
        return found

    def kinds(self) -> set[tuple[torch.dtype, bool]]:
        """What there is a table of each: a dtype, of matrices with directions of low rank or not."""
        shapes = self.shapes or [t.shape for t in self.src]
        return {(t.dtype, matrices(s, self.rank) is not None) for t, s in zip(self.src, shapes, strict=True)}

    def check(self) -> None:
        _check_pairs(self.src, self.results, self.tensor_ids, self.offsets, self.strides)
        _check_states(self.src, self.states)
        if self.rank:
            self._check_shapes()
        given = [(t, probe) for t, probe in zip(self.src, self.probes, strict=bool(self.probes)) if probe is not None]
        if given:
            _check_pairs([t for t, _ in given], [probe for _, probe in given], [0] * len(given), [0] * len(given))

    def _check_shapes(self) -> None:
        """A direction of low rank depends on the whole tensor's shape, which a shard does not know."""
        strides = self.strides or [0] * len(self.src)
        for i, (t, offset, stride) in enumerate(zip(self.src, self.offsets, strides, strict=True)):
            what = f"tensors[{i}], which is {_checks.describe(t)}"
            if not self.shapes:
                if offset or stride:
                    raise ValueError(
                        f"{what}, is a shard, and directions of low rank depend on the whole tensor's shape: give shapes"
                    )
                continue
            whole, width = tuple(self.shapes[i]), stride or (t.shape[-1] if t.dim() else 1)
            extent = t.numel() + (t.numel() // t.shape[-1] - 1) * (stride - t.shape[-1]) if stride else t.numel()
            if offset + extent > math.prod(whole) or (t.dim() > 1 and whole[-1:] != (width,)):
                raise ValueError(
                    f"shapes[{i}] is {whole} for {what}, from index {offset} on: it is the shape of the whole tensor, with "
                    f"rows of {width} elements"
                )


def _check_memory(tensors: Sequence[Tensor], name: str) -> None:
    """A kernel would write to address 0: functionalize and the like hand out tensors without memory of their own."""
    for i, t in enumerate(tensors):
        if not t.data_ptr():
            raise ValueError(
                f"{name}[{i}] is {_checks.describe(t)} without memory; a pass needs tensors that have some"
            )


def _check_pairs(
    src: Sequence[Tensor],
    dst: Sequence[Tensor],
    ids: Sequence[int],
    offsets: Sequence[int],
    strides: Sequence[int] = (),
) -> None:
    for name, tensors in (("tensors", src), ("out", dst)) if dst is not src else (("tensors", src),):
        for i, t in enumerate(tensors):
            _checks.check_tensor(t, f"{name}[{i}]")
    for i, (s, d) in enumerate(zip(src, dst, strict=True)):
        if s.device != src[0].device:
            raise ValueError(
                f"tensors[{i}] is on {s.device} and tensors[0] on {src[0].device}; make one call per device"
            )
        if d.shape != s.shape or d.dtype != s.dtype or d.device != s.device:
            raise ValueError(f"out[{i}] is {_checks.describe(d)}, unlike tensors[{i}], which is {_checks.describe(s)}")
    for i, (s, tensor_id, offset) in enumerate(zip(src, ids, offsets, strict=True)):
        _checks.check_integer(tensor_id, f"tensor_ids[{i}]", 0, _checks.MAX_TENSOR_ID)
        extent = _check_stride(strides[i], s, i) if strides else s.numel()
        _checks.check_integer(offset, f"offsets[{i}]", 0, _checks.MAX_INDEX - extent)
    if torch.compiler.is_compiling():
        return  # addresses are not known yet; the operator looks when it runs
    _check_memory(src, "tensors")
    if dst is not src:
        _check_memory(dst, "out")
    # Two threads may take any two chunks at once, so no element may be written twice, nor read after it was written.
    written = sorted((d.data_ptr(), d.data_ptr() + d.nbytes, i) for i, d in enumerate(dst))
    for (_, end, i), (begin, _, j) in itertools.pairwise(written):
        if begin < end:
            raise ValueError(
                f"{'out' if dst is not src else 'tensors'}[{i}] and [{j}] share memory; pass each tensor once"
            )
    if dst is not src:
        spans = sorted(
            [(s.data_ptr(), s.data_ptr() + s.nbytes, i, "tensors") for i, s in enumerate(src)]
            + [(begin, end, i, "out") for begin, end, i in written]
        )
        # Which of each kind reaches furthest: what begins before its end overlaps with it, neighbours or not.
        furthest = {"tensors": (0, 0, -1), "out": (0, 0, -1)}
        for begin, end, i, what in spans:
            other = "out" if what == "tensors" else "tensors"
            begin2, end2, j = furthest[other]
            if begin < end2 and (begin, end, i) != (begin2, end2, j):
                raise ValueError(
                    f"{other}[{j}] and {what}[{i}] overlap; out must be apart from tensors, or the same memory"
                )
            if end > furthest[what][1]:
                furthest[what] = begin, end, i


def _check_stride(stride: object, t: Tensor, i: int) -> int:
    """How many global indices the tensor extends over."""
    name = f"strides[{i}]"
    apart = _checks.check_integer(stride, name, 0, _checks.MAX_INDEX)
    if apart == 0:
        return t.numel()
    what = f"tensors[{i}], which is {_checks.describe(t)}"
    if t.dim() < 2:
        raise ValueError(f"{name} is {stride} for {what}: a stride is between the rows of a matrix; 0 means none")
    length = t.shape[-1]
    rows = t.numel() // length
    extent = (rows - 1) * apart + length
    if apart < length:
        raise ValueError(
            f"{name} is {stride} for {what}: neighbouring rows start at least {length} apart, the size of a row; "
            "it is the size of a row of the whole matrix"
        )
    if extent > _checks.MAX_INDEX:
        raise ValueError(f"{name} is {stride} for {what}: its {rows} rows go beyond index {_checks.MAX_INDEX}")
    return extent


def _check_states(src: Sequence[Tensor], states: Sequence[Sequence[Tensor]]) -> None:
    for state in states:
        for s, t in zip(src, state, strict=True):
            fits = t.shape == s.shape and t.device == s.device and t.is_contiguous()
            if not fits or t.dtype != states[0][0].dtype or t.dtype not in _checks.DTYPES:
                raise ValueError(
                    f"a state is {_checks.describe(t)}, its tensor {_checks.describe(s)}: a state is contiguous, on the "
                    "same device, of the same shape, and float32, float16 or bfloat16 like the others"
                )
