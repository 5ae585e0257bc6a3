#!/usr/bin/env bash
# batch_norm changes running_mean and running_var in place without raising their version counters.
#
# PyTorch counts in-place changes of a tensor, and autograd compares the count in backward: a value that was saved and
# then overwritten raises "modified by an inplace operation". In training mode BatchNorm overwrites its running statistics
# in the forward, and the counts stay where they were. instance_norm, with the same statistics, raises them. So a gradient
# that needs the old statistics is silently computed from the new ones.
#
# It matters to forward-only training, and to whoever finds changed buffers by their versions. They may be put back,
# copied, or looked at to see that an evaluation left a model alone. What helps: take the statistics of normalisation
# layers in training mode as changed, or compare their values.
#
# In zokern: both are done, so a step leaves running statistics as they were (docs/methods.md#what-is-told).
#
# Seen in torch 2.13.0 on a CPU. Needs python3 with venv.
# Subject: PyTorch, compilers and number formats
# 2026-11-28
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -qq --disable-pip-version-check torch==2.13.0 numpy

cat > seen.py <<'PYTHON'
import torch
from torch import nn


def moved(layer, x):
    mean, version = layer.running_mean.clone(), layer.running_mean._version
    with torch.no_grad():
        layer(x)
    changed = not torch.equal(mean, layer.running_mean)
    return f"changed {changed}, version raised by {layer.running_mean._version - version}"


torch.manual_seed(0)
print("torch", torch.__version__)
print("BatchNorm1d:", moved(nn.BatchNorm1d(4), torch.randn(8, 4)))
print("InstanceNorm1d:", moved(nn.InstanceNorm1d(4, track_running_stats=True), torch.randn(8, 4, 5)))

layer, weight = nn.BatchNorm1d(1), torch.ones(1, requires_grad=True)
loss = (weight * layer.running_var).sum()  # saves running_var, which is 1
layer(torch.full((8, 1), 3.0).cumsum(0))
loss.backward()
print("gradient is the overwritten value:", torch.equal(weight.grad, layer.running_var) and weight.grad.item() != 1.0)
PYTHON
venv/bin/python -W ignore seen.py | tee seen.txt
cat > wanted.txt <<'TEXT'
BatchNorm1d: changed True, version raised by 0
InstanceNorm1d: changed True, version raised by 1
gradient is the overwritten value: True
TEXT
tail -n 3 seen.txt | diff - wanted.txt || { echo "CHANGED"; exit 1; }
echo "as described"
