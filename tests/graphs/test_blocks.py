"""Captured steps that leave out other blocks each time (LeZO): a gate for each block, in device memory."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests.graphs.test_graphed import batches, emulated, make, watched
from tests.graphs.test_looking_back import history
from tests.methods import METHODS, Case, states
from tests.models import Net
from zokern.passes import table

__all__ = ["emulated"]  # a fixture
BLOCKS = [(name, case) for name, case in METHODS.items() if case.options.get("update") != "adamezo"]


def run(case: Case, turns: str, dtype: torch.dtype, placement: str = "inplace"):
    """Eager and captured steps, as letters say; the counters after each."""
    model, opt, closure, scheduler = make(case, placement, dtype, layers=zokern.RandomBlocks(2))
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
@pytest.mark.parametrize(("placement", "dtype"), [("inplace", torch.float32), ("shadow", torch.bfloat16)])
def test_the_bits_are_those_of_eager_steps(emulated, case: Case, placement: str, dtype: torch.dtype) -> None:
    if placement == "inplace" and case.method == "mezo-greedy":
        pytest.skip("an eager step on the CPU knows the best seed, and moves less between two directions that are one")
    (plain, before), (captured, after) = run(case, "eeeee", dtype, placement), run(case, "ccecc", dtype, placement)
    assert before == after
    assert_same(plain, captured)
    assert torch.equal(plain[1].metrics["projected_gradient"], captured[1].metrics["projected_gradient"])


class Seen:
    """An optimizer of two groups, of which the second has one block alone, and what happened in its steps."""

    def __init__(self, captured: bool, rate: float, dropped_rate: float) -> None:
        torch.manual_seed(2)
        model = Net()
        alone = list(model.layers[0].parameters())
        rest = [p for p in model.parameters() if all(p is not q for q in alone)]
        opt = zokern.MeZO(model, rate, layers=zokern.RandomBlocks(3), placement="inplace", seed=5, num_samples=2)
        opt.param_groups[0]["params"] = rest
        opt.add_param_group({"params": alone})
        data, self.counts, self.kinds = batches(8), [], []

        def closure(batch) -> Tensor:
            return nn.functional.cross_entropy(model(batch["tokens"]), batch["labels"])

        step = zokern.GraphedStep(opt, closure, data[0]) if captured else None
        for i, batch in enumerate(data):
            left_out = 0 in opt.dropped(i)
            opt.param_groups[1]["lr"] = dropped_rate if left_out else rate
            self.kinds.append(left_out)
            step(batch) if step else opt.step(lambda batch=batch: closure(batch))
            self.counts.append((opt.large_steps, opt.skipped_steps, opt.counters))
        self.weights = [p.detach() for p in model.parameters()]


@pytest.mark.filterwarnings("ignore::zokern.ZokernWarning")
@pytest.mark.parametrize(("rate", "dropped_rate"), [(1e-3, 3e38), (1e-3, 0.5), (0.035, 1e-3)])
def test_numbers_of_a_group_that_is_left_out_do_not_matter(emulated, rate: float, dropped_rate: float) -> None:
    """They would be infinite in float32 and the step skipped; or it would be a large one, or count too little of others."""
    eager, captured = Seen(False, rate, dropped_rate), Seen(True, rate, dropped_rate)
    assert set(eager.kinds) == {True, False}
    assert eager.counts == captured.counts
    assert all(map(torch.equal, eager.weights, captured.weights))


@pytest.mark.parametrize("placement", ["inplace", "shadow"])
def test_what_a_graph_reads_is_kept(emulated, placement: str, monkeypatch) -> None:
    """Also where eager steps with other blocks have other copies in between."""
    captures = watched(monkeypatch)
    _, opt, closure, _ = make(METHODS["mezo-adam"], placement, torch.bfloat16, layers=zokern.RandomBlocks(2))
    data = batches()
    step = zokern.GraphedStep(opt, closure, data[0])
    for batch in data:
        opt.step(lambda batch=batch: closure(batch))
    table._cache.clear()
    gc.collect()
    freed = [what for what, storage in captures[-1].values() if storage.expired()]
    assert freed == []
    step(data[0])
    assert opt.counters["steps"] == len(data) + 1
