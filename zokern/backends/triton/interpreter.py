"""Exact arithmetic for Triton's interpreter (TRITON_INTERPRET=1), for as long as a kernel runs.

The noise contract needs a fused multiply-add and a conversion to bfloat16 that rounds to nearest even. Depending on its
version, the interpreter multiplies and adds with two roundings, and converts to bfloat16 wrongly on ties and carries.
Triton 3.6's cannot make a tensor the bound of a loop where NumPy is 2.4 or later. `exact_arithmetic` puts these right
inside a `with` block, leaves out two searches and two kinds of repeated work that take most of its time, and restores the
interpreter afterwards.
Source: Boldo and Melquiond 2008 (rounding to odd makes a second rounding harmless); Knuth's TwoSum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import triton.language as tl

Array = npt.NDArray[Any]


def fma(a: Array, b: Array, c: Array) -> Array:
    """float32 a*b + c with one rounding, for all inputs.

    The product is exact in float64. Its sum with c is rounded to odd there, so that the rounding to float32 sees on
    which side of a tie, or of a float32, the exact sum lies. 53 bits are enough for it: more than 24 + 2.
    """
    with np.errstate(all="ignore"):
        p: Array = a.astype(np.float64) * b.astype(np.float64)
        c = c.astype(np.float64)
        s = p + c
        cc = s - p
        error = (p - (s - cc)) + (c - cc)  # s + error is the exact sum
        even = (s.view(np.int64) & 1) == 0
        inexact = np.isfinite(s) & (error != 0) & even
        step = np.where((error > 0) == (s > 0), 1, -1)  # away from zero is one up in the bit pattern
        rounded: Array = np.where(inexact, (s.view(np.int64) + step).view(np.float64), s).astype(np.float32)
        return rounded


def to_bfloat16(x: Array) -> Array:
    """float32 to bfloat16 bits (uint16), nearest even; a NaN becomes the quiet NaN 0x7fc0."""
    bits = x.view(np.uint32)
    even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded: Array = np.where(np.isnan(x), np.uint32(0x7FC0), (bits + even) >> np.uint32(16)).astype(np.uint16)
    return rounded


def index(tensor: Any) -> int:
    """Of a tensor with one element, as range() asks for it: the interpreter keeps a scalar as an array of one dimension,
    which NumPy 2.4 no longer takes for a number."""
    return int(tensor.handle.data.item())


def once(patch: Callable[..., Any]) -> Callable[..., Any]:
    """Of the interpreter's patch of triton.language, which it makes anew at each call of a function inside a kernel, by a
    search through all modules that the function's own file imports: once for each file, until the launch's is undone."""
    made: dict[int, Any] = {}

    class Scope:
        def __init__(self, scope: Any) -> None:
            self.scope = scope

        def restore(self) -> None:
            made.clear()
            self.scope.restore()

    def patch_lang(fn: Any) -> Any:
        file = id(fn.__globals__)
        if file not in made:
            made[file] = Scope(patch(fn))
        return made[file]

    return patch_lang


def by_name(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Of the interpreter's table of NumPy's types, which it writes down at each look into it: each element's once."""
    known: dict[str, Any] = {}

    def numpy_type(dtype: Any) -> Any:
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        found = known.get(element.name)
        if found is None:
            found = known[element.name] = convert(dtype)
        return found

    return numpy_type


def types_once(init: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
    """Of block types, of which each operation makes several: what follows from elements and shape is worked out once."""
    known: dict[tuple[object, ...], dict[str, Any]] = {}

    def __init__(self: Any, element_ty: Any, shape: Any) -> None:
        if type(element_ty) is not tl.dtype:  # a pointer, whose name does not say all
            init(self, element_ty, shape)
            return
        key = (element_ty.name, *[getattr(size, "value", size) for size in shape])
        if key not in known:
            init(self, element_ty, shape)
            known[key] = vars(self).copy()
        vars(self).update(known[key])

    return __init__


def tensors_once(init: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
    """Of tensors likewise: what follows from the type."""
    known: dict[str, dict[str, Any]] = {}

    def __init__(self: Any, handle: Any, type: Any) -> None:
        if type.name not in known:
            init(self, handle, type)
            known[type.name] = vars(self).copy()
        vars(self).update(known[type.name])
        self.handle, self.type, self.dtype = handle, type, type.scalar

    return __init__


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Inside, the interpreter's fma and its conversions between float32 and bfloat16 are those of a GPU, and a tensor of
    one integer is an integer."""
    from triton.runtime import interpreter
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    original_patch = interpreter._patch_lang_tensor
    original_fma, original_cast = interpreter_builder.create_fma, interpreter_builder.cast_impl
    original_options = interpreter_builder.options
    original_lang, original_type = interpreter._patch_lang, interpreter._get_np_dtype
    original_block, original_tensor = tl.block_type.__init__, tl.tensor.__init__

    def create_fma(x: Any, y: Any, z: Any) -> Any:
        if z.data.dtype != np.float32:
            return original_fma(x, y, z)
        return TensorHandle(fma(x.data, y.data, z.data), z.dtype.scalar)

    def cast_impl(source: Any, dtype: Any) -> Any:
        types = source.dtype.scalar, dtype.scalar
        if types == (tl.float32, tl.bfloat16):
            return TensorHandle(to_bfloat16(source.data), tl.bfloat16)
        if types == (tl.bfloat16, tl.float32):
            return TensorHandle((source.data.astype(np.uint32) << np.uint32(16)).view(np.float32), tl.float32)
        return original_cast(source, dtype)

    def patch_lang_tensor(tensor: Any, *scope: Any) -> None:
        original_patch(tensor, *scope)  # at each launch, and undone by the scope behind it
        tensor.__index__ = index

    # Attributes of the instance hide the class's methods, and deleting them brings the methods back. The contract's
    # integers wrap around, so the interpreter need not look for overflows, which would double its work.
    interpreter_builder.create_fma, interpreter_builder.cast_impl = create_fma, cast_impl
    interpreter_builder.options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)
    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter._patch_lang, interpreter._get_np_dtype = once(original_lang), by_name(original_type)
    tl.block_type.__init__, tl.tensor.__init__ = types_once(original_block), tensors_once(original_tensor)
    try:
        with np.errstate(all="ignore"):  # overflow to infinity and wrapping integers are meant
            yield
    finally:
        del interpreter_builder.create_fma, interpreter_builder.cast_impl
        interpreter_builder.options = original_options
        interpreter._patch_lang_tensor = original_patch
        interpreter._patch_lang, interpreter._get_np_dtype = original_lang, original_type
        tl.block_type.__init__, tl.tensor.__init__ = original_block, original_tensor
