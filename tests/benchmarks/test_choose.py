"""docs/choose.md: what its rules for lr stand on, its tables, and the study of the number of samples."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks.choose import page, run, searches
from benchmarks.choose.searches import RULES, found
from benchmarks.convergence.tasks import Task
from benchmarks.llm import demo
from benchmarks.llm.methods import METHODS, SEEDS
from benchmarks.llm.search import best
from benchmarks.parts import ROOT, load
from tests.benchmarks.toy import CONFIG, Toy

SAID = " ".join((ROOT / "docs" / "choose.md").read_text().split())


def test_every_stored_search_of_a_method_with_a_rule_is_told_of() -> None:
    told = [sorted(one.tried) for one in found()]
    tasks = load("convergence-cpu.json")["results"].values()
    grids = [task["methods"][name]["grid"] for task in tasks for name in RULES]
    grids += [one["grid"] for one in load("samples-cpu.json")["results"]["methods"].values()]
    grids += [one["grid"] for one in load("rewards-cpu.json")["results"]["methods"].values()]
    for file in ("llm-cuda.json", "llm-cpu.json"):
        results = load(file)["results"]
        of = results.get("methods", results)
        grids += [of[name]["grid"] for name in RULES if name in of and of[name]["runs"]]
    for grid in grids:
        assert sorted({point["lr"] for point in grid}) in told
    assert len(told) >= len(grids) - 1  # n = 4 was searched twice


def test_the_rule_is_near_the_best_lr_of_every_short_search() -> None:
    """The claim of the page: at 0.2M, 23M and 135M parameters, for each method that has a rule."""
    short = page.short()
    assert {(one.method, page.millions(one.parameters)) for one in short} >= {
        (method, size) for method in RULES for size in ("0.2M", "23M", "135M")
    }
    assert {one.n for one in short if one.method == "mezo-onesided"} == {1, 2, 4, 8, 16, 32}
    for one in short:
        assert 0.45 <= one.rule / one.lr <= 1.7, one
        assert (one.below or math.inf) < one.rule < (one.above or 0), one
    for one in found():
        if one.forwards > searches.LONG:  # a longer run never wanted much more
            assert one.rule > 0.7 * one.lr, one


def test_rules_are_what_their_words_say() -> None:
    for method, rule in RULES.items():
        for count, n, eps in ((10**6, 1, 1e-3), (7 * 10**9, 4, 1e-2)):
            said = eval(rule.text.replace("^", "**").replace(" n", " * n"), {"P": count, "n": n, "eps": eps})
            assert rule.lr(count, n, eps) == pytest.approx(said), method


def test_what_the_page_says_of_lr_follows_from_the_rules_and_the_stored_runs() -> None:
    four = RULES["mezo-onesided"].lr(10**6, 4, 1e-3) * 10**2.4
    assert [SAID.count(f"{four:.2f} / P^0.4"), SAID.count(f"lr={four:.2f} / trained**0.4")] == [1, 1]
    large = f"{RULES['mezo'].lr(13 * 10**9, 1, 1e-3):.1e}".replace("e-0", "e-")
    assert f"1e-7 for MeZO, where the rule would say {large}, and 5e-9 for FZOO" in SAID
    released = {name: (ROOT / "docs" / "methods" / f"{name}.md").read_text() for name in ("mezo", "fzoo")}
    assert "OPT-13B, all parameters | `LR=1e-07`" in released["mezo"]
    assert "FZOO(model, lr=5.345e-09" in released["fzoo"]
    flags = demo.flags()
    start, n = (flags[flags.index(name) + 1] for name in ("--lr", "--num-samples"))
    assert f"`make demo-lm` starts from {start}" in SAID
    assert float(start) > RULES["mezo-onesided"].lr(134_515_008, int(n), 1e-3)
    sizes = {one["size"] for one in load("samples-cpu.json")["results"]["methods"].values()}
    assert len(sizes) == 1  # "the one in the same place won"


def test_no_method_beats_one_sided_mezo_and_four_directions_are_enough() -> None:
    """By more than the spread over seeds."""
    for task, key, sign in (("lm", "loss", 1), ("demo", "accuracy", -1)):
        methods = load("convergence-cpu.json")["results"][task]["methods"]
        best = methods["mezo-onesided"]["final"][key]
        for name, one in methods.items():
            other = one["final"][key]
            gained = sign * (best["mean"] - other["mean"])
            assert (gained > max(best["std"], other["std"])) == (name == "adam"), (task, name)
    large = {name: [run["curve"][-1]["accuracy"] for run in one["runs"]]
             for name, one in load("llm-cpu.json")["results"]["methods"].items()}  # fmt: skip
    ours = large["mezo-onesided"]
    for name, ends in large.items():
        assert len(ends) == len(ours) == len(SEEDS)
        gained = mean(ends) - mean(ours)
        assert (gained > max(stdev(ends), stdev(ours))) == METHODS[name].backward, name
    budget = load("llm-cpu.json")["settings"]["budget"]
    assert f"MeZO's runs have 40,000 forwards, {2 * 20_000 // budget} times ours on 135M" in SAID
    share = {name: 100 * mean(large[name]) for name in ("mezo", "mezo-onesided", "prefix-mezo", "lora-mezo")}
    (lora,) = load("llm-cpu.json")["results"]["methods"]["lora-mezo"]["lower"]
    told = f"on 135M they had 75 %, a prefix 68 %, LoRA {100 * lora['curve'][-1]['accuracy']:.0f} %"
    assert told in SAID
    assert [round(share[name]) for name in ("mezo", "mezo-onesided", "prefix-mezo")] == [75, 75, 68]
    for name in ("hizoo", "helene", "mezo-gv", "mezo-greedy"):  # "end behind both MeZOs"
        assert 100 * mean(large[name]) < min(share["mezo"], share["mezo-onesided"]), name
    demo_ends = {name: one["final"]["accuracy"]["mean"]
                 for name, one in load("convergence-cpu.json")["results"]["demo"]["methods"].items()}  # fmt: skip
    assert demo_ends["mezo-onesided"] > demo_ends["fzoo"]
    cuda = load("llm-cuda.json")["results"]
    long = {name: [run["curve"][-1]["accuracy"] for run in cuda[name]["runs"]] for name in ("mezo-onesided", "fzoo")}
    assert mean(long["mezo-onesided"]) > mean(long["fzoo"])
    ends = {one["settings"]["num_samples"]: one["final"]["loss"]
            for one in load("samples-cpu.json")["results"]["methods"].values()}  # fmt: skip
    assert ends[1]["mean"] > ends[2]["mean"] > ends[4]["mean"]
    for n in (8, 16, 32):
        assert abs(ends[n]["mean"] - ends[4]["mean"]) < max(ends[n]["std"], ends[4]["std"])


def test_what_the_page_says_of_adapters_is_stored() -> None:
    methods = load("llm-cpu.json")["results"]["methods"]
    lora, prefix = methods["lora-mezo"], methods["prefix-mezo"]
    assert [best(one["grid"]) for one in (lora, prefix)] == [3e-3, 3e-2]
    assert (
        "the best of a search were 3e-3 and 3e-2, and 3e-3 undid the model in a run of 500, where 1e-3 did not" in SAID
    )
    start = load("llm-cpu.json")["results"]["start"]["test"]["loss"]
    assert {run["lr"] for run in lora["runs"]} == {3e-3}
    assert min(run["curve"][-1]["loss"] for run in lora["runs"]) > start > 1.5 * lora["lower"][0]["curve"][-1]["loss"]
    assert lora["lower"][0]["lr"] == 1e-3


def test_a_search_counts_when_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = [{"lr": 1e-5, "loss": 0.7}, {"lr": 3e-5, "loss": 0.6}, {"lr": 1e-4, "loss": 0.5}]
    about = {"eps": 1e-3, "settings": {}, "runs": []}
    records = {"mezo": {"grid": grid, **about}, "fzoo": {"grid": [], **about}}
    results = {"methods": records, "start": {"validation": {"loss": 1.2}}}
    monkeypatch.setattr(searches.stored_cpu, "results", lambda: results)
    assert list(searches._large()) == []  # it grows beyond 1e-4
    grid.append({"lr": 3e-4, "loss": None})
    (one,) = searches._large()
    assert (one.method, one.parameters, one.lr, one.below, one.above) == ("mezo", 134_515_008, 1e-4, 3e-5, 3e-4)
    assert (one.start, one.tried[3e-4], one.n) == (1.2, math.inf, 1)
    assert one.rule == pytest.approx(2.24e-5, rel=0.01)


def test_methods_are_sorted_by_the_largest_model_that_they_ran_on(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {name: [{"curve": [{"accuracy": each}]} for each in (level, level + 0.02)]
            for name, level in (("hizoo", 0.6), ("lora-mezo", 0.7), ("adam", 0.9))}  # fmt: skip
    for each in runs.values():
        each.append(copy.deepcopy(each[0]))
    monkeypatch.setattr(page.stored_cpu, "results", dict)
    assert "135M" not in page.methods()  # nothing to show
    results = {"start": {"test": {"accuracy": 0.52}}, "methods": {name: {"runs": each} for name, each in runs.items()}}
    monkeypatch.setattr(page.stored_cpu, "results", lambda: results)
    rows = [line.strip("| ").split(" | ") for line in page.methods().splitlines()[2:]]
    small, demo = (load("convergence-cpu.json")["results"][task]["methods"] for task in ("lm", "demo"))
    least = min(set(small) - {"adam"}, key=lambda name: small[name]["final"]["loss"]["mean"])
    assert [row[0] for row in rows[:3]] == ["MeZO on LoRA", "HiZOO", small[least]["label"]]
    assert [row[0] for row in rows[-2:]] == ["Adam (backpropagation)", "before tuning"]
    loss, share = small["hizoo"]["final"]["loss"], demo["hizoo"]["final"]["accuracy"]
    assert rows[1] == ["HiZOO", f"{loss['mean']:.2f} ± {loss['std']:.2f}",
                       f"{100 * share['mean']:.1f} ± {100 * share['std']:.1f}", "60.7 ± 1.2"]  # fmt: skip
    assert rows[-1][-1] == "52.0"
    runs["lora-mezo"].pop()  # not all seeds are there
    results["methods"] |= {name: {"runs": runs["hizoo"]} for name in ("prefix-mezo", "lowrank")}
    rows = [line.strip("| ").split(" | ") for line in page.methods().splitlines()[2:]]
    assert rows[0][0] == small[least]["label"]
    assert [row[-1] for row in rows if row[0] == "HiZOO"] == ["60.7 ± 1.2"]
    alike = [METHODS[name].label for name in ("lowrank", "lora-mezo", "prefix-mezo")]  # on the largest model alone
    assert [row[0] for row in rows if row[0] in alike] == alike


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

    monkeypatch.setattr(run, "SAMPLES", (1, 3))
    stored = call("--samples", "3", "1")
    methods = stored["results"]["methods"]
    assert [one["settings"]["num_samples"] for one in methods.values()] == [1, 3]
    assert [(one["steps"], one["forwards_per_step"]) for one in methods.values()] == [(6, 2), (3, 4)]
    assert methods["mezo-n1"]["final"] != methods["mezo-n3"]["final"]
    assert call("--samples", "1", "3")["results"] == stored["results"]
    assert made[-1].seen == 2  # how it begins; all else is kept

    monkeypatch.setattr(page, "load", lambda name: {**stored, "machine": {**stored["machine"], "transformers": "5"}})
    told = page.samples()
    rows = [line.strip("| ").split(" | ") for line in told.splitlines()[2:4]]
    assert [(row[0], row[1], row[3]) for row in rows] == [("1", "6", "0.50"), ("3", "3", "0.75")]
    assert {"+0.000"} < {row[-1] for row in rows}
    monkeypatch.setattr(sys, "argv", ["run.py", "--samples", "1"])
    with pytest.raises(SystemExit):
        run.main()
    assert "needs --output" in capsys.readouterr().err
    for wrong in (["--samples", "0"], ["--budget=12", "--samples", "12"], ["--threads=0"]):
        with pytest.raises(SystemExit):
            call(*wrong)
        assert "--samples and --threads are at least 1" in capsys.readouterr().err
