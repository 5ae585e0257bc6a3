"""The scripts of findings/ and the page that is made from their heads."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from docs import findings

SCRIPTS = sorted(findings.FOLDER.glob("*.sh"))
GOOD = findings.FOLDER / "gloo_sums_depend_on_the_place_in_a_vector.sh"


def test_every_script_is_on_the_page_under_its_title() -> None:
    page = (findings.ROOT / "docs" / "findings.md").read_text()
    assert len(SCRIPTS) >= 16
    for path in SCRIPTS:
        assert page.count(f"(../findings/{path.name}).") == 1, path.name
        assert f"\n### {findings.escaped(findings.read(path).title).removesuffix('.')}\n" in page, path.name


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("# 2026-11-28\n", "", "does not end with a date"),
        ("# 2026-11-28\n", "# November\n", "does not end with a date"),
        ("# Subject: distributed\n", "", "has no line 'Subject: ...'"),
        ("# Subject: distributed\n", "# Subject: cooking\n", "has no line 'Subject: ...'"),
        ("Seen in torch 2.13.0 with", "Seen in torch with", "names no software with its version"),
        ("Seen in", "Met in", "names no software with its version"),
        ("In zokern:", "Here", "has no 'In zokern: ...'"),
        ("#\n# In zokern:", "# In zokern:", "has 4 paragraphs, not 5"),
        ("What helps:", "One may try", "has no 'It matters to ... What helps: ...'"),
        ("install -qq", "install -qq peft==0.21.2", "does not name what the script installs: 0.21.2"),
        ("has two answers.\n", "has\n# two answers.\n", "has a title of more than one line"),
        ("\n# Each rank", "\nEach rank", "does not end with 'set -euo pipefail'"),
    ],
)
def test_a_head_that_lacks_something_is_refused_with_the_files_name(
    old: str, new: str, said: str, tmp_path: Path
) -> None:
    right = GOOD.read_text()
    assert right.count(old) == 1
    wrong = tmp_path / "findings" / "mine.sh"
    wrong.parent.mkdir()
    wrong.write_text(right.replace(old, new))
    with pytest.raises(SystemExit, match=rf"^findings/mine\.sh: its head {re.escape(said)}"):
        findings.read(wrong)


def test_markdown_takes_nothing_of_a_head_for_its_own() -> None:
    assert findings.escaped("x*x < y, `a * b`") == r"x\*x \< y, `a * b`"
    text = "word " * 23 + "1234567 + 2 and more"
    assert findings.wrapped(text).splitlines()[1].startswith(r"\+ 2")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_bash_installs_fixed_versions_and_runs_without_zokern(path: Path) -> None:
    """numpy alone is not pinned: torch wants one that fits the Python at hand, and no finding depends on it."""
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stderr
    code = path.read_text().partition("\nset -euo pipefail\n")[2]
    assert "zokern" not in code
    assert re.search(r"exit 1|assert ", code), "it cannot fail"
    assert re.search(r"\w==(\d|\"\$version\")", code), "it installs nothing that is pinned"
    for words in re.findall(r"venv/bin/pip install (.*)", code.replace("\\\n", "")):
        assert [word for word in words.split() if word[0] != "-" and "==" not in word] in ([], ["numpy"])
