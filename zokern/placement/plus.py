"""A stand-in for a weight W that is perturbed by a matrix of low rank, of which only W and the factors are in memory.

    D W + sum_k scale[k] left[k]^T right[k],    left [K, m], right [K, n], W [m, n];   or [K, E, m], [K, E, n], [E, m, n]

A module's entry for the parameter is a `PlusLowRank` while a closure runs. Whatever is computed with it comes here first:
products and lookups (thin.py) are those with W and two thin ones; everything else gets the sum, written out. So no
use of it is unperturbed, by whatever module, and torch's compiler looks through it: factors and scales are inputs of its
graphs.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import CodeType, FunctionType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from zokern.placement.base import RefusedCall

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of weights that have stand-ins
PLAIN = (Tensor, nn.Parameter)
Handler = Callable[..., Any]  # of a torch function: returns NotImplemented where the sum is to be written out
HANDLERS: dict[Any, Handler] = {}
PARTS: set[Any] = set()  # those functions that only make other stand-ins
USED = [False]  # whether anything was computed with a stand-in since somebody has set it back
# Whether torch's compiler has ever made code that looks at stand-ins, which does not tell that it does.
TRACED = [False]
RELEASE = tuple(map(int, torch.__version__.split(".")[:2]))
LEFT_ALONE = [False]  # whether it knows what it is not to compile

_GETTERS = (
    "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "is_cuda", "is_cpu", "is_meta", "is_sparse",
    "is_sparse_csr", "is_quantized", "is_nested", "is_mkldnn", "is_mps", "is_xpu", "itemsize", "nbytes", "names", "grad",
    "grad_fn", "output_nr", "_version", "_base", "_backward_hooks", "name", "retains_grad",
)  # fmt: skip
_METHODS = (
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "is_contiguous", "element_size",
    "is_floating_point", "is_complex", "__len__", "get_device", "is_inference", "_is_view", "has_names", "dim_order",
    "is_conj", "is_neg", "_is_zerotensor", "is_shared", "is_pinned",
)  # fmt: skip
# What may be asked without looking at a value.
ABOUT = {getattr(Tensor, name).__get__ for name in _GETTERS if hasattr(Tensor, name)}
ABOUT |= {getattr(Tensor, name) for name in _METHODS if hasattr(Tensor, name)}
ABOUT |= {Tensor.grad.__set__, Tensor.requires_grad.__set__, Tensor.requires_grad_}  # type: ignore[union-attr,attr-defined]
ABOUT |= {torch.is_floating_point, torch.is_complex, torch.numel}
SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


class PlusLowRank(nn.Parameter):
    """The sum of a weight and a matrix of low rank.

    base: the weight. leaf: the same, as a leaf that requires a gradient, whose cast autocast keeps. left, right: in dtypes
    that products with `base` take. scale: float32 [K]. full: the sum, once something, `by`, has asked for it; from then on
    everything is computed with it. write: makes it. viewed: what this is a part of, whose sum is then this one's too.
    parameter: its name. decay: float32, 0-d, D; None where that is 1. traced: is told when torch's compiler looks at it.
    seen: is told when something is computed with it, or with a part of it; of code that is compiled nobody hears.
    """

    base: Tensor
    left: Tensor
    right: Tensor
    scale: Tensor
    parameter: str
    leaf: Tensor | None
    full: Tensor | None
    viewed: PlusLowRank | None
    write: Callable[[], Tensor] | None
    by: str
    decay: Tensor | None
    traced: list[bool] | None
    seen: list[bool]

    @staticmethod
    def __new__(
        cls, base: Tensor, left: Tensor, right: Tensor, scale: Tensor, name: str = "", requires_grad: bool = False
    ) -> PlusLowRank:
        made: PlusLowRank = torch.Tensor._make_wrapper_subclass(
            cls, base.shape, strides=base.stride(), dtype=base.dtype, device=base.device, requires_grad=requires_grad
        )
        made.base, made.left, made.right, made.scale, made.parameter = base, left, right, scale, name
        made.leaf = made.full = made.write = made.viewed = made.decay = made.traced = None
        made.by, made.seen = "", [False]
        return made  # without an __init__: nn.Parameter(one) would call it, with arguments of its own

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        TRACED[0] = True
        run_as_they_are()
        if self.traced is not None:
            self.traced[0] = True
        return ["base", "left", "right", "scale", *(["decay"] if self.decay is not None else [])], None

    def _stable_hash_for_caching(self) -> str:
        """For the key under which torch keeps compiled code: what it was compiled for but not whose it is."""
        shapes = [tuple(t.shape) for t in (self.base, self.left, self.right, self.scale)]
        about = self.dtype, self.left.dtype, self.device.type, shapes, self.decay is not None
        return f"{type(self).__qualname__} {about}"

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], about: None, size: Any, stride: Any) -> PlusLowRank:
        made = PlusLowRank(inner["base"], inner["left"], inner["right"], inner["scale"])
        made.decay = inner.get("decay")
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = {} if kwargs is None else kwargs
        handler = HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **named)
            if result is not NotImplemented:
                if not USED[0] and func not in PARTS and not torch.compiler.is_compiling():
                    USED[0] = True
                return result
        if func in ABOUT or _is_looked_at():
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **named)
        if func == SET_DATA:
            raise RefusedCall(
                f"the closure gave {getattr(args[0], 'parameter', 'a parameter')} other data, which placement='forward' "
                "cannot follow; do it before the step, or use placement='shadow'"
            )
        return _written_out(func, args, named)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default) and isinstance(args[0], cls):
            one = args[0]
            same = PlusLowRank(one.base, one.left, one.right, one.scale, one.parameter)
            same.decay, same.seen = one.decay, one.seen
            same.full, same.write = one.full, (None if one.write is None else lambda: full(one, func.name()))
            return same
        if torch.compiler.is_compiling():
            for value, about in zip(args, func._schema.arguments, strict=False):
                if type(value) is cls and about.alias_info is not None and about.alias_info.is_write:
                    _refuse_write(func.name())
        return _written_out(func, args, kwargs or {})

    def __deepcopy__(self, memo: Any) -> nn.Parameter:
        return nn.Parameter(full(self, "deepcopy").detach().clone(), self.requires_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(full(self, "pickle").detach(), self.requires_grad).__reduce_ex__(protocol)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"<{self.parameter}, perturbed: {tuple(self.shape)} {self.dtype}>"


OWN = frozenset(PlusLowRank.__annotations__)  # attributes


def standing_for(p: Tensor, name: str, write: Callable[[], Tensor]) -> PlusLowRank:
    """With attributes that libraries hang on parameters, and factors that are yet to come."""
    one = PlusLowRank(p.detach(), p.detach(), p.detach(), p.detach(), name, p.requires_grad)
    one.leaf, one.write = nn.Parameter(p.detach(), p.requires_grad), write
    one.__dict__.update(p.__dict__)
    return one


def _is_looked_at() -> bool:
    """Whether a compiler has stopped tracing and describes what it has found: it asks for what only it may see."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def full(one: PlusLowRank, by: str = "") -> Tensor:
    """The sum, written out: once in a closure, and by formula where torch's compiler traces. by: for what."""
    if one.full is not None:
        return one.full
    if one.write is None or torch.compiler.is_compiling():
        return _by_formula(one)
    one.full, one.by, USED[0] = made, _, _ = one.write(), by, True
    note_use(one)
    return made


def note_use(one: PlusLowRank) -> None:
    if not torch.compiler.is_compiling():
        one.seen[0] = True


def _by_formula(one: PlusLowRank) -> Tensor:
    total, scaled = kept(one, one.base.float()), one.left.float() * one.scale.reshape(-1, *[1] * (one.left.dim() - 1))
    for k in range(scaled.shape[0]):
        total = torch.addcmul(total, scaled[k].unsqueeze(-1), one.right[k].float().unsqueeze(-2))
    return total.to(one.base.dtype)


def kept(one: PlusLowRank, rows: Tensor) -> Tensor:
    """What a product with `base` takes in place of rows for one with D W."""
    note_use(one)
    return rows if one.decay is None else rows * one.decay


def _written_out(func: Any, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
    by = getattr(func, "__name__", "")
    if torch.compiler.is_compiling() and ((by.endswith("_") and not by.endswith("__")) or "out" in named):
        _refuse_write(by)
    return func(*_sums(args, by), **_sums(named, by))


def _refuse_write(by: str) -> NoReturn:
    """A graph would write to a sum that nothing else reads."""
    name = by.removeprefix("aten::")
    raise RefusedCall(f"compiled code writes to a perturbed weight ({name}); use placement='shadow' for this model")


def looked_through() -> AbstractContextManager[Any]:
    """Around a closure. Before PyTorch 2.13 its compiler does not see that stand-ins are more than their weights where it
    leaves a module uncompiled, so that the first probe would be another; there compiled code runs uncompiled."""
    run_as_they_are()
    return contextlib.nullcontext() if RELEASE >= (2, 13) else torch.compiler.set_stance("force_eager")


def run_as_they_are() -> None:
    """Tells torch's compiler, where it is there, to look through the functions of stand-ins only as parts of a model's
    code. Where it cannot compile that code it lets it run, and would compile what that calls: these functions, which then
    take the run for a trace, so that a write would go to a sum that nothing else reads."""
    if LEFT_ALONE[0] or "torch._dynamo.eval_frame" not in sys.modules:
        return
    from torch._dynamo.eval_frame import skip_code

    LEFT_ALONE[0] = True
    modules = {__name__, *(handler.__module__ for handler in HANDLERS.values())}
    for module in map(vars, map(sys.modules.get, sorted(modules))):
        for one in list(module.values()):
            parts = [
                getattr(part, "__func__", part) for part in (vars(one).values() if isinstance(one, type) else [one])
            ]
            for part in parts:
                if isinstance(part, FunctionType) and part.__module__ in modules:
                    for code in _codes(part.__code__):
                        skip_code(code)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Those of a function and of the functions inside."""
    yield code
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield from _codes(one)


def _sums(given: Any, by: str) -> Any:
    """Arguments, each stand-in among them as its sum."""
    if type(given) is PlusLowRank:
        return full(given, by)
    if isinstance(given, (list, tuple)):
        items = [_sums(item, by) for item in given]
        return type(given)(*items) if hasattr(given, "_fields") else type(given)(items)
    if isinstance(given, Mapping):
        return {name: _sums(item, by) for name, item in given.items()}
    return given


def handles(*functions: Any, parts: bool = False) -> Callable[[Handler], Handler]:
    def note(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(functions, handler))
        PARTS.update(functions if parts else ())
        return handler

    return note


def is_open(one: Any) -> bool:
    """Whether this is a stand-in whose sum nobody has asked for."""
    return type(one) is PlusLowRank and one.full is None and (one.viewed is None or is_open(one.viewed))
