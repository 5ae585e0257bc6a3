#!/usr/bin/env bash
# PyTorch's wheels for Arm show their OpenMP to nobody: a library that looks up GOMP_parallel in the process finds nothing.
#
# `import torch` opens libtorch_global_deps.so for the whole process, so that all later libraries see what it needs. In the
# wheels for x86 that is GNU's OpenMP among others, and in those for Arm it is the C library alone, though libtorch_cpu.so
# needs the same OpenMP: it is loaded, beside torch's own modules, and no name of it can be found in the global scope.
#
# It matters to whoever runs code of their own on torch's threads without linking OpenMP, by dlsym(RTLD_DEFAULT, ...) or
# ctypes.CDLL(None): on x86 it works, on Arm the fallback is taken, and threads of its own share the cores with torch's,
# which wait for the next operator at full speed. What helps: dlopen("libtorch_cpu.so", RTLD_NOLOAD), and dlsym on that.
#
# In zokern: passes started threads of their own on Arm, each time. They look in both places now; a test opens torch's
# libraries so that nobody else sees their names (tests/backends/test_threads.py).
#
# Seen in the wheels of torch 2.10.0 for Arm and torch 2.13.0 for x86, by what their files say (pyelftools 0.32), and so in
# torch 2.14.1 for Arm with CUDA. Needs python3 with venv; 0.3 GB are downloaded, or 1.1 where the wheel for x86 has CUDA.
# Subject: PyTorch, compilers and number formats
# 2026-11-30
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
pip="venv/bin/python -m pip --disable-pip-version-check"
$pip install -qq pyelftools==0.32
wheel() { # platform, version
  $pip download -qq --no-deps --only-binary :all: --python-version 3.11 --platform "manylinux_2_28_$1" --dest "$1" "torch==$2"
}
wheel aarch64 2.10.0
wheel x86_64 2.13.0

cat > needs.py <<'PYTHON'
import io
import pathlib
import zipfile

from elftools.elf.elffile import ELFFile

for machine in ("aarch64", "x86_64"):
    (wheel,) = pathlib.Path(machine).glob("torch-*.whl")
    print("torch", wheel.name.split("-")[1].partition("+")[0], "for", machine)
    with zipfile.ZipFile(wheel) as file:
        for name in ("libtorch_cpu.so", "libtorch_global_deps.so"):
            dynamic = ELFFile(io.BytesIO(file.read(f"torch/lib/{name}"))).get_section_by_name(".dynamic")
            needed = {tag.needed for tag in dynamic.iter_tags("DT_NEEDED")}
            print(f"  {name} needs libgomp.so.1:", "libgomp.so.1" in needed)
PYTHON
found=$(venv/bin/python needs.py)
echo "$found"
expected="torch 2.10.0 for aarch64
  libtorch_cpu.so needs libgomp.so.1: True
  libtorch_global_deps.so needs libgomp.so.1: False
torch 2.13.0 for x86_64
  libtorch_cpu.so needs libgomp.so.1: True
  libtorch_global_deps.so needs libgomp.so.1: True"
[[ "$found" == "$expected" ]] || { echo "CHANGED: expected"; echo "$expected"; exit 1; }
echo "SEEN: torch's wheels for Arm do not load OpenMP for the whole process"
