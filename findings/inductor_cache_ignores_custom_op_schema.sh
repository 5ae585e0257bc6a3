#!/usr/bin/env bash
# torch.compile's cache on disk runs a graph that was compiled for another schema of a custom operator.
#
# The key of a cached graph has the operator's name in it, not its schema. Between two processes the operator changes, as
# between two versions of a package, and the call stays add_(x, 2.0). The compiled graph holds the old schema's defaults,
# written out. A changed default is thus ignored, silently: eager and compiled results differ within one process. An
# argument taken away raises "expected at most 2 argument(s) but received 3".
#
# It matters to whoever ships custom operators. Users upgrade the package, or run two versions of it. By default all of a
# user's processes share one cache folder. What helps: a new operator name with each schema; calls that pass every
# argument; a TORCHINDUCTOR_CACHE_DIR for each version; TORCHINDUCTOR_FORCE_DISABLE_CACHES=1.
#
# In zokern: calls of a pass's operators give every argument, so no default is written into a cached graph.
#
# Seen in torch 2.13.0 on a CPU. PyTorch's issue 187319 tells of a changed mutates_args, with the same cause. Needs
# python3 with venv, and a C++ compiler.
# Subject: PyTorch, compilers and number formats
# 2026-11-27
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -qq --disable-pip-version-check torch==2.13.0
export TORCHINDUCTOR_CACHE_DIR="$work/cache" TMPDIR="$work"

cat > process.py <<'PYTHON'
"""An operator that adds scale + shift; the default of shift is the argument, and without one there is no shift."""
import sys
import torch

default = sys.argv[1] if len(sys.argv) > 1 else None
library = torch.library.Library("finding", "DEF")
library.define("add_(Tensor(a!) x, float scale%s) -> ()" % (f", float shift={default}" if default else ""))


def add_(x, scale, shift=float(default or 0)):
    x.add_(scale + shift)


library.impl("add_", add_, "CPU")


def run(x):
    torch.ops.finding.add_(x, 2.0)
    return x * 10


eager = run(torch.zeros(1)).item()
try:
    compiled = torch.compile(run)(torch.zeros(1)).item()
except RuntimeError as error:
    compiled = str(error).split(" Declaration")[0]
print(f"eager {eager}, compiled {compiled}")
PYTHON
expect() { # what, what is printed, arguments of the process
  local found
  found=$(venv/bin/python -W ignore process.py "${@:3}")
  echo "$1: $found"
  [ "$found" = "$2" ] || { echo "CHANGED: expected $2"; exit 1; }
}
venv/bin/python -c 'import torch; print("torch", torch.__version__)'
expect "shift=0, new cache" "eager 20.0, compiled 20.0" 0
expect "shift=1, same cache" "eager 30.0, compiled 20.0" 1
expect "no shift, same cache" \
  "eager 20.0, compiled finding::add_() expected at most 2 argument(s) but received 3 argument(s)."
export TORCHINDUCTOR_FORCE_DISABLE_CACHES=1
expect "shift=1, no cache" "eager 30.0, compiled 30.0" 1
expect "no shift, no cache" "eager 20.0, compiled 20.0"
echo "SEEN: a changed schema of a custom operator does not miss the cache"
