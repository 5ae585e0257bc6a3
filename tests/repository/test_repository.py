"""What a newcomer runs first: the README's figures and example, the examples, the report."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import pages, parts
from tests import programs

ROOT = Path(__file__).parents[2]


def run(*command: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    # A GPU-less machine's TRITON_INTERPRET of this suite is no business of a fresh process.
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    own = {**inherited, "PYTHONPATH": str(ROOT), **env}  # this source, whatever is installed
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=own, timeout=300)


def test_figures_in_pages_come_from_the_stored_results(capsys: pytest.CaptureFixture[str]) -> None:
    """And every marker in them is one that pages.py fills."""
    assert pages.main(["--check"]) == 0, capsys.readouterr().out
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        marked = re.findall("<!-- (.*): begin -->", page.read_text())
        assert set(marked) == set(pages.PAGES.get(str(page.relative_to(ROOT)), {})), page.name


def test_a_figure_that_is_not_the_stored_one_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = tmp_path / "docs" / "journal.md"
    journal.parent.mkdir()
    right = (ROOT / "docs" / "journal.md").read_text()
    journal.write_text(right.replace("million parameters", "billion parameters"))
    monkeypatch.setattr(parts, "ROOT", tmp_path)
    assert pages.main(["docs/journal.md", "--check"]) == 1
    assert "billion" in journal.read_text()
    assert pages.main(["docs/journal.md"]) == 0
    assert journal.read_text() == right
    journal.write_text(right.replace("<!-- replay: end -->", ""))
    with pytest.raises(SystemExit, match=r"docs/journal\.md needs one pair of markers '<!-- replay: begin -->'"):
        pages.main(["docs/journal.md", "--check"])


PAGES = [
    "README.md",
    *(
        f"docs/{name}.md"
        for name in (
            "accelerate",
            "check",
            "choose",
            "faq",
            "journal",
            "lightning",
            "lora",
            "lowrank",
            "methods",
            "passes",
            "precision",
            "quickstart",
            "trainer",
            "trl",
        )
    ),
]
EXAMPLES = sorted(p.name for p in (ROOT / "examples").glob("*.py"))
ONE_BY_ONE = "import json; own = {'__name__': '__main__'}; [exec(b, own) for b in json.load(open('blocks.json'))]"
APART = "import json; [exec(b, {'__name__': '__main__'}) for b in json.load(open('blocks.json'))]"  # pasted alone


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, programs.Done]:
    """How the pages' blocks and the examples ended."""
    all_of_them = {name: programs.Program([str(ROOT / "examples" / name)]) for name in EXAMPLES}
    for page in PAGES:
        folder = tmp_path_factory.mktemp("page")
        blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
        assert blocks, page
        (folder / "blocks.json").write_text(json.dumps(blocks))
        (folder / "blocks.py").write_text(APART if page == "README.md" else ONE_BY_ONE)
        all_of_them[page] = programs.Program(["blocks.py"], folder)
    return programs.run(all_of_them)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page: str, ended: dict[str, programs.Done]) -> None:
    assert ended[page].code == 0, ended[page].said


@pytest.mark.parametrize("path", EXAMPLES)
def test_examples_run(path: str, ended: dict[str, programs.Done]) -> None:
    assert ended[path].code == 0, ended[path].said


def test_tests_of_every_backend_name_the_device_too() -> None:
    """zokern.noise makes its tensor on the CPU unless it is told otherwise, and there a GPU's backends refuse to run."""
    seen = 0
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(call, ast.Call) and ast.unparse(call.func) == "zokern.noise"):
                continue
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            if not isinstance(given.get("backend", ast.Constant(None)), ast.Constant):
                seen += 1
                assert "device" in given, f"{path.name}:{call.lineno}: backend is given and device is not"
    assert seen >= 4


def test_make_test_built_has_every_test_that_is_left_to_it() -> None:
    """It collects a few files alone, and make test leaves out what is marked, wherever it is."""
    recipe = re.search(r"^\t.* -m built .*?((?: tests/\S+)+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert recipe is not None
    collected = [ROOT / path for path in recipe[1].split()]
    marked = [path for path in (ROOT / "tests").rglob("*.py") if "pytest.mark." + "built" in path.read_text()]
    assert len(marked) == 5
    assert [path for path in marked if not any(path.is_relative_to(place) for place in collected)] == []


def test_links_in_the_docs_lead_somewhere() -> None:
    for page in [
        *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
        *(ROOT / "docs").rglob("*.md"),
    ]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_report_says_what_runs_and_why_the_rest_does_not() -> None:
    done = run(sys.executable, "-m", "zokern", COLUMNS="200")
    assert done.returncode == 0, done.stderr
    assert "ok: same bits as the reference" in done.stdout
    assert "WRONG" not in done.stdout
    assert "it works on CUDA tensors only" in done.stdout


def test_report_notices_wrong_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from zokern import report
    from zokern.backends import cpu
    from zokern.directions import DIRECTIONS
    from zokern.passes.spec import AXPY

    right, wrong = cpu.run, dataclasses.replace(AXPY, direction=DIRECTIONS["rademacher"])
    monkeypatch.setattr(cpu, "run", lambda table, kind, scalars: right(table, wrong, scalars))
    assert report.self_check("cpu", torch.device("cpu")) is not None
