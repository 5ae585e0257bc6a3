#!/usr/bin/env bash
# ptxas of CUDA 13.0 fuses a packed float32 product and sum, though told not to.
#
# mul.rn.f32x2 followed by add.rn.f32x2 must round twice: .rn on both forbids the fusion, and so does --fmad false. For
# the same pair of scalar instructions ptxas obeys. For the packed pair 13.0.88 emits one FFMA2 on sm_100, and rounds
# once. On sm_120, which has no packed unit, it splits the pair into scalars and fuses those: two FFMA. For x = 1 + 2^-12,
# x*x - (1 + 2^-11) is 0 in two roundings and 2^-24 in one.
#
# It matters to whoever needs the same bits on every GPU, or splits a product into a high and a low part. What helps: keep
# a sum scalar that must not be fused.
#
# In zokern: no kernel adds to a packed product but by fma; a test looks for it in the PTX.
#
# Seen in ptxas 12.9.86, 13.0.48 and 13.0.88; 12.8.93 fuses on sm_120 only. Right in 13.1.80, the first, and in 13.1.115,
# 13.2.51, 13.2.86, 13.3.33, 13.3.73, 13.4.59, 13.4.92 and 13.5.37. Needs Linux on x86-64, python3 with pip; no GPU.
# Subject: PyTorch, compilers and number formats
# 2026-11-27
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
install() { python3 -m pip install -qq --disable-pip-version-check --no-deps --target "$@"; }
install disasm nvidia-cuda-nvdisasm==13.5.37
for version in 13.0.88 13.1.80; do install "$version" nvidia-cuda-nvcc=="$version"; done

# A kernel that stores x*x + y: its name, its kind of register, the suffix of the two instructions.
kernel() {
  cat <<PTX
.visible .entry $1(.param .u64 at) {
  .reg .u64 %at;
  .reg .$2 %x, %y, %p;
  ld.param.u64 %at, [at];
  ld.global.$2 %x, [%at];
  ld.global.$2 %y, [%at+8];
  mul.rn.$3 %p, %x, %x;
  add.rn.$3 %p, %p, %y;
  st.global.$2 [%at], %p;
  ret;
}
PTX
}
# The float32 arithmetic in one kernel's machine code.
arithmetic() { # ptxas version, architecture, packed or scalar
  { printf '.version 9.0\n.target %s\n.address_size 64\n' "$2"
    if [ "$3" = packed ]; then kernel packed b64 f32x2; else kernel scalar f32 f32; fi; } > "$3.ptx"
  "$1/nvidia/cu13/bin/ptxas" --fmad false -arch "$2" "$3.ptx" -o "$3.cubin"
  disasm/nvidia/cu13/bin/nvdisasm -c "$3.cubin" | { grep -oE '\b(FFMA|FMUL|FADD)2?\b' || true; } | paste -sd ' '
}
expect() { # ptxas version, architecture, packed or scalar, instructions
  local found
  found=$(arithmetic "$1" "$2" "$3")
  echo "  $2 $3: $found"
  [ "$found" = "$4" ] || { echo "CHANGED: expected $4"; exit 1; }
}

for version in 13.0.88 13.1.80; do
  "$version/nvidia/cu13/bin/ptxas" --version | grep -o 'release.*'
  expect "$version" sm_100 scalar "FMUL FADD"
  expect "$version" sm_120 scalar "FMUL FADD"
  if [ "$version" = 13.0.88 ]; then
    expect "$version" sm_100 packed "FFMA2"
    expect "$version" sm_120 packed "FFMA FFMA"
  else
    expect "$version" sm_100 packed "FMUL2 FADD2"
    expect "$version" sm_120 packed "FMUL FMUL FADD FADD"
  fi
done
echo "SEEN: 13.0.88 fuses mul.rn.f32x2 and add.rn.f32x2 against --fmad false; 13.1.80 does not"
