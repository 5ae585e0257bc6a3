#!/usr/bin/env bash
# Triton up to 3.6 cannot compile a function that returns None in a tuple; its interpreter runs it.
#
# A @triton.jit function may take None for an optional argument, may return None, and may return a tuple. If it returns a
# tuple with a None in it, compilation ends with "cannot convert None of type <class 'NoneType'> to tensor". In the
# interpreter (TRITON_INTERPRET=1) the same kernel gives the right numbers. From 3.7 on the compiler takes it too.
#
# It matters to whoever tests kernels without a GPU. All of a suite passes, and on a GPU the first call fails. With a newer
# Triton it passes there, too. What helps: to hand an optional value on as an argument; to compile kernels in tests, which
# needs no GPU: triton.compile with a GPUTarget.
#
# In zokern: an optional value is an argument of its own, and kernels are compiled with the oldest Triton (docs/install.md).
#
# Seen in Triton 3.4.0 and 3.6.0, and no more in 3.7.0, with torch 2.13.0 and numpy 2.3.5. Needs python3 with venv.
# Subject: PyTorch, compilers and number formats
# 2026-11-29
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -qq --disable-pip-version-check torch==2.13.0 numpy==2.3.5
PIP_TARGET=triton-3.6.0 venv/bin/pip install -qq --disable-pip-version-check --no-deps triton==3.6.0
PIP_TARGET=triton-3.7.0 venv/bin/pip install -qq --disable-pip-version-check --no-deps triton==3.7.0

cat > kernel.py <<'PYTHON'
import os
import sys

if sys.argv[1] == "interpreted":
    os.environ["TRITON_INTERPRET"] = "1"
import triton
import triton.language as tl


@triton.jit
def both(x, scale):
    return x + 1.0, scale


@triton.jit
def kernel(source, to, scale):
    at = tl.arange(0, 16)
    x, by = both(tl.load(source + at), scale)
    if by is not None:
        x = x * by
    tl.store(to + at, x)


if sys.argv[1] == "interpreted":
    import torch

    numbers, out = torch.arange(16.0), torch.zeros(16)
    kernel[(1,)](numbers, out, None)
    print("right" if torch.equal(out, numbers + 1) else "wrong")
else:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {"source": "*fp32", "to": "*fp32", "scale": "constexpr"}
    try:
        triton.compile(ASTSource(kernel, signature, {"scale": None}), target=GPUTarget("cuda", 90, 32))
        print("compiled")
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__
        print(error)
PYTHON
expect() { # version of Triton, way, what is printed
  local found
  found=$(PYTHONPATH="triton-$1" TRITON_CACHE_DIR="$work/cache-$1" venv/bin/python -W ignore kernel.py "$2" | tail -n 1)
  echo "Triton $1, $2: $found"
  [[ "$found" == *"$3"* ]] || { echo "CHANGED: expected $3"; exit 1; }
}
expect 3.6.0 interpreted "right"
expect 3.6.0 compiled "cannot convert None"
expect 3.7.0 interpreted "right"
expect 3.7.0 compiled "compiled"
echo "SEEN: None in a returned tuple passes the interpreter, and not the compiler before 3.7"
