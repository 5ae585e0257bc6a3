#!/usr/bin/env bash
# A bfloat16 layer on a CPU with AVX512-BF16 keeps 0.6 MiB for each number of rows that it has seen, up to 600 MiB.
#
# PyTorch gives a bfloat16 product to oneDNN, which compiles code for its exact shape and keeps it for the next time, for up
# to 1,024 shapes. That there is such a cache is documented; how much an entry takes is not. For nn.Linear(1024, 1024) it is
# 0.6 MiB with AVX512-BF16, ten times what it is where ONEDNN_MAX_CPU_ISA=AVX512_CORE leaves that out, and in float32 nothing
# can be measured. Batches padded to their longest text have another number of rows each, and each layer's shape counts, so
# the process grows for hundreds of batches, and no profiler of tensors shows it.
#
# It matters to whoever trains or serves in bfloat16 on a CPU, and takes a growing process for a leak or measures memory in
# the first batches. ONEDNN_PRIMITIVE_CACHE_CAPACITY=64 makes it 300 MiB, not the 40 that 64 entries take: what is thrown
# out does not all come back. What helps: few shapes, as by padding to a multiple of 64 (pad_to_multiple_of of
# transformers' collators).
#
# In zokern: updates that wait (fold_every) have another width in each step of a window; each took 4 MiB with GPT-2 in
# bfloat16, which is no memory of zokern's (docs/memory.md).
#
# Seen in torch 2.13.0 with numpy 2.3.5, on an AMD EPYC; AMX was not tried. Needs Linux on x86-64 with AVX512-BF16, python3 with
# venv, one GB of memory.
# Subject: PyTorch, compilers and number formats
# 2026-11-30
set -euo pipefail

grep -qw avx512_bf16 /proc/cpuinfo || { echo "CANNOT TELL: this CPU has no AVX512-BF16"; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -qq --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cat > grow.py <<'PY'
import ctypes
import gc
import sys

import torch


def resident():
    """MiB, what malloc keeps given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


def growth(layer, rows):
    before = resident()
    for count in rows:
        padded = -(-count // multiple) * multiple
        layer(torch.ones(padded, 1024, dtype=layer.weight.dtype))
    return max(round(resident() - before), 0)


multiple = int(sys.argv[2])
torch.set_num_threads(1)
with torch.no_grad():
    layer = torch.nn.Linear(1024, 1024).to(getattr(torch, sys.argv[1]))
    growth(layer, range(1, 17))
    parts = (range(100, 200), range(100, 200), range(200, 1300), range(1300, 2300))
    print(*(growth(layer, rows) for rows in parts))
PY
seen() { # what, the bounds of four growths in MiB: 100 shapes, the same again, 1,100 more, 1,000 more
  local what=$1 found
  shift
  read -r -a found < <(venv/bin/python grow.py "$dtype" "${multiple:-1}")
  echo "$what: 100 numbers of rows ${found[0]} MiB, the same again ${found[1]}, 1,100 more ${found[2]}, 1,000 more ${found[3]}"
  for i in 0 1 2 3; do
    if (( found[i] < ${1%-*} || found[i] > ${1#*-} )); then echo "CHANGED: expected $1"; exit 1; fi
    shift
  done
}
dtype=float32 seen "float32" 0-3 0-3 0-9 0-9
dtype=bfloat16 seen "bfloat16" 30-120 0-5 300-1000 0-60
dtype=bfloat16 multiple=64 seen "bfloat16, padded to a multiple of 64" 0-9 0-5 2-40 2-40
export ONEDNN_PRIMITIVE_CACHE_CAPACITY=64
dtype=bfloat16 seen "bfloat16, 64 entries" 20-90 0-60 100-600 0-60
unset ONEDNN_PRIMITIVE_CACHE_CAPACITY
export ONEDNN_MAX_CPU_ISA=AVX512_CORE
dtype=bfloat16 seen "bfloat16, AVX512_CORE" 2-20 0-5 20-150 0-30
echo "SEEN: code for each shape of a bfloat16 product stays, 0.6 MiB each with AVX512-BF16"
