"""A NaN stays one when it is rounded, whichever bits it has and wherever it lies.

Stochastic rounding adds up to 2^16 - 1 to the bits of a float32, and rounding to nearest up to 2^15. A NaN whose payload is
full would become -0.0: each vector of a tile is looked at before.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zokern

N = 512  # two tiles of the widest kernel
FULL = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)


@pytest.mark.filterwarnings("ignore:the losses of 5 steps")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_full_payload_anywhere(instruction_set: str, dtype: torch.dtype, rounding: str) -> None:
    p = nn.Parameter(torch.ones(N).to(dtype))
    opt = zokern.MeZO([p], 1e-3, update="momentum", rounding=rounding, placement="inplace")
    opt.step(lambda: 1.0)
    for at in range(0, N, 4):
        with torch.no_grad():
            p.fill_(1.0)
            m = opt.state[p]["m"]
            m.zero_()
            m.view(torch.int32)[at] = 0x7FFFFFFF
        assert m[at].view(torch.int32) == FULL.view(torch.int32)[0]
        opt.step(lambda: 1.0)
        nan = p.detach().isnan()
        assert nan[at], f"element {at} is {float(p[at])}"
        assert nan.sum() == 1
