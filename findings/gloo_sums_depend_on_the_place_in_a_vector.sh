#!/usr/bin/env bash
# Three ranks add the same three numbers in every place of a vector, and gloo's all_reduce has two answers.
#
# Each rank fills a vector with one number: 1 on the first, 2^-53 on the others. Added in the order of ranks the sum is 1
# everywhere, since each 2^-53 is rounded away; the two small ones first make 1 + 2^-52. The result has both, by place: a
# vector is reduced in pieces, and each piece begins its way round the ring at another rank. All ranks get the same bits,
# so nothing looks wrong. But a number's sum changes with what stands beside it, and is not that of a loop over the ranks.
#
# It matters to whoever wants one process to have the bits of several, or appends a number to a vector that is reduced
# already. What helps: all_gather, and additions in the order of ranks, element by element.
#
# In zokern: ranks do just that (docs/distributed.md#what-is-exact).
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

cat > sums.py <<'PYTHON'
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
rank = dist.get_rank()
vector = torch.full((6,), 1.0 if rank == 0 else 2.0**-53, dtype=torch.float64)
every = [torch.empty_like(vector) for _ in range(dist.get_world_size())]
dist.all_gather(every, vector)
in_order = every[0] + every[1] + every[2]
dist.all_reduce(vector)
seen = [torch.empty_like(vector) for _ in range(dist.get_world_size())]
dist.all_gather(seen, vector)
if rank == 0:
    print("torch", torch.__version__.split("+")[0])
    print("in the order of ranks, over 2^-52:", ((in_order - 1) * 2**52).int().tolist())
    print("by all_reduce, over 2^-52, kinds of results:", sorted(set(((vector - 1) * 2**52).int().tolist())))
    print("the same bits on all ranks:", all(torch.equal(one, vector) for one in seen))
dist.destroy_process_group()
PYTHON
venv/bin/torchrun --standalone --nproc-per-node 3 sums.py 2> said.txt | tee seen.txt || { cat said.txt; exit 1; }
cat > wanted.txt <<'TEXT'
in the order of ranks, over 2^-52: [0, 0, 0, 0, 0, 0]
by all_reduce, over 2^-52, kinds of results: [0, 1]
the same bits on all ranks: True
TEXT
tail -n 3 seen.txt | diff - wanted.txt || { echo "CHANGED"; exit 1; }
echo "as described"
