#!/usr/bin/env bash
# Under accelerate's accumulate() an optimizer that takes a closure sees the last batch of each accumulation only.
#
# A prepared optimizer's step(closure) does nothing for the batches before the last: their closures are never called. With
# torch's own LBFGS and gradient_accumulation_steps=4, three quarters of the data are silently lost. The closure that is
# called gets a quarter of its gradient, because accelerator.backward divides for a sum that never comes about. The loss
# that it returns is whole, so a line search is given values and slopes that do not belong together. And step() returns
# None, also without accumulation, where torch's optimizers return the loss.
#
# It matters to LBFGS, to optimizers that look twice (sharpness-aware ones) or only forward (zeroth-order ones), and to
# loops that log what step() returns. What helps: one closure over all batches of a step, without accumulate() and
# gradient_accumulation_steps, called through the wrapped optimizer. There, prepared.optimizer.step(closure) returns the
# loss.
#
# In zokern: prepare() of its own gives the optimizer a step that takes every batch (docs/accelerate.md).
#
# Seen in accelerate 1.15.0 with torch 2.13.0 on a CPU. accelerate's pull request 4274 would return the value. Needs
# python3 with venv.
# Subject: fine-tuning frameworks
# 2026-11-28
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -qq --disable-pip-version-check torch==2.13.0 accelerate==1.15.0 numpy

cat > seen.py <<'PYTHON'
import accelerate
import torch


def eight_batches(steps):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=steps)
    net = torch.nn.Linear(2, 1)
    optimizer = accelerator.prepare(torch.optim.LBFGS(net.parameters(), max_iter=1))
    seen, shares, returned = [], set(), set()
    for batch in range(8):

        def closure():
            seen.append(batch)
            optimizer.zero_grad()
            loss = net(torch.full((2,), batch + 1.0)).square().sum()
            whole = torch.autograd.grad(loss, net.bias, retain_graph=True)[0]
            accelerator.backward(loss)
            shares.add(round((net.bias.grad / whole).item(), 4))
            return loss

        with accelerator.accumulate(net):
            returned.add(optimizer.step(closure))
    print(f"accumulate({steps}): batches {seen}, gradient / whole gradient {shares}, step returns {returned}")
    print("the wrapped optimizer's step returns", type(optimizer.optimizer.step(closure)).__name__)


torch.manual_seed(0)
print("torch", torch.__version__.split("+")[0], "accelerate", accelerate.__version__)
eight_batches(1)
eight_batches(4)
PYTHON
venv/bin/python -W ignore seen.py | tee seen.txt
cat > wanted.txt <<'TEXT'
accumulate(1): batches [0, 1, 2, 3, 4, 5, 6, 7], gradient / whole gradient {1.0}, step returns {None}
the wrapped optimizer's step returns Tensor
accumulate(4): batches [3, 7], gradient / whole gradient {0.25}, step returns {None}
the wrapped optimizer's step returns Tensor
TEXT
tail -n 4 seen.txt | diff - wanted.txt || { echo "CHANGED"; exit 1; }
echo "as described"
