"""Captured steps that leave out other blocks each time (LeZO): a gate for each block, in device memory."""

from __future__ import annotations

import pytest
import torch

import zokern
from tests.graphs.test_graphed import batches, emulated, make
from tests.graphs.test_looking_back import history
from tests.methods import METHODS, Case, states

__all__ = ["emulated"]  # a fixture
BLOCKS = [(name, case) for name, case in METHODS.items() if case.options.get("update") != "adamezo"]


def run(case: Case, turns: str, dtype: torch.dtype, dropped: int = 2, **options):
    """Eager and captured steps, as letters say; the counters after each."""
    model, opt, closure, scheduler = make(case, "inplace", dtype, layers=zokern.RandomBlocks(dropped), **options)
    scheduler.base_lrs = [opt.param_groups[0]["lr"] / 100]  # no large steps, whose count an eager step has elsewhere
    opt.param_groups[0]["lr"] /= 100
    data = batches(len(turns))
    step = zokern.GraphedStep(opt, closure, data[0]) if "c" in turns else None
    losses, counted = [], []
    for turn, batch in zip(turns, data, strict=True):
        losses.append(step(batch) if turn == "c" and step else opt.step(lambda b=batch: closure(b)))
        scheduler.step()
        counted.append((opt.counters, history(opt)))
    return (model, opt, torch.stack(losses)), counted


def assert_same(a, b) -> None:
    """A state that no step has come to is at its start in one, and not made yet in the other."""
    for (p, q), (mine, theirs) in zip(
        zip(a[0].parameters(), b[0].parameters(), strict=True),
        zip(states(a[1], a[0]), states(b[1], b[0]), strict=True),
        strict=True,
    ):
        assert torch.equal(p, q)
        for name in {**mine, **theirs}:
            start = torch.full_like(p, a[1].states()[name][1], dtype=a[1].states()[name][0])
            assert torch.equal(mine.get(name, start), theirs.get(name, start))
    assert torch.equal(a[2], b[2])


@pytest.mark.parametrize("case", [c for _, c in BLOCKS], ids=[n for n, _ in BLOCKS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_are_those_of_eager_steps(emulated, case: Case, dtype: torch.dtype) -> None:
    if case.method == "mezo-greedy":
        pytest.skip("an eager step on the CPU knows the best seed, and moves less between two directions that are one")
    (plain, before), (captured, after) = run(case, "eeeee", dtype), run(case, "ccecc", dtype)
    assert before == after
    assert_same(plain, captured)
    assert torch.equal(plain[1].metrics["projected_gradient"], captured[1].metrics["projected_gradient"])
