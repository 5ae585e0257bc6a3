#!/usr/bin/env bash
# nvcc up to CUDA 13.0 reads device memory with a load from shared memory.
#
# A struct holds a pointer into shared memory and, in a struct inside it, a pointer to device memory. A function puts the
# two together, takes the inner struct by reference, and returns the whole. After inlining, the compiler takes the device
# pointer for one into shared memory too: cvta.to.shared and ld.shared, on an address that is not in shared memory.
# Nothing warns, and nothing in the program is undefined.
#
# It matters to whoever stages a part of an array in shared memory and keeps both pointers at hand. What helps: to take
# the inner struct by value, or to build the outer one in the kernel. To find it, search the PTX for cvta.to.shared where
# no pointer is converted on purpose.
#
# In zokern: a test looks for it in the PTX of every kernel, and the kernels are written around it.
#
# Seen in nvcc 13.0.48 and 13.0.88, for compute_75 to compute_120, and in NVRTC 11.8.89, 12.1.105, 12.6.85, 12.8.93,
# 12.9.86, 13.0.48 and 13.0.88. Right in 13.1.80, the first, and in nvcc 13.1.115, 13.2.51, 13.2.86, 13.3.33, 13.3.73,
# 13.4.59, 13.4.92 and 13.5.37. Read from the code, not run. Needs Linux on x86-64, a C++ compiler, python3 with pip.
# Subject: PyTorch, compilers and number formats
# 2026-11-27
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
for version in 13.0.88 13.1.80; do # one call: the wheels share a folder
  python3 -m pip install -qq --disable-pip-version-check --no-deps --target "$version" nvidia-cuda-nvcc=="$version" \
    nvidia-nvvm=="$version" nvidia-cuda-crt=="$version" nvidia-cuda-runtime=="$version"
done
python3 -m pip install -qq --disable-pip-version-check --no-deps --target 12.9.86 nvidia-cuda-nvrtc-cu12==12.9.86

cat > both.cu <<'CUDA'
struct List { const int* values; int count; };
struct Both { const int* shared; List list; };

__device__ Both both(const int* shared, const List& list) { return {shared, list}; }

__global__ void kernel(const int* values, int count, int* out) {
  __shared__ int shared[1];
  shared[0] = count;
  __syncthreads();
  const List list{values, count};
  const Both b = both(shared, list);
  out[threadIdx.x] = *b.shared + *b.list.values;
}
CUDA
# CUDA 12's wheels have no nvcc. NVRTC is the same compiler as a library.
cat > nvrtc.py <<'PYTHON'
import ctypes, glob

lib = ctypes.CDLL(glob.glob("12.9.86/nvidia/cuda_nvrtc/lib/libnvrtc.so.*")[0])
program, size = ctypes.c_void_p(), ctypes.c_size_t()
source, option = open("both.cu", "rb").read(), ctypes.c_char_p(b"--gpu-architecture=compute_90")
assert lib.nvrtcCreateProgram(ctypes.byref(program), source, b"both.cu", 0, None, None) == 0
assert lib.nvrtcCompileProgram(program, 1, ctypes.byref(option)) == 0
assert lib.nvrtcGetPTXSize(program, ctypes.byref(size)) == 0
ptx = ctypes.create_string_buffer(size.value)
assert lib.nvrtcGetPTX(program, ptx) == 0
open("12.9.86.ptx", "wb").write(ptx.value)
PYTHON
LD_LIBRARY_PATH=12.9.86/nvidia/cuda_nvrtc/lib python3 nvrtc.py
for version in 13.0.88 13.1.80; do
  "$version/nvidia/cu13/bin/nvcc" -ptx -arch=compute_90 both.cu -o "$version.ptx"
done

expect() { # version, the kernel's loads other than of its parameters
  local found
  found=$({ grep -oE '\bcvta\.to\.shared|\bld(\.shared|\.global)?\.u32' "$1.ptx" || true; } | sort | paste -sd ' ')
  echo "$(grep -o 'release.*' "$1.ptx"): $found"
  [ "$found" = "$2" ] || { echo "CHANGED: expected $2"; exit 1; }
}
expect 12.9.86 "cvta.to.shared ld.shared.u32 ld.shared.u32"
expect 13.0.88 "cvta.to.shared ld.shared.u32 ld.shared.u32"
expect 13.1.80 "ld.global.u32 ld.shared.u32"
echo "SEEN: 12.9.86 and 13.0.88 load from device memory with ld.shared; 13.1.80 with ld.global"
