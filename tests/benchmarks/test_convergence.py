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
    return [a - b for a, b in zip(each(task, method), each(task, other), strict=True)]


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
