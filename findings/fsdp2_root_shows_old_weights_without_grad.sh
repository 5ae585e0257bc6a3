#!/usr/bin/env bash
# After a forward under no_grad, FSDP2's outermost module goes on showing the weights of that forward.
#
# fully_shard gathers a module's weights before its forward and lets go of them after it. Of the outermost one it keeps
# them, for the backward pass that usually follows. Without one, nobody lets go. The next forward does not gather again,
# so whatever changes the shards in between is not seen. Two evaluations around an in-place change of the shards agree to
# the last bit. Inner modules are not.
#
# It matters to whoever changes weights between forwards without a backward pass: averages of weights, merged adapters,
# searches, zeroth-order training. What helps: reshard() on the module after such a forward, or fully_shard(...,
# reshard_after_forward=True) for the outermost one too.
#
# In zokern: the outermost module is resharded after each forward (docs/distributed.md).
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

cat > root.py <<'PYTHON'
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
torch.manual_seed(0)
x = torch.ones(1, 4)


def outputs(inner):
    """Before and after the shards are doubled, and once more when the module has let go of what it gathered."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    if inner:
        fully_shard(model[0])
    fully_shard(model)
    shards = [p.to_local() for p in model.parameters()]
    with torch.no_grad():
        first = model(x)
        for shard in shards:
            shard.mul_(2)
        second = model(x)
        model.reshard()
        third = model(x)
    return torch.equal(first, second), torch.equal(2 * first, third)


root, inner = outputs(False), outputs(True)
if dist.get_rank() == 0:
    print("torch", torch.__version__.split("+")[0])
    print("weights of the outermost module: the change was not seen:", root[0], "and was after reshard():", root[1])
    print("weights of an inner module: the change was not seen:", inner[0], "and was after reshard():", inner[1])
dist.destroy_process_group()
PYTHON
venv/bin/torchrun --standalone --nproc-per-node 2 root.py 2> said.txt | tee seen.txt || { cat said.txt; exit 1; }
cat > wanted.txt <<'TEXT'
weights of the outermost module: the change was not seen: True and was after reshard(): True
weights of an inner module: the change was not seen: False and was after reshard(): True
TEXT
tail -n 2 seen.txt | diff - wanted.txt || { echo "CHANGED"; exit 1; }
echo "as described"
