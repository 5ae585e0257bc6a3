"""Journals and all kinds of graphs on a real GPU. Every test is skipped without one; the CPU's are beside this file."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import zokern
from tests.graphs.test_graphed import batches, make
from tests.graphs.test_kinds import SHAPES, cut
from tests.methods import METHODS
from tests.optim.test_gpu_steps import on_gpu
from tests.placement.test_pipelined import same
from zokern import journal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="needs an NVIDIA GPU"),
]
NAMES = pytest.mark.parametrize("name", ["mezo", "mezo-adam", "hizoo", "helene", "fzoo", "es"])


@NAMES
@pytest.mark.parametrize("placement", ["inplace", "shadow"])
@pytest.mark.parametrize("lag", [3, 32])
def test_a_journal_does_not_wait_and_is_right(name: str, placement: str, lag: int, tmp_path, no_waiting: None) -> None:
    """Eager and captured: the same bytes, and a replay on the CPU has the GPU's weights."""
    data, files = on_gpu(batches(24)), []
    for graphed in (False, True):
        model, opt, closure, scheduler = make(METHODS[name], placement, torch.bfloat16, "cuda")
        base, path = copy.deepcopy(model).cpu(), tmp_path / f"{graphed}.zkj"
        step: Any = zokern.GraphedStep(opt, closure, data[0]) if graphed else None
        with journal.write(opt, path, lag=lag):
            for i, batch in enumerate(data):
                if i == 4:  # both of HELENE's kinds are captured
                    torch.cuda.synchronize()
                    torch.cuda.set_sync_debug_mode("error")
                if graphed:
                    step(batch)
                else:
                    opt.step(lambda batch=batch, closure=closure: closure(batch))
                opt.recent_metrics()
                scheduler.step()
            waits = journal.progress(opt).waits
            torch.cuda.set_sync_debug_mode("default")
            assert waits == 0 or lag == 3
        assert journal.replay(path, base) == len(data)
        assert all(torch.equal(p, q.cpu()) for p, q in zip(base.parameters(), model.parameters(), strict=True))
        files.append(path.read_bytes())
    assert files[0] == files[1]


@NAMES
def test_each_shape_is_a_graph(name: str) -> None:
    data = [cut(batch, *shape) for batch, shape in zip(on_gpu(batches(7)), SHAPES, strict=True)]
    runs = []
    for graphed in (True, False):
        model, opt, closure, _ = make(METHODS[name], "shadow", torch.bfloat16, "cuda")
        step = zokern.GraphedStep(opt, closure) if graphed else None
        losses = [step(b) if step else opt.step(lambda b=b, closure=closure: closure(b)) for b in data]
        runs.append((model, opt, torch.stack(losses)))
        assert step is None or step.captures >= 3
    same(*runs)


def test_micro_batches_with_weights() -> None:
    data, runs = on_gpu(batches(6)), []
    for graphed in (True, False):
        model, opt, closure, _ = make(METHODS["mezo"], "inplace", torch.float32, "cuda")
        step = zokern.GraphedStep(opt, closure) if graphed else None
        losses = []
        for i in range(3):
            pair, weights = data[2 * i : 2 * i + 2], [1.0 + i, 2.0]
            losses.append(
                step(batches=pair, batch_weights=weights) if step else opt.step(closure, pair, batch_weights=weights)
            )
        runs.append((model, opt, torch.stack(losses)))
    same(*runs)


@NAMES
@pytest.mark.parametrize("placement", ["shadow", "stream"])
def test_pipelined(name: str, placement: str) -> None:
    data, runs = on_gpu(batches(8)), []
    for turns in ("eeeeeeee", "gggggggg", "ggeegegg"):
        model, opt, closure, _ = make(METHODS[name], placement, torch.bfloat16, "cuda", pipelined=True)
        step = zokern.GraphedStep(opt, closure)
        losses = [
            step(b) if turn == "g" else opt.step(lambda b=b, closure=closure: closure(b))
            for turn, b in zip(turns, data, strict=True)
        ]
        runs.append((model, opt, torch.stack(losses)))
    same(runs[0], runs[1])
    same(runs[0], runs[2])


@pytest.mark.parametrize("name", ["mezo", "fzoo"])
def test_probes_that_share_a_forward(name: str) -> None:
    data, runs = [[batch] for batch in on_gpu(batches(4))], []
    for graphed in (True, False):
        model, opt, _, _ = make(METHODS[name], "forward", torch.float32, "cuda", distribution=zokern.LowRank(1))

        def each(batch: Any, model: Any = model) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(model(batch["tokens"]), batch["labels"], reduction="none")

        opt.step(each, data[0], batched=True)
        step = zokern.GraphedStep(opt, each, batched=True) if graphed else None
        losses = [step(batches=own) if step else opt.step(each, own, batched=True) for own in data]
        runs.append((model, opt, torch.stack(losses)))
        assert float(opt.metrics["probes_per_forward"]) > 1
    same(*runs)
