#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command and without a network: builds the extension for this GPU, compares
# bits, runs the GPU's tests, the sanitizer, the exhaustive checksum and the benchmarks, inside 9 minutes.
#   bash benchmarks/gpu_suite.sh OUTDIR [--only a,b] [--skip a,b] [--deadline SECONDS] [--list] [--help]
# PYTHON names the interpreter; without it that of .venv is used where there is one, else python3.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ -z "${PYTHON:-}" ]]; then
  if [[ -x "$root/.venv/bin/python" ]]; then PYTHON="$root/.venv/bin/python"; else PYTHON="python3"; fi
fi
command -v "$PYTHON" >/dev/null || { echo "gpu_suite.sh: there is no $PYTHON; set PYTHON to the one that has PyTorch" >&2; exit 2; }
exec "$PYTHON" "$root/benchmarks/gpu_suite.py" "$@"
