"""A hook of MkDocs: a notebook in docs/ becomes a page like any other, so its links are checked and its text is found.

nbconvert makes Markdown of it, with the outputs that are stored in it; nothing runs. Its pictures become files beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
from mkdocs.structure.files import File
from nbconvert import MarkdownExporter


def on_files(files: Any, *, config: Any, **rest: Any) -> Any:
    for file in [one for one in files if one.src_uri.endswith(".ipynb")]:
        name = file.src_uri.removesuffix(".ipynb")
        notebook = nbformat.read(Path(file.abs_src_path), as_version=4)
        text, made = MarkdownExporter().from_notebook_node(notebook, {"output_files_dir": name.rpartition("/")[2]})
        for path, content in made["outputs"].items():
            files.append(File.generated(config, str(Path(file.src_uri).parent / path), content=content))
        files.append(File.generated(config, f"{name}.md", content=text))
    return files
