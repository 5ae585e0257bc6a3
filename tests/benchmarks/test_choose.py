"""docs/choose.md: what its rules for lr stand on, its tables, and the study of the number of samples."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks.choose import page, run
from benchmarks.convergence.tasks import Task
from benchmarks.llm import demo
from benchmarks.parts import ROOT
from tests.benchmarks.toy import CONFIG, Toy


def test_the_rule_is_near_the_best_lr_of_every_search() -> None:
    """The claim of the page: at 0.2M, 23M and 135M parameters, for each method that has a rule."""
    found = page.found()
    assert {(one.method, page.millions(one.parameters)) for one in found} >= {
        (method, size) for method in page.RULES for size in ("0.2M", "23M", "135M")
    }
    assert {one.n for one in found if one.method == "mezo-onesided"} == {1, 2, 4, 8, 16, 32}
    for one in found:
        assert 0.5 <= one.rule / one.lr <= 2, one
        assert one.below < one.rule < one.above, one
        assert one.below < one.lr < one.above < math.inf, one


def test_rules_are_what_their_words_say() -> None:
    for method, rule in page.RULES.items():
        for count, n, eps in ((10**6, 1, 1e-3), (7 * 10**9, 4, 1e-2)):
            said = eval(rule.text.replace("^", "**").replace(" n", " * n"), {"P": count, "n": n, "eps": eps})
            assert rule.lr(count, n, eps) == pytest.approx(said), method
    said = (ROOT / "docs" / "choose.md").read_text()
    billions = [f"{page.RULES['mezo'].lr(p, 1, 1e-3):.1e}".replace("e-0", "e-") for p in (10**9, 13 * 10**9)]
    assert f"{billions[0]} to {billions[1]} for two-sided MeZO" in said
    four = page.RULES["mezo-onesided"]
    assert [said.count(form) for form in ("0.17 / P^0.4", "lr=0.17 / trained**0.4")] == [1, 1]
    assert four.lr(10**6, 4, 1e-3) == pytest.approx(0.17 / 10**2.4, rel=0.03)
    start = float(demo.flags()[demo.flags().index("--lr") + 1])
    assert f"`make demo-lm` starts from\n{start:.0e}".replace("e-0", "e-") in said
    assert start == pytest.approx(2 * four.lr(134_515_008, 4, 1e-3), rel=0.05)


def test_a_search_counts_when_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = [{"lr": 1e-5, "loss": 0.7}, {"lr": 3e-5, "loss": 0.6}, {"lr": 1e-4, "loss": 0.5}]
    about = {"eps": 1e-3, "settings": {}, "runs": []}
    records = {"mezo": {"grid": grid, **about}, "fzoo": {"grid": [], **about}}
    monkeypatch.setattr(page.page_cpu, "results", lambda: {"methods": records})
    assert list(page._large()) == []  # it grows beyond 1e-4
    grid.append({"lr": 3e-4, "loss": None})
    (one,) = page._large()
    assert (one.method, one.parameters, one.lr, one.below, one.above) == ("mezo", 134_515_008, 1e-4, 3e-5, 3e-4)
    assert one.rule == pytest.approx(2.8e-5, rel=0.01)


def test_methods_are_sorted_by_the_largest_model_that_they_ran_on(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {name: [{"curve": [{"accuracy": each}]} for each in (level, level + 0.02)]
            for name, level in (("hizoo", 0.6), ("lora-mezo", 0.7), ("adam", 0.9))}  # fmt: skip
    results = {"start": {"test": {"accuracy": 0.52}}, "methods": {name: {"runs": each} for name, each in runs.items()}}
    monkeypatch.setattr(page.page_cpu, "results", lambda: results)
    rows = [line.strip("| ").split(" | ") for line in page.methods().splitlines()[2:]]
    assert [row[0] for row in rows[:3]] == ["MeZO on LoRA", "HiZOO", "MeZO, one-sided, n=4"]
    assert [row[0] for row in rows[-2:]] == ["Adam (backpropagation)", "before tuning"]
    assert rows[1] == ["HiZOO", "3.05", "59.2", "61.0 ± 1.4"]
    assert rows[-1][-1] == "52.0"


def test_the_study_of_samples_spends_the_same_forwards_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Task] = []

    def toy(*_: object, **__: object) -> Task:
        made.append(Toy())
        return made[-1]

    monkeypatch.setattr(run, "LanguageModel", toy)
    monkeypatch.setitem(run.TASKS, "lm", CONFIG)
    output = tmp_path / "samples.json"
    command = ["run.py", f"--cache={tmp_path}", f"--output={output}", f"--threads={torch.get_num_threads()}"]

    def call(*more: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [*command, *more])
        assert run.main() == 0
        return dict(json.loads(output.read_text()))

    stored = call("--budget=12", "--samples", "3", "1")
    methods = stored["results"]["methods"]
    assert [one["settings"]["num_samples"] for one in methods.values()] == [1, 3]
    assert [(one["steps"], one["forwards_per_step"]) for one in methods.values()] == [(6, 2), (3, 4)]
    assert methods["mezo-n1"]["final"] != methods["mezo-n3"]["final"]
    assert call("--budget=12", "--samples", "1", "3")["results"] == stored["results"]
    assert made[-1].seen == 2  # how it begins; all else is kept

    monkeypatch.setattr(page, "load", lambda name: {**stored, "machine": {**stored["machine"], "transformers": "5"}})
    told = page.samples()
    rows = [line.strip("| ").split(" | ") for line in told.splitlines()[2:4]]
    assert [(row[0], row[1], row[3]) for row in rows] == [("1", "6", "0.50"), ("3", "3", "0.75")]
    assert {"+0.000"} < {row[-1] for row in rows}
    for wrong in (["--samples", "0"], ["--budget=12", "--samples", "12"], ["--threads=0"]):
        with pytest.raises(SystemExit):
            call(*wrong)
        assert "--samples and --threads are at least 1" in capsys.readouterr().err
