"""What docs/convergence.md says of the methods follows from the stored runs."""

from __future__ import annotations

import re
from statistics import mean, stdev

import pytest

pytest.importorskip("transformers")

from benchmarks.convergence import page
from benchmarks.convergence.methods import METHODS
from benchmarks.convergence.search import CHOOSING, SEEDS
from benchmarks.parts import ROOT
from zokern.optim.registry import ENTRIES

SAID = " ".join((ROOT / "docs" / "convergence.md").read_text().split())
TASKS = page.stored()["results"]


def each(task: str, method: str) -> list[float]:
    found: list[float] = TASKS[task]["methods"][method]["final"]["loss"]["each"]
    return found


def apart(task: str, method: str, other: str = "mezo") -> list[float]:
    methods = TASKS[task]["methods"]
    return page.apart(methods[method], methods[other])


def level(differences: list[float]) -> bool:
    """Whether 0 lies within two standard errors of their mean."""
    return abs(mean(differences)) < 2 * stdev(differences) / len(differences) ** 0.5


def test_all_methods_are_stored_with_all_seeds() -> None:
    assert page.stored()["settings"]["seeds"] == list(SEEDS)
    assert page.stored()["settings"]["choosing"] == list(CHOOSING)
    for name, task in TASKS.items():
        assert set(task["methods"]) == set(METHODS), name
        for method, one in task["methods"].items():
            assert one["label"] == METHODS[method].label
            assert {len(values["each"]) for values in one["final"].values()} == {len(SEEDS)}
    assert set(ENTRIES) <= set(METHODS)
    assert "for the seeds 0 to 4" in SAID
    assert "by the mean of seeds 0 and 1" in SAID


def test_no_grid_ends_at_the_lr_that_was_chosen() -> None:
    """As the page says: a grid is extended until the best lies inside."""
    for task in TASKS.values():
        for method, one in task["methods"].items():
            sizes = [point["size"] for point in one["grid"]]
            assert min(sizes) < one["size"] < max(sizes), method


def test_a_mean_is_known_to_what_the_page_says() -> None:
    """The 97.5 % point of Student's t with four degrees of freedom, over the root of five."""
    assert len(SEEDS) == 5
    assert "known to 1.24 of it" in SAID
    assert 2.776 / len(SEEDS) ** 0.5 == pytest.approx(1.24, abs=0.005)


def test_on_the_language_model_the_order_is_that_of_the_count() -> None:
    rows = re.findall(r"\| ([^|]+) \| [\d.; ]+ \| [\d; ]+ \| (0\.\d\d) \|", SAID)
    names = {"MeZO, one-sided, n=4": "mezo-onesided", "FZOO, 8 candidates": "fzoo", "HiZOO": "hizoo",
             "MeZO-GV, 4 candidates": "mezo-gv", "MeZO-Greedy, 4 candidates": "mezo-greedy"}  # fmt: skip
    counted = {names[label]: float(share) for label, share in rows if label in names}
    assert len(counted) == 5
    (half,) = [float(share) for label, share in rows if label == "MeZO; ES both ways; HELENE"]
    counted |= dict.fromkeys(("mezo", "es", "helene"), half)
    found = {name: mean(each("lm", name)) for name in counted}
    for one, share in counted.items():
        for other, less in counted.items():
            if share > less:
                assert found[one] < found[other], (one, other)
    for ahead in ("mezo-onesided", "fzoo", "lowrank-onesided"):
        assert max(apart("lm", ahead)) < 0  # with each seed
    for behind in ("mezo-gv", "hizoo", "mezo-greedy", "mezo-sign"):
        assert min(apart("lm", behind)) > 0


def test_what_is_said_of_each_method_on_the_language_model() -> None:
    methods = TASKS["lm"]["methods"]
    tried: dict[str, dict[float, float]] = {}
    for method, setting in (("hizoo", "smoothing"), ("helene", "floor")):
        best = methods[method]["size"]
        points = [one for one in methods[method]["grid"] if one["size"] == best]
        tried[method] = {one["settings"][setting]: one["validation_loss"] for one in points}
    assert min(tried["hizoo"]) == min(tried["hizoo"], key=tried["hizoo"].__getitem__)  # "the least smoothing did best"
    floors = tried["helene"]
    assert abs(floors[30.0] - floors[1000.0]) < 0.005 < 0.1 < floors[1.0] - floors[30.0]
    assert abs(mean(apart("lm", "helene", "mezo-momentum"))) < 0.002
    for averaging in ("mezo-momentum", "mezo-adam", "mezo-adamezo"):  # "with plain MeZO or a little behind it"
        assert 0 < mean(apart("lm", averaging)) < 0.02
    everyone = {name: mean(each("lm", name)) for name in methods}
    assert max(everyone, key=everyone.__getitem__) == "mezo-sign"
    assert 0 < mean(apart("lm", "lezo")) < 0.02
    assert everyone[page.FIRST_ORDER] < min(value for name, value in everyone.items() if name != page.FIRST_ORDER) - 1


def test_directions_of_signs_and_of_rank_1_end_where_normal_ones_do() -> None:
    for other, dense in (("mezo-rademacher", "mezo"), ("lowrank", "mezo"), ("lowrank-onesided", "mezo-onesided"),
                         ("lowrank-es", "es")):  # fmt: skip
        assert level(apart("lm", other, dense)), other
        assert not level(apart("lm", other, "mezo-sign"))


def test_on_the_encoder_few_differences_are_beyond_the_seeds() -> None:
    others, behind = set(METHODS) - {"mezo", page.FIRST_ORDER}, {"mezo-adam", "mezo-adamezo"}
    assert {name for name in others if max(apart("demo", name)) < 0} == {"mezo-onesided"}
    assert {name for name in others if min(apart("demo", name)) > 0} == behind
    assert not any(level(apart("demo", name)) for name in ("mezo-onesided", *behind))
    spread = {name: stdev(each("demo", name)) for name in METHODS}
    for name in others - behind - {"mezo-onesided"}:
        assert abs(mean(apart("demo", name))) < max(spread[name], spread["mezo"]), name
    start = TASKS["demo"]["start"]["report"]["loss"]
    for name in behind:
        chosen, rest = each("demo", name)[: len(CHOOSING)], each("demo", name)[len(CHOOSING) :]
        assert max(chosen) < start < max(rest)


def test_what_pages_of_methods_say_of_these_runs() -> None:
    said = {name: (ROOT / "docs" / "methods" / f"{name}.md").read_text() for name in ENTRIES}
    for name in ("mezo-gv", "mezo-greedy"):
        assert "it ended behind MeZO with each of five seeds" in " ".join(said[name].split())
        assert min(apart("lm", name)) > 0
    assert "it did not beat MeZO with any smoothing that was tried" in said["hizoo"]
    assert mean(apart("demo", "hizoo")) > 0 < mean(apart("lm", "hizoo"))
    for name in METHODS:  # FZOO and one-sided MeZO are "the best per forward of those measured", on the language model
        if name not in ("fzoo", "mezo-onesided", page.FIRST_ORDER):
            assert mean(each("lm", name)) > max(mean(each("lm", "fzoo")), mean(each("lm", "mezo-onesided")))
