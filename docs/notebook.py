"""Runs docs/notebook.ipynb and stores what it prints and draws.

python -m docs.notebook              # from its first cell to its last, in a new process, two minutes
python -m docs.notebook --output F   # the same, stored elsewhere

A cell that raises, or that zokern warns of, is told, and nothing is stored. What other libraries say on standard error is
left out: it is of the machine. `make lint` looks at the types of the notebook's code.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from rich.console import Console
from rich.progress import Progress

NOTEBOOK = Path(__file__).with_name("notebook.ipynb")
SECONDS = 600  # for a cell
BOX = re.compile(r"[\s─-╿]+")
NUMBER = re.compile(r"\d[\d,.:]*(e[-+]?\d+)?")


def executed(notebook: Any) -> Any:
    """The notebook with the outputs of a run, in a folder of its own.

    Raises:
        nbclient.exceptions.CellExecutionError: with the cell, and what it raised.
        ValueError: for a warning of zokern.
    """
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(NOTEBOOK.name, total=len(code(notebook)))
        NotebookClient(
            notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": folder}},
            record_timing=False, coalesce_streams=True, on_cell_executed=lambda **_: progress.advance(bar),
        ).execute()  # fmt: skip
    for cell in code(notebook):
        for one in cell.outputs:
            if "ZokernWarning" in str(one.get("text", "")):
                raise ValueError(f"zokern warns of a cell:\n{cell.source}\n\n{one['text']}")
        cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def code(notebook: Any) -> list[Any]:
    """Its cells with code."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outline(notebook: Any) -> list[tuple[str, list[tuple[str, str]]]]:
    """(source, [(what kind, what text)]) of each cell with code: numbers, and how wide they make a table, left out."""
    found = []
    for cell in code(notebook):
        told = []
        for one in cell.outputs:
            text = one.get("text") or one.get("data", {}).get("text/plain", "")
            kind = "image" if "image/png" in one.get("data", {}) else one.output_type
            told.append((kind, NUMBER.sub("#", BOX.sub(" ", text)).strip()))
        found.append((cell.source, told))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=NOTEBOOK, metavar="FILE", help="default: the notebook itself")
    options = parser.parse_args(arguments)
    if not options.output.absolute().parent.is_dir():  # said before the run, not after it
        parser.error(f"--output {options.output}: there is no folder {options.output.parent}")
    notebook = executed(nbformat.read(NOTEBOOK, as_version=4))
    nbformat.validate(notebook)
    nbformat.write(notebook, options.output)
    print(f"stored in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
