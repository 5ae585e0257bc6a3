"""Where losses are on a device nobody waits to look at them: the same work on host tensors, looked at later."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

import zokern
from tests.distributed.ranks import run
from tests.methods import METHODS, build, equal, weights
from tests.models import small, tokens
from zokern.optim import agreement
from zokern.optim.agreement import Agreement


class Later:
    """An Arriving of host tensors: what was there then, whenever it is asked for."""

    def __init__(self, there: Tensor) -> None:
        self.there = there.clone()

    def values(self) -> Any:
        return self.there.tolist()


def blindly() -> None:
    Agreement.blind = property(lambda self: True)  # type: ignore[assignment]
    agreement.Arriving = Later  # type: ignore[assignment,misc]


def same_bits(parallel: str) -> bool:
    blindly()
    found = []
    for name in ("mezo", "gv", "es", "hizoo"):
        ends = []
        for alone in (False, True):
            model = small()
            opt = build(
                METHODS[name],
                model,
                placement="shadow",
                **({"process_group": None} if alone else {"parallel": parallel}),
            )
            for t in range(4):
                parts = [tokens(3 * t + r) for r in range(dist.get_world_size())]
                if parallel == "directions":
                    opt.step(model, parts[:1])
                else:
                    opt.step(model, parts if alone else [parts[dist.get_rank()]])
            ends.append(weights(model))
        found.append(equal(*ends))
    return all(found)


@pytest.mark.parametrize("parallel", ["data", "directions"])
def test_bits_are_those_of_one_process(parallel: str) -> None:
    assert all(run(3, same_bits, parallel))


def parts(what: str) -> list[tuple[str, int, int]]:
    """After each step: what it raised, the steps and the skipped ones."""
    blindly()
    model = small()
    opt = zokern.MeZO(model, 1e-2, parallel="data", placement="shadow")
    found = []
    for t in range(5):
        if what == "raises" and t > 2 and dist.get_rank() == 1:
            break

        def closure(t: int = t) -> Tensor:
            if what == "raises" and t == 1 and dist.get_rank() == 1:
                raise ValueError("bad sample 17")
            return model(tokens(0))

        opt.param_groups[0]["lr"] = 0.5 if what == "lr" and t == 1 and dist.get_rank() == 1 else 1e-2
        before, raised = weights(model), ""
        try:
            opt.step(closure)
        except (zokern.RankError, ValueError) as error:
            raised = str(error)
        moved = not equal(before, weights(model))
        assert what == "raises" or moved != bool(raised or t == 1)
        found.append((raised, opt.counters["steps"], opt.skipped_steps))
    return found


@pytest.mark.filterwarnings("ignore")
def test_a_step_that_ranks_do_otherwise_is_left_out_on_all_and_said_later() -> None:
    for found in run(2, parts, "lr"):
        said = [raised for raised, _, _ in found if raised]
        assert said[0] == (
            "step 1 was left out on all ranks, and those since: ranks did other steps, or with other numbers. Start them "
            "again from the base weights and the journal"
        )
        assert "have not exchanged a number since" in said[1]
        assert found[1][1:] == (2, 1)


@pytest.mark.filterwarnings("ignore")
def test_a_rank_that_raises_makes_all_leave_the_step_out() -> None:
    other, own = run(2, parts, "raises")
    assert own[1][0] == "bad sample 17"
    assert own[2][0].startswith("this rank raised in step 1, and the ranks have not exchanged a number since")
    assert other[1] == ("", 2, 1)
    assert any(
        "step 1 was left out on all ranks, and those since: rank 1 raised in it" in raised for raised, _, _ in other
    )
