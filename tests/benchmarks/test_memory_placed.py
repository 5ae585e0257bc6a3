"""Memory of the placements on published shapes: the shapes, what is measured of them, and what the stored run shows."""

from __future__ import annotations

import runpy
import sys
from multiprocessing import Pipe
from typing import Any

import pytest
import torch

from benchmarks.memory import placed, placed_page
from benchmarks.memory.models import MODELS, NUMBERS
from benchmarks.memory.placed_page import COPIES
from benchmarks.memory.run import TOKENS, key
from tests.checking.test_memory import nothing_at_once, scalars
from zokern.bench.budget import peak_bytes

__all__ = ["nothing_at_once"]

pytest.importorskip("transformers")
CPU = torch.device("cpu")
ROWS, LENGTH = 16, 32  # whose forward takes more than what a first step does before it


@pytest.mark.parametrize("name", MODELS)
def test_models_have_the_published_numbers_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = MODELS[name].build(placed.DTYPE)
    assert sum(p.numel() for p in model.parameters()) == NUMBERS[name]


@pytest.mark.parametrize("name", MODELS)
def test_what_is_said_of_every_make_is_what_is_handed_out(name: str) -> None:
    model = MODELS[name].tiny()
    loss, inference = placed.steps(placed.INFERENCE, model, ROWS, LENGTH)
    forward = peak_bytes(inference, CPU)
    assert loss().requires_grad
    for way in COPIES:
        made = model.build(placed.DTYPE)
        closure = model.closure(made, ROWS, LENGTH)

        def steps() -> None:
            optimizer = placed.optimizer_of(way, made)  # noqa: B023 - called at once
            for _ in range(2):
                optimizer.step(closure)  # noqa: B023

        peak = peak_bytes(steps, CPU)
        assert scalars(peak - forward - placed.needed(placed.optimizer_of(way, made))), way


@pytest.mark.parametrize("way", [placed.INFERENCE, "forward, rank 1, fold_every=4"])
def test_a_measurement_is_of_a_whole_window(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    monkeypatch.setattr(placed.worker, "held", lambda tiny, whole, count: counts.append(count) or {"extra": 1})
    here, there = Pipe()
    placed.work(there, torch.get_num_threads(), way, MODELS["GPT-2"].tiny(), 2, 4)
    found = here.recv()
    assert counts == [2 if way == placed.INFERENCE else 5]
    assert found.keys() == ({"extra"} if way == placed.INFERENCE else {"extra", "said"})


@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")
def test_the_command_teaches_its_options(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["placed.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_module("benchmarks.memory.placed", run_name="__main__")
    assert "of GPT-2, T5-base, RoBERTa-large, Qwen2.5-0.5B, OPT-1.3B (default: all)" in " ".join(
        capsys.readouterr().out.split()
    )
    monkeypatch.setattr(sys, "argv", ["placed.py", "--models", "GPT-3"])
    with pytest.raises(SystemExit, match="there is no GPT-3; there are GPT-2"):
        runpy.run_module("benchmarks.memory.placed", run_name="__main__")


def test_the_stored_run_is_whole_and_holds_what_the_page_says() -> None:
    """Copies and states as said, but for what the first step takes for a moment; factors, but for oneDNN's code."""
    run = placed_page.stored()
    ways = (placed.INFERENCE, *placed.WAYS)
    assert run["complete"]
    assert set(run["results"]) == {key(model, *tokens, way) for model in MODELS for tokens in TOKENS for way in ways}
    for model in MODELS:
        for tokens in TOKENS:
            for way in placed.WAYS:
                said, measured = placed_page.found(model, tokens, way)
                most = 16 if way in COPIES else 32
                assert 0 <= measured - said < most * placed_page.MIB, (model, tokens, way)
