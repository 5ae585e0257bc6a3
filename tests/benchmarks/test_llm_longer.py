"""What docs/llm.md says of an lr chosen in longer runs follows from what is stored."""

from __future__ import annotations

from benchmarks.llm import page
from benchmarks.parts import ROOT

SAID = " ".join((ROOT / "docs" / "llm.md").read_text().partition("### lr from longer trials")[2].split())


def test_it_was_the_lr() -> None:
    short, longer = page.stored()["results"]["mezo"], page.stored(page.LONGER)["results"]["mezo"]
    assert (short["lr"], longer["lr"]) == (3e-5, 1e-5)
    (lost,) = (point for point in longer["grid"] if point["lr"] == short["lr"])
    assert lost["accuracy"] == 0.5
    assert lost["loss"] > page.stored(page.LONGER)["results"]["start"]["validation"]["loss"]
    assert "3e-05, which looked best after 3,000 forwards, has lost everything after 8,000." in SAID


def test_the_seeds_stay() -> None:
    runs = page.finished(page.LONGER)["mezo"]["runs"]
    assert "With 1e-05 all three seeds stay between 76 and 81 % from 8,000 forwards to the end." in SAID
    looks = [look["accuracy"] for run in runs for look in run["curve"] if 2 * look["step"] >= 8_000]
    assert (len(runs), round(100 * min(looks)), round(100 * max(looks))) == (3, 76, 81)
