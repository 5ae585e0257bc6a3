"""Multiplication and fused multiply-add of float32 tensors, two elements an instruction on GPUs that have it (sm_100).

Each half of a packed operation is one correctly rounded float32 operation, so the bits are those of `tl.fma` and `*`.
LLVM pairs some of them by itself; here all of a thread's elements go in pairs through a line of PTX. PACKED is decided at
the launch: other targets, and Triton's interpreter, take the plain form. There is no packed addition, because ptxas
before CUDA 13.1 contracts it with a product.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

_OPEN = "{\n.reg .b64 a, b, c;\nmov.b64 a, {$2, $3};\nmov.b64 b, {$4, $5};\n"
_FMA = tl.constexpr(_OPEN + "mov.b64 c, {$6, $7};\nfma.rn.f32x2 a, a, b, c;\nmov.b64 {$0, $1}, a;\n}")
_MUL = tl.constexpr(_OPEN + "mul.rn.f32x2 a, a, b;\nmov.b64 {$0, $1}, a;\n}")


@triton.jit
def apart(x):
    """The even columns of [BLOCK, 8] and the odd ones: of a direction cosines and sines. No number moves, as a thread has
    all eight."""
    return tl.split(tl.reshape(x, [x.shape[0], 4, 2]))


@triton.jit
def together(even, odd):
    return tl.reshape(tl.join(even, odd), [even.shape[0], 8])


@triton.jit
def fma(a, b, c, PACKED: tl.constexpr):
    """a*b + c with one rounding; a is a tensor, b and c tensors or scalars."""
    if PACKED:
        x = tl.inline_asm_elementwise(_FMA, "=r,=r,r,r,r,r,r,r", [a, b, c], dtype=tl.float32, is_pure=True, pack=2)
    else:
        x = tl.fma(a, b, c)
    return x


@triton.jit
def mul(a, b, PACKED: tl.constexpr):
    """a*b; a is a tensor, b a tensor or a scalar."""
    if PACKED:
        x = tl.inline_asm_elementwise(_MUL, "=r,=r,r,r,r,r", [a, b], dtype=tl.float32, is_pure=True, pack=2)
    else:
        x = a * b
    return x
