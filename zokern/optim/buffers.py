"""Buffers that forwards change, as a BatchNorm's running statistics, are put back after each probe.

A probe's forward sees perturbed weights, and what it leaves in a buffer is of those; in a skipped step it may be NaN. So
a step leaves all buffers as they were. Who wants running statistics to follow runs a forward between steps, whose weights
are clean:

    with torch.no_grad(): model(batch)      # in training mode

Which buffers change is seen by their versions, which torch counts; but not where batch_norm writes running statistics or
something writes through `.data`. So in the first step, and in the first after a module changed its mode, all that could
change are copied, and compared after the first forward, which waits for the device; from then on those are copied that
were seen changing. Running statistics of normalisation layers in training mode are taken to change, and so are all buffers
of a module of which one does. Floating-point buffers of a state_dict could, and others of up to 65,536 elements, as counts;
quantised weights, bits, and buffers that are not saved, as caches are, never. A buffer that the forward has given other
memory or another shape gets its own back, and what it had in between is not written to: it may be the user's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SMALL = 1 << 16  # elements; tables of other types that have more are weights
OTHERS = frozenset(
    getattr(torch, name) for name in (
        "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "complex32", "complex64",
        "complex128", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
    ) if hasattr(torch, name)
)  # fmt: skip


def candidates(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Those that could change: owner and name, each tensor once."""
    found, seen = [], set()
    for owner in module.modules():
        for name, t in owner._buffers.items():
            if t is None or name in owner._non_persistent_buffers_set or id(t) in seen or type(t) is not Tensor:
                continue
            if t.is_inference() or t.device.type == "meta" or t.layout != torch.strided or t.is_quantized:
                continue
            if t.dtype in DTYPES or (t.dtype in OTHERS and t.numel() <= SMALL):
                seen.add(id(t))
                found.append((owner, name))
    return found


def entry(owner: nn.Module, name: str) -> Tensor | None:
    """A ScriptModule's `_buffers` is no dict."""
    own = owner._buffers
    return own.get(name) if isinstance(own, dict) else own[name] if name in own else None  # noqa: SIM401


def _lie(tensors: list[Tensor]) -> list[object]:
    return [*map(Tensor.data_ptr, tensors), *(t.shape for t in tensors)]


class Buffers:
    """moving: numbers of those that were seen changing, None while that is not known. copies: of what they were."""

    def __init__(self, module: nn.Module) -> None:
        self.places = candidates(module)
        self.tensors: list[Tensor] = []
        self.moving: list[int] | None = None
        self.copies: dict[int, Tensor] = {}
        self._homes: list[Tensor] = []  # the same memory, under the same shape
        self._lie: list[object] = []  # where, and with which shapes
        self._unseen: set[int] = set()  # written past the versions
        self._compared = False
        self._modes: list[bool] = []
        self._versions: list[int] = []
        self._seen: set[int] = set()

    def begin(self) -> None:
        """A step starts: takes copies."""
        if not self.places:
            return
        now = [entry(owner, name) for owner, name in self.places]
        modes = [owner.training for owner, _ in self.places]
        if modes != self._modes or list(map(id, now)) != list(map(id, self.tensors)):
            self.places = [place for place, t in zip(self.places, now, strict=True) if t is not None]
            self.tensors = [t for t in now if t is not None]
            self._modes = [owner.training for owner, _ in self.places]
            self.moving, self.copies, self._compared = None, {}, False
            self._unseen = {
                i for i, (owner, name) in enumerate(self.places)
                if isinstance(owner, nn.modules.batchnorm._NormBase) and owner.training and name.startswith("running_")
            }  # fmt: skip
        lie = _lie(self.tensors)
        if lie != self._lie:
            self._homes, self._lie = [t.detach() for t in self.tensors], lie
        wanted = range(len(self.tensors)) if self.moving is None else self.moving
        if wanted:
            for i in wanted:
                if i not in self.copies or self.copies[i].shape != self.tensors[i].shape:
                    self.copies[i] = torch.empty_like(self.tensors[i])
            torch._foreach_copy_([self.copies[i] for i in wanted], [self.tensors[i] for i in wanted])
        self._versions = [t._version for t in self.tensors]
        self._seen = set()

    def put_back(self) -> None:
        """A probe has ended."""
        for (owner, name), t in zip(self.places, self.tensors, strict=True):
            if entry(owner, name) is not t:  # the forward has put another one there
                owner._buffers[name] = t
        if _lie(self.tensors) != self._lie:
            for t, home in zip(self.tensors, self._homes, strict=True):
                if t.data_ptr() != home.data_ptr() or t.shape != home.shape:
                    t.data = home
        versions = [t._version for t in self.tensors]
        if not self._compared:
            self._compare(versions)
        if versions == self._versions and not self._unseen:
            return
        changed = {i for i, (old, new) in enumerate(zip(self._versions, versions, strict=True)) if old != new}
        owners = {id(self.places[i][0]) for i in changed}
        changed |= self._unseen | {i for i, (owner, _) in enumerate(self.places) if id(owner) in owners}
        self._seen |= changed
        known = sorted(changed & self.copies.keys())
        if known:
            torch._foreach_copy_([self.tensors[i] for i in known], [self.copies[i] for i in known])
        self._versions = [t._version for t in self.tensors]

    def _compare(self, versions: list[int]) -> None:
        """After the first forward: what has other values and the old version was written past the versions."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        self._compared = True
        same = [i for i in self.copies if versions[i] == self._versions[i] and i not in self._unseen]
        by_device: dict[torch.device, list[int]] = {}
        for i in same:
            by_device.setdefault(self.tensors[i].device, []).append(i)
        for own in by_device.values():
            differ = torch.stack([(self.tensors[i] != self.copies[i]).any() for i in own]).tolist()
            self._unseen |= {i for i, one in zip(own, differ, strict=True) if one}

    def end(self, done: bool) -> None:
        """The step has: from now on, what was seen changing is what is copied. done: all of its forwards have run."""
        if done and (self.moving is None or self._seen.difference(self.moving)):
            self.moving = sorted(self._seen.union(self.moving or ()))
            self.copies = {i: copy for i, copy in self.copies.items() if i in self.moving}

    def memory(self) -> list[Tensor]:
        """The copies that it keeps between steps."""
        return list(self.copies.values())
