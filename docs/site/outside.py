"""A hook of MkDocs: what pages link to outside of docs/ gets a page too, so the site has all that it speaks of.

A text file becomes a page of highlighted code, data are copied. README.md is the first page, and the other
pages of the root are pages as they are. In
the sources a link stays what it is on GitHub, a relative path.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
DATA = (".json", ".csv", ".png", ".svg")
LANGUAGES = {
    "py": "python", "pyi": "python", "sh": "bash", "h": "cpp", "cpp": "cpp", "cu": "cuda", "cuh": "cuda", "md": "markdown",
    "toml": "toml", "yml": "yaml",
}  # fmt: skip
# Code is matched first, so that a link inside of it is not one.
LINK = re.compile(
    r"(?P<code>^(?P<fence>```+|~~~+).*?^(?P=fence)[ \t]*$|(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`))"
    r"|(?P<comment>^<!-- .*? -->$)"
    r"|(?P<before>\]\(\s*|^\[[^\]\n]+\]:[ \t]*)(?P<target>[^\s)#]+)",
    flags=re.DOTALL | re.MULTILINE,
)


def is_ours(target: str) -> bool:
    return not re.match(r"[a-z][a-z+.-]*:|/", target)


class Links:
    """Of one page. path: of its file, from the root; src_uri: of the page, from docs/."""

    def __init__(self, root: Path, src_uri: str) -> None:
        at_root = {page: name for name, page in ROOT_PAGES.items() if (root / name).exists()}
        self.root, self.src_uri = root, src_uri
        self.path = at_root.get(src_uri, f"docs/{src_uri}")

    def linked(self, target: str) -> str:
        """The path from the root."""
        return posixpath.normpath(posixpath.join(posixpath.dirname(self.path), target))

    def page_of(self, target: str) -> str:
        """Where the site has it, from docs/.

        Raises:
            PluginError: naming the page, where there is no such file.
        """
        path = self.linked(target)
        if path in ROOT_PAGES:
            return ROOT_PAGES[path]
        if path.startswith("docs/") and not path.endswith(".py"):
            path = re.sub(r"\.ipynb$", ".md", path)  # of notebooks.py
            return path.removeprefix("docs/")  # MkDocs itself looks whether it is there
        if path.startswith("../") or not (self.root / path).is_file():
            raise PluginError(f"{self.path} links to {target}, and there is no file {path}")
        return f"source/{path}" if path.endswith(DATA) else f"source/{path}.md"

    def each(self, text: str) -> Iterator[str]:
        for found in LINK.finditer(text):
            if found["target"] and is_ours(found["target"]):
                yield found["target"]

    def rewritten(self, text: str) -> str:
        def one(found: re.Match[str]) -> str:
            if found["comment"]:
                return ""  # the marks of tables that are made from code; a paragraph ends there, as on GitHub
            if not found["target"] or not is_ours(found["target"]):
                return found[0]
            return found["before"] + posixpath.relpath(
                self.page_of(found["target"]), posixpath.dirname(self.src_uri) or "."
            )

        return LINK.sub(one, text)


def code_page(path: str, text: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    language = LANGUAGES.get(path.rpartition(".")[2], "text")
    head = f"---\ntitle: {path}\nsearch:\n  exclude: true\n---\n\n# `{path}`\n\n"
    return f"{head}{fence}{language}\n{text.rstrip()}\n{fence}\n"


def on_files(files: Any, *, config: Any, **rest: Any) -> Any:
    root = Path(config.config_file_path).parent
    for name, page in ROOT_PAGES.items():
        if (root / name).exists():
            files.append(File.generated(config, page, content=(root / name).read_text()))
    linked: dict[str, str] = {}
    for file in list(files.documentation_pages()):
        links = Links(root, file.src_uri)
        linked.update({links.page_of(target): links.linked(target) for target in links.each(file.content_string)})
    for page, path in sorted(linked.items()):
        if page.startswith("source/") and page.endswith(".md"):
            files.append(File.generated(config, page, content=code_page(path, (root / path).read_text())))
        elif page.startswith("source/"):
            files.append(File.generated(config, page, abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, **rest: Any) -> str:
    if page.file.src_uri.startswith("source/"):
        return markdown
    return Links(Path(config.config_file_path).parent, page.file.src_uri).rewritten(markdown)
