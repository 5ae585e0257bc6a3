"""What a reader needs of the pages: short sentences, an introduction in plain words, and README's order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
]
LONGEST = 16  # words of a mean sentence
OURS = (
    "shadow",
    "stream",
    "sweep",
    "philox",
    "probe",
    "by counter",
    "stand-in",
    "fold",
    "z(s",
    "tensor id",
    "prefetch",
)


def prose(text: str) -> list[str]:
    """Paragraphs and points of lists, without tables, code, headings, pictures and comments; links as their words."""
    text = re.sub(r"```.*?```|<!--.*?-->|\$\$.*?\$\$", "", text, flags=re.DOTALL)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    kept = [part for part in re.split(r"\n\s*\n", text) if not part.lstrip().startswith(("#", "|", "    "))]
    points = [point for part in kept for point in re.split(r"^\s*[-*] ", part, flags=re.MULTILINE)]
    return [" ".join(point.split()) for point in points if point.strip()]


def sentences(text: str) -> list[int]:
    """How many words each has. A colon ends one: what follows could stand alone."""
    found = [part.split() for one in prose(text) for part in re.split(r"(?<=[.!?:;])[*)\"]*\s+", one)]
    return [len(words) for words in found if len(words) > 1]


def test_words_are_counted() -> None:
    text = "# No\n\nOne two. Three *four* five:\nsix\nseven.\n\n| a | b |\n\n```\nx y z\n```\n- [p q](r.md) s.\n"
    assert sentences(text) == [2, 3, 2, 3]


@pytest.mark.parametrize("page", PAGES)
def test_sentences_are_short(page: str) -> None:
    counted = sentences((ROOT / page).read_text())
    assert sum(counted) <= LONGEST * len(counted), f"{sum(counted) / len(counted):.1f} words a sentence"


@pytest.mark.parametrize("page", PAGES)
def test_first_paragraph_is_in_plain_words(page: str) -> None:
    """It comes before code, tables and pictures, and has no formula nor words that only we use."""
    _, _, text = (ROOT / page).read_text().partition("\n")
    first = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL).lstrip().split("\n\n")[0]
    assert not first.startswith(("```", "|", "![", "#", "- ")), first
    assert "$" not in first, first
    assert [word for word in OURS if word in first.lower()] == [], first


def test_readme_has_the_order_in_which_one_asks() -> None:
    text = (ROOT / "README.md").read_text()
    assert re.findall("^## (.*)$", text, flags=re.MULTILINE) == [
        "Time and memory", "Install", "Your own model", "Your Trainer", "Which method", "What is exact",
        "Beside the others", "What has run on which GPU", "Map",
    ]  # fmt: skip
    assert text.index("docs/images/step.svg") < text.index("## Time and memory") < text.index("<!-- honest: begin -->")
    assert text.index("<!-- honest: end -->") < text.index("## Install")


def test_readme_shows_a_model_in_eight_lines_and_a_trainer_in_five_statements() -> None:
    own, trainer = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len([line for line in own.splitlines() if line.strip()]) <= 8
    assert len([line for line in trainer.splitlines() if line.strip() and "import" not in line]) <= 5
