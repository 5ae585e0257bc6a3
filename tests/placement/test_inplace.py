"""placement="inplace": what a step that changes nothing leaves of each weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import zokern

LARGEST = {torch.float32: 1e10, torch.bfloat16: 1e10, torch.float16: 1000.0}


@pytest.mark.parametrize("dtype", LARGEST)
@given(zeros=st.booleans(), eps=st.floats(0.01, 1.0), samples=st.integers(1, 3), seed=st.integers(0, 1 << 40))
@settings(max_examples=30, deadline=None)
def test_each_pass_rounds_an_element_once(dtype: torch.dtype, zeros: bool, eps: float, samples: int, seed: int) -> None:
    """So it comes back to half a spacing for each pass, of the largest value that it took; the last pass rounds 16 bits
    stochastically, by up to one. Weights of 0, for which no eps is too large, are left with that much of eps z."""
    drawn = torch.randn(8, generator=torch.Generator().manual_seed(seed))
    before = (torch.zeros(8) if zeros else drawn).to(dtype)
    p = nn.Parameter(before.clone())
    taken = [before.abs().double()]

    def closure() -> Tensor:
        taken.append(p.detach().abs().double())
        return torch.zeros(())

    opt = zokern.MeZO([p], 0.0, eps=eps * LARGEST[dtype] if zeros else eps, num_samples=samples, seed=seed,
                      placement="inplace")  # fmt: skip
    opt.step(closure)
    most, info = torch.stack(taken).amax(dim=0), torch.finfo(dtype)
    assert (most > before.abs()).any()
    rounded = (2 * samples + 2) * (info.eps / 2 * most + info.smallest_normal * info.eps)
    assert ((p.detach().double() - before.double()).abs() <= rounded).all()
