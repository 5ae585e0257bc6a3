#!/usr/bin/env bash
# Triton for AMD loses the sign of a zero where it rounds a float32 product to float16, and fuses though told not to.
#
# (x * y).to(tl.float16) of two float32 is one instruction on gfx90a, gfx942 and gfx950: v_fma_mixlo_f16 x, y, 0. Adding +0
# makes +0 of -0, so -1 * 0 is stored as 0x0000 instead of 0x8000. enable_fp_fusion=False, which keeps sums and products
# apart elsewhere, does not keep this from happening; tl.fma(x, y, z).to(tl.float16) is one such instruction too.
#
# It matters to whoever needs the same bits on AMD as on NVIDIA or the CPU, and whoever keeps information in a sign of zero.
# LLVM has mended the sign (llvm-project #214544, 2026-08, seen on a gfx90a GPU: it adds -0 now), and Triton 3.9 has that. The
# two steps stay one. LLVM's authors say that it rounds twice, as the two steps do (#219723); a probe of the Sarek project
# (2026-07, opencl_f16_contraction_probe.c) counted one rounding on an RX 7900 XTX, with Mesa's compiler. What helps: an empty
# line of inline assembly between the sum and its conversion.
#
# In zokern: kernels are compiled so for AMD; the tests' interpreter of AMD's machine code refuses the instruction.
#
# Seen in Triton 3.6.0, 3.7.1 and 3.8.0; 3.9.0 adds -0 and fuses still. Needs Linux on x86-64, python3 from 3.10 to 3.14 with
# pip; no GPU, no ROCm. No GPU has run it: what is looked at is the machine code.
# Subject: PyTorch, compilers and number formats
# 2026-11-30
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export TRITON_CACHE_DIR="$work/cache"
cat > kernels.py <<'PY'
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(x, y, out):
    i = tl.arange(0, 64)
    tl.store(out + i, (tl.load(x + i) * tl.load(y + i)).to(tl.float16))


@triton.jit
def multiply_add(x, y, out):
    i = tl.arange(0, 64)
    a = tl.load(x + i)
    tl.store(out + i, tl.fma(a, tl.load(y + i), a).to(tl.float16))


@triton.jit
def apart(x, y, out):
    i = tl.arange(0, 64)
    p = tl.load(x + i) * tl.load(y + i)
    p = tl.inline_asm_elementwise("", "=v,0", [p], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(out + i, p.to(tl.float16))


for arch in ("gfx90a", "gfx942", "gfx950"):
    for kernel in (product, multiply_add, apart):
        source = ASTSource(kernel, signature={"x": "*fp32", "y": "*fp32", "out": "*fp16"}, constexprs={})
        options = {"enable_fp_fusion": False, "num_warps": 1}
        text = triton.compile(source, target=GPUTarget("hip", arch, 64), options=options).asm["amdgcn"]
        told = re.findall(r"^\t(v_(?:fma|mul|mad|cvt)\w*) (.*)", text, re.M)
        print(triton.__version__, arch, kernel.__name__, "; ".join(f"{op} {re.sub(r'v[0-9]+', 'v', a)}" for op, a in told))
PY
for version in 3.8.0 3.9.0; do
  python3 -m pip install -qq --disable-pip-version-check --no-deps --target "$version" triton=="$version"
  PYTHONPATH="$work/$version" python3 kernels.py
done | tee seen

expect() { # version, kernel, instructions
  for arch in gfx90a gfx942 gfx950; do
    grep -qxF "$1 $arch $2 $3" seen || { echo "CHANGED: $1 $arch $2, expected $3"; exit 1; }
  done
}
expect 3.8.0 product "v_fma_mixlo_f16 v, v, v, 0"
expect 3.9.0 product "v_fma_mixlo_f16 v, v, v, neg(0)"
for version in 3.8.0 3.9.0; do
  expect "$version" multiply_add "v_fma_mixlo_f16 v, v, v, v"
  expect "$version" apart "v_mul_f32_e32 v, v, v; v_cvt_f16_f32_e32 v, v"
done
echo "SEEN: 3.8.0 adds +0 to a float32 product while it rounds it to float16, 3.9.0 -0; both fuse against enable_fp_fusion=False"
