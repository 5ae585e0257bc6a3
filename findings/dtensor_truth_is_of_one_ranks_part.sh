#!/usr/bin/env bash
# `if torch.isfinite(weight).all():` goes another way on each rank when weight is a DTensor.
#
# The value of all() of a sharded tensor is still to be put together from the ranks (it is a partial one). Neither bool()
# nor item() does that, or says so. They answer for the part that this rank has. So a rank whose part is fine goes on, and
# the one that has the nan does not. The next collective waits for a rank that never comes. A sum that is logged with
# item() is that of one shard.
#
# It matters to checks before a collective, such as gradient guards, checkpoint validation and early exits; and to logged
# numbers. What helps: full_tensor() before bool() or item().
#
# In zokern: a state that is loaded is judged by its full_tensor(), so all ranks refuse it or none.
#
# Seen in torch 2.13.0 with gloo on a CPU. Needs python3 with venv.
# Subject: distributed
# 2026-11-28
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -qq --disable-pip-version-check torch==2.13.0 numpy

cat > truth.py <<'PYTHON'
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
weight = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
if dist.get_rank() == 1:
    weight.to_local()[0] = float("nan")
fine = torch.isfinite(weight).all()
total = distribute_tensor(torch.tensor([0.0, 0.0, 1.0, 1.0]), mesh, [Shard(0)]).sum()
every = [None, None]
dist.all_gather_object(every, (bool(fine), bool(fine.full_tensor()), total.item(), total.full_tensor().item()))
if dist.get_rank() == 0:
    print("torch", torch.__version__.split("+")[0])
    print("bool(torch.isfinite(weight).all()) on each rank:", [one[0] for one in every])
    print("bool of its full_tensor() on each rank:", [one[1] for one in every])
    print("item() of a sum on each rank:", [one[2] for one in every], "of its full_tensor():", [one[3] for one in every])
dist.barrier()
sys.stdout.flush()
os._exit(0)  # threads of torch's collectives may still be there, and an ordinary end would now and then abort
PYTHON
venv/bin/torchrun --standalone --nproc-per-node 2 truth.py 2> said.txt | tee seen.txt || { cat said.txt; exit 1; }
cat > wanted.txt <<'TEXT'
bool(torch.isfinite(weight).all()) on each rank: [True, False]
bool of its full_tensor() on each rank: [False, False]
item() of a sum on each rank: [0.0, 2.0] of its full_tensor(): [2.0, 2.0]
TEXT
tail -n 3 seen.txt | diff - wanted.txt || { echo "CHANGED"; exit 1; }
echo "as described"
