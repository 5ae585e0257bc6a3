#!/usr/bin/env bash
# set_optimizer_state_dict(full_state_dict=True) fails with a bare AssertionError for an optimizer without states.
#
# torch.distributed.checkpoint.state_dict saves a full state_dict of SGD without momentum, and cannot load it again. It
# looks for a tensor in the optimizer's state_dict to learn the device, finds none, and stops with "Expected device to be
# set". What it would load are learning rates only. With momentum, or without full_state_dict, it works.
#
# It matters to whoever saves with full_state_dict (to gather a sharded run into one file) and finds out when the run is
# to go on: the save was fine. What helps: load without full_state_dict, or optimizer.load_state_dict(saved).
#
# In zokern: methods without states have it too; both remedies work (docs/methods.md).
#
# Seen in torch 2.13.0 on a CPU. Needs python3 with venv.
# Subject: distributed
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
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict


def loaded(full, **options):
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, **options)
    how = StateDictOptions(full_state_dict=full)
    state = get_optimizer_state_dict(model, optimizer, options=how)
    try:
        set_optimizer_state_dict(model, optimizer, state, options=how)
    except AssertionError as error:
        return f"AssertionError: {error}"
    return "loads"


print("torch", torch.__version__)
print("SGD:", loaded(False))
print("SGD, full:", loaded(True))
print("SGD with momentum, full:", loaded(True, momentum=0.9))
PYTHON
venv/bin/python -W ignore seen.py | tee seen.txt
cat > wanted.txt <<'TEXT'
SGD: loads
SGD, full: AssertionError: Expected device to be set
SGD with momentum, full: loads
TEXT
tail -n 3 seen.txt | diff - wanted.txt || { echo "CHANGED"; exit 1; }
echo "as described"
