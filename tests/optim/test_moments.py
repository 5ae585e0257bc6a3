"""AdaMeZO's coefficients, of any rows: of groups that came later, that are frozen now, of blocks that were left out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zokern
from tests.methods import scripted
from zokern.optim.moments import AdaMeZOHistory
from zokern.optim.numbers import Rows
from zokern.optim.update import Estimate, Rates

B1, B2 = 0.8, 0.9
ROWS: dict[str, Rows] = {
    "one": [(0, None)],
    "each group": [(0, None), (1, None), (2, None)],
    "in another order": [(2, None), (0, None), (1, None)],
    "the last": [(2, None)],
    "blocks": [(0, None), (0, 0), (0, 1), (1, 1)],
    "blocks of one group": [(1, 0), (1, 2)],
}


@pytest.mark.parametrize("left_out", [[], [1]], ids=["all", "some left out"])
@pytest.mark.parametrize("known", [1, 2, 3])
@pytest.mark.parametrize("name", ROWS)
def test_each_row_has_its_groups_and_blocks_terms(name: str, known: int, left_out: list[int]) -> None:
    """known: groups that there were in the steps before."""
    rows = ROWS[name]
    groups = max(3 if name != "one" else 1, known)
    generator = torch.Generator().manual_seed(4)
    eps = torch.rand(groups, generator=generator, dtype=torch.float64)
    memory = AdaMeZOHistory(horizon=4)
    for age in range(5):  # one more than it keeps
        c = torch.randn(known, generator=generator, dtype=torch.float64)
        memory.entries.append((100 + age, left_out if age == 1 else [], c))
    now = torch.tensor(0.7, dtype=torch.float64)
    lr = torch.rand(len(rows), generator=generator, dtype=torch.float64)
    estimate, rates = Estimate({9: now}, now), Rates(lr, lr, lr)
    memory.measured(estimate, left_out, eps)
    update = memory.update(rates, rows, (B1, B2), 1e-8)
    entries = [(9, left_out, now / eps), *list(memory.entries)[:3]]
    assert update.seeds == [seed for seed, _, _ in entries]
    for r, (group, block) in enumerate(rows):
        for age, (_, dropped, c) in enumerate(entries):
            own = float(c[group]) if group < len(c) and block not in dropped else 0.0
            assert float(update.coefs["G"][r, age]) == pytest.approx((1 - B1) * B1**age * own, rel=1e-14)
            assert float(update.coefs["V"][r, age]) == pytest.approx((1 - B2) * B2**age * own**2, rel=1e-14)


def test_a_group_that_comes_later_has_no_part_in_earlier_steps() -> None:
    """And one that is frozen none in later ones; a step of each goes through."""
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))
    opt = zokern.MeZO([first], 1e-3, update="adamezo", seed=2)
    opt.step(scripted([1.0, 1.1]))
    opt.add_param_group({"params": [second]})
    opt.step(scripted([1.0, 1.1]))
    assert [c.tolist()[1:] == [0.0] for _, _, c in opt._memory.entries] == [False, True]
    first.requires_grad_(False)
    before, other = first.detach().clone(), second.detach().clone()
    opt.step(scripted([1.0, 1.1]))
    assert torch.equal(first.detach(), before)
    assert not torch.equal(second.detach(), other)
