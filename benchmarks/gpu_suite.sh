#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, without a network: builds the extension for this GPU, compares bits, runs the GPU's
# tests, the exhaustive checksum and the sanitizer (--part truth), and the benchmarks (--part speed), 9 minutes each.
#   bash benchmarks/gpu_suite.sh OUTDIR [--part truth|speed | --only a,b] [--skip a,b] [--deadline SECONDS]
#                                       [--copy-to FOLDER] [--list] [--help]
# PYTHON names the interpreter; without it that of .venv is used where there is one, else python3.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ -z "${PYTHON:-}" ]]; then
  if [[ -x "$root/.venv/bin/python" ]]; then PYTHON="$root/.venv/bin/python"; else PYTHON="python3"; fi
fi
command -v "$PYTHON" >/dev/null || { echo "gpu_suite.sh: there is no $PYTHON; set PYTHON to the one that has PyTorch" >&2; exit 2; }
# Not `python -m`, for which another checkout in the caller's folder would come first.
run='import runpy, sys; sys.path[0] = sys.argv.pop(1); runpy.run_module("benchmarks.gpu.suite", run_name="__main__")'
exec "$PYTHON" -c "$run" "$root" "$@"
