"""`make matrix`: what a cell says of its tests, what is kept of cells, and what the page says of both."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

import benchmarks.matrix
import benchmarks.parts
from tests import outside
from tests.matrix import __main__ as matrix


def test_a_cell_counts_its_tests_and_names_those_that_failed(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text(
        '<testsuites><testsuite><testcase classname="tests.one" name="a"/><testcase classname="tests.one" name="b">'
        '<skipped/></testcase><testcase classname="tests.one" name="c"><failure/></testcase>'
        '<testcase classname="tests.one" name="c"><error/></testcase></testsuite></testsuites>'
    )
    assert outside.counted(tmp_path / "a.xml") == {
        "passed": 1,
        "skipped": 1,
        "failed": ["tests/one::c", "tests/one::c"],
    }


def test_a_command_that_fails_is_told_with_the_end_of_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(outside.Failed, match=r"^sh -c echo .* ended with exit code 3\nthe cause$"):
        outside.run(["sh", "-c", "echo the cause; exit 3"], tmp_path / "log")
    assert (tmp_path / "log").read_text().endswith("the cause\n\n")


def test_how_far_the_tests_are_is_told_in_tenths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = "".join(f"...... [ {percent:2}%]\n" for percent in (3, 12, 15, 22, 97, 100))
    assert outside.run(["printf", lines.replace("%", "%%")], tmp_path / "log", outside.Told()) == lines
    assert [line.split(" ", 1)[1].strip() for line in capsys.readouterr().out.splitlines()] == ["12 %", "22 %", "97 %"]


def broken() -> outside.Cell:
    raise outside.Failed("uv pip install ended with exit code 1\nno wheel of torch")


def test_cells_are_kept_from_call_to_call_and_told_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = argparse.Namespace(output=tmp_path / "matrix.json", tests=["tests/contract"])
    monkeypatch.setattr(benchmarks.matrix, "RESULTS", tmp_path)
    monkeypatch.setattr(benchmarks.parts, "RESULTS", tmp_path)
    assert (benchmarks.matrix.matrix(), benchmarks.matrix.made()) == ("It has not run yet.", "")
    versions = {"python": "3.13.0", **dict.fromkeys(matrix.SHOWN, "1.0"), "torch": "2.8.0+cpu"}
    one = {"versions": versions, "passed": 2000, "skipped": 3, "failed": [], "seconds": 9}

    first = matrix.Kept(options, ["3.12", "3.13"])
    first.add("3.13 newest", lambda: dict(one))
    first.add("3.13 oldest", lambda: {**one, "failed": ["tests/one::c"]})
    assert first.failed
    assert "**Not all of it has run.**" in benchmarks.matrix.made()
    second = matrix.Kept(options, ["3.12", "3.13"])
    second.add("3.12 oldest", lambda: dict(one))
    second.add("3.14", lambda: {"not at hand": "its types were checked"})
    assert not second.failed
    second.add("3.12 newest", broken)
    assert second.failed
    assert list(second.cells) == ["3.12 oldest", "3.12 newest", "3.13 oldest", "3.13 newest", "3.14"]
    assert "Not all" not in benchmarks.matrix.made()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in benchmarks.matrix.matrix().splitlines()[2:]]
    assert lines[0][:3] == ["3.12", "oldest", "2.8.0"]
    assert [line[-1] for line in lines] == [
        "2,000 passed", "uv pip install ended with exit code 1", "2,000 passed, 1 failed", "2,000 passed",
        "not at hand, not run: its types were checked",
    ]  # fmt: skip
    assert len({len(line) for line in lines}) == 1
    other = matrix.Kept(argparse.Namespace(output=options.output, tests=["tests/passes"]), ["3.13"])
    assert other.cells == {}, "cells of other tests are not of the same table"
    assert json.loads(options.output.read_text())["complete"]
