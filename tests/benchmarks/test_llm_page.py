"""What docs/llm.md says of the runs on a CPU, from all of them and from some; and what a step of a method takes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks.llm import cost, packed, page_cpu
from benchmarks.llm.bench import CONTEXT
from benchmarks.llm.claims import ARXIV, CLAIMS
from benchmarks.llm.methods import METHODS
from benchmarks.llm.packed import Reviews
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
    costs = {name: {"seconds": 1.5, "bytes": 3e7, "forward_bytes": 1e7} for name in METHODS}
    return {
        page_cpu.RUNS: {**about, "settings": {"budget": 500}, "results": results},
        page_cpu.COST: {**about, "results": costs},
    }


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> Any:
    """show(files): the page's parts, made from those."""

    def parts(files: dict[str, Any]) -> dict[str, str]:
        monkeypatch.setattr(page_cpu, "stored", lambda name: files.get(name, {}))
        return {name: make() for name, make in page_cpu.PAGES["docs/llm.md"].items()}

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
        lines[0] == f"| {first.label} | {first.grid[1]:g} | 500 | 60.0 ± 0.0 | 82.0 ± 1.0 | 3 | 1.50 | 375 | 20.0 MB |"
    )
    assert lines[-2:] == ["| 16 examples in the prompt |  | 0 |  | 66.0 ± 0.0 | 3 |  |  |  |",
                          "| as it is (zero-shot) |  | 0 |  | 52.0 |  |  |  |  |"]  # fmt: skip
    assert "yet" not in "".join(made.values())
    assert "in pieces" not in made["cpu-machine"]
    assert "- MeZO, two-sided: 1e-05: 0.000, 3e-05: 0.000, 0.0001: 0.000; taken: 3e-05" in made["cpu-grids"]
    assert made["cpu-picture"].startswith("![")


def test_a_page_of_some_runs_says_which_are_missing(show: Any) -> None:
    files = _whole()
    del files[page_cpu.COST]
    results = files[page_cpu.RUNS]["results"]
    methods = results["methods"]
    del methods["adam"]
    methods["mezo"]["runs"].pop()
    methods["hizoo"]["runs"].clear()
    methods["hizoo"]["grid"].pop()
    methods["fzoo"]["grid"][0] |= {"loss": None, "processor": "another CPU"}
    results[CONTEXT]["runs"].clear()
    made = show(files)
    told = made["cpu-machine"]
    assert "; in pieces, on a CPU and another CPU. " in told
    assert "Not run yet: HiZOO; Adam (backpropagation)." in told
    assert "Not all 3 seeds yet: MeZO, two-sided (2)." in told
    assert told.count("not measured yet: MeZO, two-sided;") == 1
    assert "HiZOO" not in made["cpu-runs"]
    assert "examples" not in made["cpu-runs"]
    assert "- HiZOO: 1e-05: 0.000, 3e-05: 0.000; not done" in made["cpu-grids"]
    assert "- FZOO, N=8: 1e-06: none, " in made["cpu-grids"]


def test_lower_lr_stand_beside_those_that_were_too_large(show: Any) -> None:
    files = _whole()
    assert show(files)["cpu-lower"] == "No method's mean loss rose."
    hizoo = files[page_cpu.RUNS]["results"]["methods"]["hizoo"]
    for run in hizoo["runs"]:
        run["curve"][-1]["loss"] = 0.7
    made = show(files)
    assert "Not all 3 seeds with a lower lr yet: HiZOO (0)." in made["cpu-machine"]
    assert made["cpu-lower"] == page_cpu.NONE
    hizoo["lower"] = [{**_run(seed, 0.8), "lr": 1e-5} for seed in range(3)]
    hizoo["lower"][0]["curve"][0]["loss"] = None
    made = show(files)
    assert "lower lr yet" not in made["cpu-machine"]
    assert made["cpu-lower"].splitlines()[2:] == [
        "| HiZOO | 3e-05 | 0.600 ± 0.000 | 0.700 ± 0.000 | 74.0 ± 1.0 | 1e-05 | none | 0.500 ± 0.000 | 80.0 ± 0.0 | 3 |"
    ]


def test_what_papers_report_stands_beside_the_difference_of_each_seed(show: Any) -> None:
    assert set(CLAIMS) < set(METHODS)
    files = _whole()
    methods = files[page_cpu.RUNS]["results"]["methods"]
    for run, accuracy, loss in zip(methods["fzoo"]["runs"], (0.74, 0.75, 0.73), (0.4, 0.5, 0.45), strict=True):
        run["curve"][-1] |= {"accuracy": accuracy, "loss": loss}
    methods["lezo"]["runs"][1]["curve"][-1]["loss"] = None
    methods["hizoo"]["runs"] = methods["hizoo"]["runs"][1:2]
    methods["es"]["runs"].clear()
    rows = [line[2:-2].split(" | ") for line in show(files)["cpu-papers"].splitlines()[2:]]
    told = dict(zip(CLAIMS, (row[2:] for row in rows), strict=True))
    assert told["mezo"] == ["the measure"] * 2
    assert told["fzoo"] == ["−0.050 ± 0.050", "+3.0 ± 1.7"]  # 4, 4 and 1 points
    assert told["lezo"] == ["diverged", "+2.0 ± 0.0"]
    assert told["hizoo"] == ["+0.000", "+3.0"]
    assert told["es"] == ["", ""]  # nothing yet
    assert all(f"]({ARXIV}{CLAIMS[name][0]}): " in row[1] for name, row in zip(CLAIMS, rows, strict=True))


def test_a_page_without_any_run_holds(show: Any) -> None:
    assert set(show({}).values()) == {page_cpu.NONE}
    begun = copy.deepcopy(_whole())
    begun[page_cpu.RUNS]["results"] |= {"methods": {}, CONTEXT: {"examples": 16, "runs": []}}
    made = show(begun)
    assert made["cpu-runs"].splitlines()[2:] == ["| as it is (zero-shot) |  | 0 |  | 52.0 |  |  |  |  |"]
    assert made["cpu-picture"] == page_cpu.NONE


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
