"""Which tensors are looked at, and why the others are not trained."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from zokern.checking import adapters
from zokern.checking.result import NOT_TRAINED, Finding, Row
from zokern.deltas import NAME, Delta
from zokern.optim import ZerothOrderOptimizer

SMALL = {torch.int8, torch.uint8, torch.qint8, torch.quint8, torch.quint4x2} | {
    getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn_x2") if hasattr(torch, name)
}


@dataclass(frozen=True)
class Tried:
    """A trainable tensor: its id decides its noise. owners: the modules that hold it, with their names."""

    tensor: Tensor
    tensor_id: int
    eps: float
    names: tuple[str, ...]
    owners: tuple[tuple[str, nn.Module], ...] = ()


@dataclass
class Subject:
    """The trainable tensors of an optimizer in the model's order, the rows of what is not trained, and what that means."""

    optimizer: ZerothOrderOptimizer
    tried: list[Tried] = field(default_factory=list)
    untrained: list[Row] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def __post_init__(self) -> None:
        optimizer, module = self.optimizer, self.optimizer.module
        places = _places(module)
        registry = optimizer._parameters.registry
        for g, p in optimizer._parameters.trainable(optimizer):
            held = places.get(id(p), [])
            names = tuple(name for name, _, _ in held) or (registry.names[id(p)],)
            owners = tuple((path, owner) for _, path, owner in held)
            eps = float(optimizer.param_groups[g]["eps"])
            self.tried.append(Tried(p, registry.ids[id(p)], eps, names, owners))
        order = {p: i for i, p in enumerate(places)}
        self.tried.sort(key=lambda one: order.get(id(one.tensor), len(order)))
        self.untrained = [*self._parameters(places), *self._of_groups(places), *_buffers(module)]
        self._judge(places)

    def _parameters(self, places: dict[int, list[tuple[str, str, nn.Module]]]) -> Iterator[Row]:
        """Of the module."""
        tried = {id(one.tensor) for one in self.tried}
        given = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for key, held in places.items():
            if key not in tried:
                param = getattr(held[0][2], held[0][0].rpartition(".")[2])
                names = [name for name, _, _ in held]
                why, suspicious = _why_untrained(param, key in given)
                idle = adapters.idle(names, self.optimizer.module) if key in given else ""
                yield _row(names, param, f"{why}; {idle}" if idle else why, suspicious)

    def _of_groups(self, places: dict[int, list[tuple[str, str, nn.Module]]]) -> Iterator[Row]:
        """Of an optimizer that has no module."""
        tried = {id(one.tensor) for one in self.tried}
        for own, group in zip(
            self.optimizer._parameters.names(self.optimizer), self.optimizer.param_groups, strict=True
        ):
            for name, p in zip(own, group["params"], strict=True):
                if id(p) not in tried and id(p) not in places:
                    yield _row([name], p, *_why_untrained(p, True))

    def _judge(self, places: dict[int, list[tuple[str, str, nn.Module]]]) -> None:
        say = self.findings.append
        if not self.tried:
            say(Finding("training", "no tensor is trained: none in the optimizer has requires_grad=True", True))
        if self.optimizer.module is not None:
            gone = [one.names[0] for one in self.tried if id(one.tensor) not in places]
            if gone:
                text = f"the model no longer has {listed(gone)}; make a new optimizer after changing the model"
                say(Finding("training", text, True))
        beside = {name.removesuffix(NAME) for one in self.tried if isinstance(one.tensor, Delta) for name in one.names}
        packed = [row.name for row in self.untrained if row.why.startswith(PACKED)]
        packed = [name for name in packed if name[: name.rfind(".") + 1] not in beside]
        plain = [row for row in self.untrained if row.why == FROZEN]
        bases = [name for name in packed if "base_layer" in name.split(".")]
        if self.tried and len(packed) > len(bases) and not plain:
            text = (
                f"{listed(packed)} cannot be trained, because the weights are quantised or packed, while everything else "
                "is; make the optimizer before the model is quantised, freeze what is not meant to be trained, or call "
                "zokern.add_deltas(model), which trains beside them"
            )
            say(Finding("training", text, True))
        for a, b in _overlapping(self.tried):
            say(Finding("training", f"{a} and {b} share memory; a step refuses them: pass each tensor once", True))


FROZEN = "requires_grad is False"
PACKED = "quantised or packed"


def _row(names: list[str], t: Tensor, why: str, suspicious: bool = False) -> Row:
    return Row(tuple(names), tuple(t.shape), t.dtype, NOT_TRAINED, suspicious=suspicious, why=why)


def _why_untrained(p: Tensor, given: bool) -> tuple[str, bool]:
    """given: the optimizer has it."""
    if p.numel() == 0 and not is_packed(p):
        return "it has no elements", False
    if p.requires_grad:
        return "it is not in the optimizer, which was made before it was added or unfrozen; make a new one", True
    if is_packed(p):
        return f"{PACKED} ({_kind(p)})", False
    if not p.is_floating_point():
        return f"{p.dtype} cannot be trained", False
    if given:
        return "it is in the optimizer, and its requires_grad is False: frozen since, or never set", True
    return FROZEN, False


def is_packed(t: Tensor) -> bool:
    """Quantised, or in a layout of some library's: nothing can be added to it in place."""
    own = type(t) not in (Tensor, nn.Parameter, nn.Buffer)
    subclass = own and torch.utils._python_dispatch.is_traceable_wrapper_subclass(t)
    return subclass or t.dtype in SMALL or t.layout != torch.strided or t.is_quantized


def _kind(t: Tensor) -> str:
    if type(t) not in (Tensor, nn.Parameter, nn.Buffer):
        return type(t).__name__
    return str(t.layout if t.layout != torch.strided else t.dtype).removeprefix("torch.")


def like_a_weight(name: str, buffer: Tensor) -> bool:
    """Whether a buffer holds what other layers have as a parameter."""
    lower = name.lower()
    if "weight" in lower or "packed" in lower:
        return True
    return is_packed(buffer) and buffer.dim() >= 2 and "mask" not in lower and "bias" not in lower


def _places(module: nn.Module | None) -> dict[int, list[tuple[str, str, nn.Module]]]:
    """Of each parameter, by id: its full names, each with the owner's name and the owner."""
    found: dict[int, list[tuple[str, str, nn.Module]]] = {}
    for path, owner in () if module is None else module.named_modules(remove_duplicate=True):
        for name, p in owner._parameters.items():
            if p is not None:
                found.setdefault(id(p), []).append((f"{path}.{name}" if path else name, path, owner))
    return found


def _buffers(module: nn.Module | None) -> Iterator[Row]:
    """That look like weights; also the packed weights of torch's quantised layers, which are neither."""
    for path, owner in () if module is None else module.named_modules():
        prefix = f"{path}." if path else ""
        for name, buffer in owner._buffers.items():
            if buffer is not None and like_a_weight(name, buffer):
                yield _row([f"{prefix}{name}"], buffer, f"{PACKED} (a buffer, {_kind(buffer)})")
        if hasattr(owner, "_packed_params") and not isinstance(getattr(owner, "_packed_params", None), Tensor):
            weight = getattr(owner, "weight", None)
            t = weight() if callable(weight) else None
            if isinstance(t, Tensor):
                yield _row([f"{prefix}_packed_params"], t, f"{PACKED} ({type(owner).__name__})")


def _overlapping(tried: list[Tried]) -> Iterator[tuple[str, str]]:
    spans = sorted(
        (str(t.device), t.data_ptr(), t.data_ptr() + t.nbytes, one.names[0])
        for one in tried for t in (one.tensor,) if not isinstance(t, Delta)
    )  # fmt: skip
    for (place, _, end, a), (place2, begin, _, b) in itertools.pairwise(spans):
        if place == place2 and begin < end:
            yield a, b


def listed(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
