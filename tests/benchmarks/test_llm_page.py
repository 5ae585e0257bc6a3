"""What docs/llm.md says of the runs on a CPU, from all of them and from some; and what a step of a method takes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks.llm import cost, packed, page_cpu, papers, picture_cpu, stored_cpu
from benchmarks.llm.bench import CONTEXT
from benchmarks.llm.methods import METHODS
from benchmarks.llm.packed import Reviews
from benchmarks.llm.papers import ARXIV, CLAIMS
from tests.benchmarks.test_llm import saved, texts

MACHINE = {"processor": "a CPU", "threads": 2, "torch": "2", "transformers": "5", "instruction_sets": ["avx2"]}


def _run(seed: int, end: float) -> dict[str, Any]:
    curve = [{"forwards": 250, "loss": 0.6, "accuracy": 0.6}, {"forwards": 500, "loss": 0.5, "accuracy": end}]
    return {"seed": seed, "lr": 3e-5, "steps": 250, "forwards": 500, "seconds": 250.0, "processor": "a CPU",
            "curve": curve}  # fmt: skip


def _record(name: str, ends: list[float]) -> dict[str, Any]:
    grid = [
        {"lr": lr, "loss": abs(lr - METHODS[name].grid[1]), "accuracy": 0.6, "processor": "a CPU"}
        for lr in METHODS[name].grid
    ]
    runs = [_run(seed, end) for seed, end in enumerate(ends)]
    return {"label": METHODS[name].label, "grid": grid, "runs": runs, "lr": METHODS[name].grid[1]}


def _whole() -> dict[str, dict[str, Any]]:
    """Both files, with all that a page wants."""
    ends = {name: [0.70 + i / 100, 0.71 + i / 100, 0.72 + i / 100] for i, name in enumerate(METHODS)}
    examples = {"examples": 16, "runs": [{"seed": seed, "accuracy": 0.66, "processor": "a CPU"} for seed in range(3)]}
    results = {"start": {"test": {"accuracy": 0.52, "loss": 1.1}}, CONTEXT: examples,
               "methods": {name: _record(name, each) for name, each in ends.items()}}  # fmt: skip
    about = {"machine": MACHINE, "date": "2026-11-29T01:02:03", "commit": "0" * 40}
    one = {"seconds": 1.5, "forward_seconds": 0.5, "packed": True, "bytes": 3e7, "forward_bytes": 1e7}
    costs = {name: dict(one) for name in METHODS}
    return {
        stored_cpu.RUNS: {**about, "settings": {"budget": 500}, "results": results},
        stored_cpu.COST: {**about, "results": costs},
    }


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> Any:
    """show(files): the page's parts, made from those."""

    def parts(files: dict[str, Any]) -> dict[str, str]:
        monkeypatch.setattr(stored_cpu, "stored", lambda name: files.get(name, {}))
        made = (one.PAGES["docs/llm.md"].items() for one in (page_cpu, papers, picture_cpu))
        return {name: make() for some in made for name, make in some}

    return parts


def test_a_page_of_all_runs_has_the_best_first_and_backpropagation_behind(show: Any) -> None:
    made = show(_whole())
    lines = made["cpu-runs"].splitlines()[2:]
    zeroth = [name for name in METHODS if not METHODS[name].backward]
    order = [*reversed(zeroth), *[name for name in reversed(METHODS) if METHODS[name].backward]]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == [
        *[METHODS[name].label for name in order], "16 examples in the prompt", "as it is (zero-shot)"
    ]  # fmt: skip
    first = METHODS[order[0]]
    assert (
        lines[0]
        == f"| {first.label} | 3e-05 | 250 × {first.forwards} | 60.0 ± 0.0 | 82.0 ± 1.0 | 3 | 3.00 | 375 | 20.0 MB |"
    )
    assert lines[-2:] == ["| 16 examples in the prompt |  |  |  | 66.0 ± 0.0 | 3 |  |  |  |",
                          "| as it is (zero-shot) |  |  |  | 52.0 |  |  |  |  |"]  # fmt: skip
    assert "yet" not in "".join(made[name] for name in made if name != "cpu-states")
    assert made["cpu-states"] == "No run has said it yet."
    assert "others on" not in made["cpu-machine"]
    assert "- MeZO, two-sided: 1e-05: 0.000, 3e-05: 0.000, 0.0001: 0.000; taken: 3e-05" in made["cpu-grids"]
    assert made["cpu-picture"].startswith("![")


def test_a_page_of_some_runs_says_which_are_missing(show: Any) -> None:
    files = _whole()
    del files[stored_cpu.COST]
    results = files[stored_cpu.RUNS]["results"]
    methods = results["methods"]
    del methods["adam"]
    methods["mezo"]["runs"].pop()
    methods["hizoo"]["runs"].clear()
    methods["hizoo"]["grid"].pop()
    methods["fzoo"]["grid"][0] |= {"loss": None, "processor": "another CPU"}
    methods["fzoo"]["runs"][0]["commit"] = "1" * 40
    results[CONTEXT]["runs"].clear()
    made = show(files)
    told = made["cpu-machine"]
    assert "; others on another CPU; runs that say it, at 111111111111. " in told
    assert "Not run yet: HiZOO; Adam (backpropagation)." in told
    assert "Not all 3 seeds yet: MeZO, two-sided (2)." in told
    assert told.count("not measured yet: MeZO, two-sided;") == 1
    assert "| 250 × 9 | 60.0 ± 0.0 | 78.0 ± 1.0 | 3 |  |  |  |" in made["cpu-runs"]
    assert "HiZOO" not in made["cpu-runs"]
    assert "examples" not in made["cpu-runs"]
    assert "- HiZOO: 1e-05: 0.000, 3e-05: 0.000; not done" in made["cpu-grids"]
    assert "- FZOO, N=8: 1e-06: none, " in made["cpu-grids"]


def test_lower_lr_stand_beside_those_that_were_too_large(show: Any) -> None:
    files = _whole()
    assert show(files)["cpu-lower"] == "No method's mean loss rose."
    hizoo = files[stored_cpu.RUNS]["results"]["methods"]["hizoo"]
    for run in hizoo["runs"]:
        run["curve"][-1]["loss"] = 0.7
    made = show(files)
    assert "Not run with a lower lr yet: HiZOO." in made["cpu-machine"]
    assert made["cpu-lower"] == "It is not known before all seeds have run."
    hizoo["lower"] = [{**_run(seed, 0.8), "lr": 1e-5, "processor": "a third CPU"} for seed in (1,)]
    made = show(files)
    assert "lower lr yet" not in made["cpu-machine"]
    assert "; others on a third CPU;" in made["cpu-machine"]
    assert made["cpu-lower"].splitlines()[2:] == [
        "| HiZOO | 3e-05 | 0.600 | 0.700 | 74.0 | 1e-05 | 0.600 | 0.500 | 80.0 |"
    ]
    hizoo["lower"][0]["curve"][1]["loss"] = None
    assert show(files)["cpu-lower"].endswith(" | 0.600 | diverged | 80.0 (1 diverged) |")


def test_states_are_told_by_their_range_and_mean(show: Any) -> None:
    files = _whole()
    runs = files[stored_cpu.RUNS]["results"]["methods"]["helene"]["runs"]
    for run, scale in zip(runs, (1, 2, 3), strict=True):
        run["states"] = {"h": {"least": 0.5 * scale, "mean": 1.0 * scale, "largest": 4.0 * scale}}
    assert show(files)["cpu-states"] == "- HELENE, floor 1000, h: 0.5 to 12, mean 2.0000 ± 1.0000"


def test_times_are_those_of_methods_measured_while_a_forward_took_the_same(show: Any) -> None:
    files = _whole()
    costs = files[stored_cpu.COST]["results"]
    costs["hizoo"] |= {"seconds": 3.0, "forward_seconds": 1.0}  # the machine was half as fast
    costs["prefix-mezo"] |= {"seconds": 4.0, "forward_seconds": 1.0, "packed": False}
    show(files)
    assert stored_cpu.step_seconds("hizoo") == stored_cpu.step_seconds("mezo") == 1.5
    assert [stored_cpu.step_seconds("prefix-mezo"), stored_cpu.in_forwards("prefix-mezo")] == [4.0, 4.0]


def test_the_picture_has_each_method_and_each_seed(show: Any) -> None:
    files = _whole()
    methods = files[stored_cpu.RUNS]["results"]["methods"]
    methods["lezo"]["runs"] = methods["lezo"]["runs"][:1]
    methods["lezo"]["runs"][0]["curve"][-1]["loss"] = None
    del files[stored_cpu.COST]["results"]["adam"]
    show(files)
    forwards, seconds, memory = picture_cpu.drawn().axes
    count = len(METHODS)
    assert [len(axes.lines) for axes in (forwards, seconds, memory)] == [2 * count + 1, 2 * count - 1, count]
    named = {line.get_label(): line for line in forwards.lines if not line.get_label().startswith("_")}
    assert set(named) == {method.label for method in METHODS.values()} | {"16 examples in the prompt"}
    assert len({line.get_color() for line in named.values()}) == count + 1
    assert list(named["HiZOO"].get_xdata()) == [0, 250, 500]
    assert list(named["MeZO on a prefix"].get_xdata()) == [250, 500]
    assert sorted(len(line.get_xdata()) for line in forwards.lines if line.get_marker() == "o") == [1] + [3] * (
        count - 1
    )
    assert {line.get_marker() for line in memory.lines} == {"o", "s", "None"}


def test_what_papers_report_stands_beside_the_difference_of_each_seed(show: Any) -> None:
    assert set(CLAIMS) < set(METHODS)
    files = _whole()
    methods = files[stored_cpu.RUNS]["results"]["methods"]
    for run, accuracy, loss in zip(methods["fzoo"]["runs"], (0.74, 0.75, 0.73), (0.4, 0.5, 0.45), strict=True):
        run["curve"][-1] |= {"accuracy": accuracy, "loss": loss}
    methods["lezo"]["runs"][1]["curve"][-1]["loss"] = None
    methods["hizoo"]["runs"] = methods["hizoo"]["runs"][1:2]
    methods["es"]["runs"].clear()
    rows = [line[2:-2].split(" | ") for line in show(files)["cpu-papers"].splitlines()[2:]]
    told = dict(zip(CLAIMS, (row[2:] for row in rows), strict=True))
    assert told["mezo"] == ["", "", ""]
    assert told["fzoo"] == ["−0.050 ± 0.050", "+3.0 ± 1.7", "3"]  # 4, 4 and 1 points
    assert told["lezo"] == ["diverged", "diverged", "3"]
    assert told["hizoo"] == ["+0.000", "+3.0", "1"]
    assert told["es"] == ["", "", ""]  # nothing yet
    assert "| 73.0 ± 1.0 (1 diverged) | 3 |" in show(files)["cpu-runs"]
    assert all(f"]({ARXIV}{CLAIMS[name][0]}): " in row[1] for name, row in zip(CLAIMS, rows, strict=True))


def test_a_page_without_any_run_holds(show: Any) -> None:
    assert set(show({}).values()) == {stored_cpu.NONE, "No run has said it yet."}
    begun = copy.deepcopy(_whole())
    begun[stored_cpu.RUNS]["results"] |= {"methods": {}, CONTEXT: {"examples": 16, "runs": []}}
    made = show(begun)
    assert made["cpu-runs"].splitlines()[2:] == ["| as it is (zero-shot) |  |  |  | 52.0 |  |  |  |  |"]
    assert made["cpu-picture"] == stored_cpu.NONE


# ----------------------------------------------------------------------------------------------------------------- costs


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Reviews:
    return packed.load(saved(tmp_path_factory.mktemp("model")), {"train": texts(40, 0)})


def test_memory_is_what_a_method_keeps_beyond_a_forward(task: Reviews) -> None:
    found = {}
    with torch.no_grad():
        for name in ("mezo", "hizoo", "adam", "lowrank"):
            task.reset()
            found[name] = cost.measure(task, METHODS[name], rounds=2)
    size = 4 * sum(p.numel() for p in task.model.parameters())
    extra = {name: one["bytes"] - one["forward_bytes"] for name, one in found.items()}
    assert extra["mezo"] < 0.2 * size
    assert size <= extra["hizoo"] < 1.2 * size  # h
    assert extra["adam"] >= 3 * size  # gradients and two moments
    assert all(len(one["each"]) == 2 and one["packed"] for one in found.values())
    assert found["hizoo"]["forwards_per_step"] == 3
