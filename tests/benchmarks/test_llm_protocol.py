"""The protocol on a CPU, with a tiny model: what is run in which order, what is kept, and that all methods step alike."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks.llm import bench, context, packed, protocol, reviews, search
from benchmarks.llm.methods import METHODS, step
from benchmarks.llm.packed import Reviews
from benchmarks.parts import load
from tests.benchmarks.test_llm import saved, sentiment, texts

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # PEFT's prefixes
ABOUT = {"processor": "a CPU", "commit": "0" * 40}
SETS = {"train": texts(40, 0), "validation": texts(12, 1), "test": texts(16, 2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def subjects(folder: str) -> dict[str, Reviews]:
    """The task with a model for each adapter."""
    return {adapter: packed.load(folder, SETS, adapter) for adapter in ("", "lora", "prefix")}


class Kept:
    """What is stored, and a stop after so many pieces."""

    def __init__(self, stop: int | None = None) -> None:
        self.pieces, self.stop, self.results = 0, stop, {}

    def __call__(self, results: dict[str, Any]) -> None:
        self.results = json.loads(json.dumps(results))
        self.pieces += 1
        if self.pieces == self.stop:
            raise bench.OutOfTime


class Made:
    """A benchmark over the tiny tasks, with a clock that each look at moves on by a second, and the jobs that were done."""

    def __init__(
        self, subjects: dict[str, Reviews], results: dict[str, Any], *methods: str, stop: int | None = None,
        seconds: float = 0,
    ) -> None:  # fmt: skip
        options = argparse.Namespace(methods=list(methods), budget=12, trial=6, seconds=seconds)
        self.time, self.kept, self.said = 0.0, Kept(stop), list[str]()
        self.bench = bench.Bench(subjects.__getitem__, self.kept, options, results, ABOUT, self.now, self.said.append)

    def now(self) -> float:
        self.time += 1.0
        return self.time

    def all(self) -> dict[str, Any]:
        with torch.no_grad():
            self.bench.all()
        return self.kept.results

    @property
    def begun(self) -> list[str]:
        return [line.partition("now ")[2] for line in self.said if "now " in line]


@pytest.fixture(scope="module")
def whole(subjects: dict[str, Reviews]) -> Made:
    """All runs of two methods."""
    made = Made(subjects, {}, "mezo", "hizoo")
    made.all()
    return made


# ---------------------------------------------------------------------------------------------------------------- order


def test_all_methods_search_before_any_runs_and_seeds_come_one_after_another(whole: Made) -> None:
    searches = [line for line in whole.begun if "search" in line]
    grown = [len(whole.kept.results["methods"][name]["grid"]) for name in ("mezo", "hizoo")]
    assert whole.begun[: len(searches)] == searches
    assert [line.split(",")[0] for line in searches] == ["MeZO"] * grown[0] + ["HiZOO"] * grown[1]
    runs = [(line.split(",")[0], line.split("seed ")[1][0]) for line in whole.begun[len(searches) :]]
    names = ("16 examples in the prompt", "MeZO", "HiZOO")
    assert runs[:9] == [(name, seed) for seed in "012" for name in names]  # then those with a lower lr
    assert whole.said[0].startswith("zero-shot: accuracy 0.")
    assert whole.said[1].startswith("15 runs left, some 0.")
    assert whole.said[-2].startswith("1 runs left")


def test_lr_is_chosen_on_the_validation_set_and_kept_for_all_seeds(subjects: dict[str, Reviews], whole: Made) -> None:
    task = subjects[""]
    for name, looks in (("mezo", [6, 12]), ("hizoo", [6, 12])):
        record = whole.kept.results["methods"][name]
        assert record["lr"] == min(record["grid"], key=lambda point: point["loss"])["lr"]
        assert [run["lr"] for run in record["runs"]] == [record["lr"]] * 3
        assert [point["forwards"] for point in record["runs"][0]["curve"]] == looks
        method = METHODS[name]
        with torch.no_grad():
            task.reset()
            optimizer, batches = method.optimizer(task.model, method.grid[0], 3), task.batches(16, 3)
            for _ in range(6 // method.forwards):
                batch = next(batches)
                step(method, optimizer, lambda batch=batch: task.loss(batch))
            assert record["grid"][0]["loss"] == task.evaluate("validation")["loss"] != task.evaluate("test")["loss"]


def test_a_grid_grows_where_the_best_lies_at_its_edge_and_not_for_ever() -> None:
    start = (1e-5, 3e-5, 1e-4)

    def grown(loss: Any) -> list[float]:
        grid: list[dict[str, Any]] = []
        while (lr := search.next_lr(start, grid)) is not None:
            grid.append({"lr": lr, "loss": loss(lr)})
        return [point["lr"] for point in grid]

    assert grown(lambda lr: abs(lr - 3e-5)) == [1e-5, 3e-5, 1e-4]
    assert grown(lambda lr: -lr) == [1e-5, 3e-5, 1e-4, 3e-4, 1e-3]
    assert grown(lambda lr: lr) == [1e-5, 3e-5, 1e-4, 3e-6, 1e-6]
    assert grown(lambda lr: abs(lr - 3e-4)) == [1e-5, 3e-5, 1e-4, 3e-4, 1e-3]
    assert grown(lambda lr: None) == [1e-5, 3e-5, 1e-4, 3e-6, 1e-6]  # all diverge: lower
    assert search.best([{"lr": 1.0, "loss": None}, {"lr": 2.0, "loss": 9.0}]) == 2.0


def test_a_method_whose_loss_rises_runs_once_more_with_the_next_lower_lr(
    subjects: dict[str, Reviews], whole: Made
) -> None:
    results = copy.deepcopy(whole.kept.results)
    hizoo = results["methods"]["hizoo"]
    for name, losses in (("mezo", (0.6, 0.6)), ("hizoo", (0.5, 0.6))):
        for run in results["methods"][name]["runs"]:
            for point, loss in zip(run["curve"], losses, strict=True):
                point["loss"] = loss
        results["methods"][name]["lower"] = []
    done = Made(subjects, copy.deepcopy(results), "mezo", "hizoo")
    methods = done.all()["methods"]
    assert done.said[0].startswith("1 runs left")
    assert [line.split("seed ")[1][0] for line in done.begun] == ["0"]
    assert methods["mezo"] == results["methods"]["mezo"]
    assert methods["hizoo"]["runs"] == hizoo["runs"]
    (once,) = methods["hizoo"]["lower"]
    below = max(point["lr"] for point in hizoo["grid"] if point["lr"] < hizoo["lr"])
    assert (once["seed"], once["lr"]) == (0, below)
    assert once["curve"] != hizoo["runs"][0]["curve"]
    last = Made(subjects, done.kept.results, "mezo", "hizoo")
    last.all()
    assert last.said == []


def test_a_study_is_whole_when_nothing_of_any_method_is_left(subjects: dict[str, Reviews], whole: Made) -> None:
    results = copy.deepcopy(whole.kept.results)
    done = results["methods"]["mezo"]
    for run in done["runs"]:
        run["curve"][-1]["loss"] = run["curve"][0]["loss"]
    results["methods"].clear()
    Made(subjects, results, *METHODS)
    for record in results["methods"].values():
        record |= copy.deepcopy({key: done[key] for key in ("grid", "runs")})
    made = Made(subjects, results, "mezo").bench
    assert made.complete()
    taken = results["methods"]["es"]["runs"].pop()
    assert not made.complete()
    taken["curve"][-1]["loss"] = None
    results["methods"]["es"]["runs"].append(taken)
    assert not made.complete()  # with a lower lr, too
    results["methods"]["es"]["lower"] = copy.deepcopy(done["runs"][:1])
    assert made.complete()
    del results["methods"]["adam"]
    assert not made.complete()


def test_seeds_keep_the_lr_of_the_first_one(subjects: dict[str, Reviews], whole: Made) -> None:
    results = copy.deepcopy(whole.kept.results)
    record = results["methods"]["mezo"]
    record["runs"].pop()
    record["grid"][0]["loss"] = record["grid"][-1]["loss"] = -1.0  # as if other lr had been tried since
    Made(subjects, results, "mezo").all()
    assert len({run["lr"] for run in results["methods"]["mezo"]["runs"]}) == 1


def test_what_counts_as_rising_and_which_lr_is_next() -> None:
    def runs(*curves: tuple[float | None, ...]) -> list[dict[str, Any]]:
        return [{"curve": [{"loss": loss} for loss in curve]} for curve in curves]

    assert search.falls_back(runs((0.5, 0.7), (0.6, 0.5)))
    assert not search.falls_back(runs((0.5, 0.6), (0.7, 0.5)))
    assert not search.falls_back(runs((0.5, 0.5)))
    assert not search.falls_back(runs((0.5,)))  # too short for two looks
    assert not search.falls_back(runs((None, 0.5)))
    assert search.falls_back(runs((0.5, None), (0.5, 0.1)))
    assert search.falls_back(runs((None, None)))
    grid = [{"lr": lr} for lr in (1e-5, 3e-5, 1e-4)]
    assert [search.lower(grid, lr) for lr in (1e-4, 1e-5)] == [3e-5, 3e-6]


# ---------------------------------------------------------------------------------------------------------- broken off


def _told(results: dict[str, Any]) -> dict[str, Any]:
    """Without what the clock says."""
    return json.loads(json.dumps(results), object_hook=lambda d: {k: v for k, v in d.items() if k != "seconds"})


def test_a_broken_off_benchmark_goes_on_without_doing_a_run_twice(subjects: dict[str, Reviews], whole: Made) -> None:
    for stop in (3, 11):
        first = Made(subjects, {}, "mezo", "hizoo", stop=stop)
        with pytest.raises(bench.OutOfTime):
            first.all()
        second = Made(subjects, first.kept.results, "mezo", "hizoo")
        assert _told(second.all()) == _told(whole.kept.results)
        assert first.kept.pieces + second.kept.pieces == whole.kept.pieces
        assert first.begun + second.begun == whole.begun


def test_a_run_that_is_cut_is_dropped_and_done_again(subjects: dict[str, Reviews], whole: Made) -> None:
    begun = {"start": whole.kept.results["start"], "inference": {"seconds": 1e-3}}  # an estimate that is far too small
    cut = Made(subjects, begun, "mezo", "hizoo", seconds=6)
    with pytest.raises(bench.OutOfTime):
        cut.all()
    assert cut.kept.pieces == 0
    assert "dropped" in cut.said[-1]
    assert cut.bench.results["methods"]["mezo"]["grid"] == []
    again = Made(subjects, cut.bench.results, "mezo", "hizoo", stop=1)
    with pytest.raises(bench.OutOfTime):
        again.all()
    (point,) = again.kept.results["methods"]["mezo"]["grid"]
    assert _told(point) == _told(whole.kept.results["methods"]["mezo"]["grid"][0])


def test_no_run_is_begun_that_would_not_fit(subjects: dict[str, Reviews], whole: Made) -> None:
    results = copy.deepcopy(whole.kept.results)
    results["methods"]["hizoo"]["runs"].pop()
    late = Made(subjects, results, "mezo", "hizoo", seconds=4)  # its steps alone took as many looks at the clock
    with pytest.raises(bench.OutOfTime):
        late.all()
    assert late.begun == []
    assert late.said[0].startswith("not begun: HiZOO, lr")


def test_other_results_are_refused(tmp_path: Path, subjects: dict[str, Reviews]) -> None:
    path = tmp_path / "llm.json"
    path.write_text(json.dumps({"settings": {"budget": 500}, "machine": {"threads": 2}, "results": {"start": 1}}))
    with pytest.raises(SystemExit, match=r"of another settings.*'budget': \(500, 400\)"):
        protocol.former(path, {"budget": 400}, {"threads": 2})
    with pytest.raises(SystemExit, match=r"of another machine.*'threads': \(2, 1\)"):
        protocol.former(path, {"budget": 500}, {"threads": 1})
    assert protocol.former(path, {"budget": 500}, {"threads": 2}) == {"start": 1}
    assert protocol.former(path, {"budget": 500}, {"threads": 1}, protocol.VERSIONS) == {"start": 1}
    assert protocol.former(tmp_path / "none.json", {}, {}) == {}
    for cut in (path.read_text()[:-9], "[]", '{"settings": {}, "machine": {}}', "\udcff"):
        path.write_text(cut, errors="surrogateescape")
        with pytest.raises(SystemExit, match=r"llm.json holds no results of this program .*remove it, or give another"):
            protocol.former(path, {}, {})
    results = Made(subjects, {}, "mezo").bench.results
    results["methods"]["mezo"]["settings"] = {"num_samples": 2}
    with pytest.raises(SystemExit, match="have runs of mezo with other settings"):
        Made(subjects, results, "mezo")


def test_the_command_stores_a_whole_benchmark_and_goes_on_with_more_methods(
    tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "llm-cpu.json"
    monkeypatch.setattr(reviews, "read", lambda: SETS)
    threads = str(torch.get_num_threads())
    command = ["protocol", "--model", folder, "--budget", "16", "--trial", "16", "--threads", threads]
    command += ["--output", str(path)]
    for methods in (["mezo"], ["mezo", "lora-mezo"]):
        monkeypatch.setattr("sys.argv", [*command, "--methods", *methods])
        assert protocol.main() == 0
        stored = json.loads(path.read_text())
        assert list(stored["results"]["methods"]) == methods
        for record in stored["results"]["methods"].values():
            assert len(record["runs"]) == 3
            assert {run["processor"] for run in record["grid"] + record["runs"]} == {stored["machine"]["processor"]}
            assert {run["commit"] for run in record["grid"] + record["runs"]} == {stored["commit"]}
        assert {run["processor"] for run in stored["results"]["in-context"]["runs"]} == {stored["machine"]["processor"]}
        assert not stored["complete"]  # other methods are missing
    assert "MeZO, two-sided" not in capsys.readouterr().out.partition("stored")[2]
    for wrong, said in (("--budget 15", "at least 16"), ("--methods adamw", "unknown methods adamw")):
        monkeypatch.setattr("sys.argv", [*command, *wrong.split()])
        with pytest.raises(SystemExit):
            protocol.main()
        assert said in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("name", METHODS)
def test_a_method_steps_on_the_packed_task_and_costs_what_it_says(name: str, subjects: dict[str, Reviews]) -> None:
    method = METHODS[name]
    task = subjects[method.adapter]
    assert (task.why is None) == (method.adapter != "prefix")
    task.reset()
    optimizer, batches, forwards = method.optimizer(task.model, method.grid[1], 0), task.batches(4, 0), 0

    def counted(*_: object) -> None:
        nonlocal forwards
        forwards += 1

    hook = task.model.register_forward_hook(counted)
    with torch.no_grad():
        for _ in range(2):
            batch = next(batches)
            step(method, optimizer, lambda batch=batch: task.loss(batch))
        hook.remove()
        if hasattr(optimizer, "fold"):
            optimizer.fold()
    assert 2 * method.forwards == forwards * (method.forwards if method.backward else 1)
    assert task.moved() > 0
    task.reset()
    assert task.moved() == 0


def test_a_method_leaves_nothing_behind_on_the_model(subjects: dict[str, Reviews]) -> None:
    task = subjects[""]

    def run(name: str) -> dict[str, float]:
        task.reset()
        optimizer, batches = METHODS[name].optimizer(task.model, METHODS[name].grid[1], 0), task.batches(4, 0)
        with torch.no_grad():
            for _ in range(3):
                batch = next(batches)
                step(METHODS[name], optimizer, lambda batch=batch: task.loss(batch))
        return task.evaluate("test")

    alone = run("mezo")
    for name in ("lowrank", "hizoo", "adam"):  # the first ends with steps that wait
        run(name)
        assert run("mezo") == alone


def test_every_stored_run_has_spent_the_same_forwards_as_far_as_whole_steps_go() -> None:
    stored = load("llm-cpu.json")
    budget, seen = stored["settings"]["budget"], 0
    for name, record in stored["results"]["methods"].items():
        for run in [*record["runs"], *record.get("lower", [])]:
            seen += 1
            assert run["forwards"] == run["steps"] * METHODS[name].forwards == run["curve"][-1]["forwards"], name
            assert budget - METHODS[name].forwards < run["forwards"] <= budget, name
    assert seen > 8


def test_packed_batches_have_the_losses_of_padded_ones(subjects: dict[str, Reviews]) -> None:
    packed_task, padded = subjects[""], sentiment()
    packed_task.reset()
    chosen = [3, 0, 7, 11]
    with torch.no_grad():
        here = packed_task.logits(packed_task.take("train", chosen))
        there = padded.logits(padded.take("train", chosen))
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_prefix_begins_as_tokens_that_the_model_reads_first(subjects: dict[str, Reviews]) -> None:
    task, base = subjects["prefix"], subjects[""]
    task.reset()
    base.reset()
    model: Any = base.model
    first = torch.randint(model.config.vocab_size, (5,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [first + base.tokenizer(context.asked(text))["input_ids"] for text in SETS["test"].texts[:4]]
    found = task.logits(task.take("test", [0, 1, 2, 3]))
    torch.testing.assert_close(found, _long(base, rows), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ in context


def _long(task: Reviews, rows: list[list[int]]) -> Tensor:
    """Each whole prompt for itself."""
    model: Any = task.model
    return torch.stack([model(input_ids=torch.tensor([row])).logits[0, -1].index_select(0, task.words) for row in rows])


def test_keys_and_values_read_once_say_what_the_long_prompt_says(subjects: dict[str, Reviews]) -> None:
    task = subjects[""]
    task.reset()
    first = context.examples(SETS["train"], 0, count=6)
    rows = task.tokenizer([first + context.asked(text) for text in SETS["test"].texts])["input_ids"]
    with torch.no_grad():
        found, shared = context.logits(task, rows)
        expected = _long(task, rows)
    assert shared >= len(task.tokenizer(first)["input_ids"])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.argmax(1), expected.argmax(1))


def test_examples_are_of_each_label_and_a_seed_fixes_them() -> None:
    first = context.examples(SETS["train"], 0)
    assert first == context.examples(SETS["train"], 0)
    assert first != context.examples(SETS["train"], 1)
    told = first.split(context.BETWEEN)[:-1]
    assert len(told) == context.EXAMPLES
    for word in reviews.WORDS:
        assert sum(line.endswith(f"It was {word}") for line in told) == context.EXAMPLES // 2
    with pytest.raises(ValueError, match="only 6 of the 16"):
        context.examples(texts(6, 0), 0)


def test_rows_are_split_where_they_part() -> None:
    assert context.split([[1, 2, 3], [1, 2, 4, 5]]) == ([1, 2], [[3], [4, 5]])
    assert context.split([[1, 2], [1, 2, 3]]) == ([1], [[2], [2, 3]])
