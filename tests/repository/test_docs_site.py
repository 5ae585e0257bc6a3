"""The site of docs/: its nav, and the parts that make it. `make docs` builds the whole of it."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import markdown
import nbformat
import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort, PluginError

from docs.site import formulas, outside

ROOT = Path(__file__).parents[2]
Site = Callable[..., Path]


@pytest.fixture(scope="module")
def config() -> Any:
    return load_config(str(ROOT / "mkdocs.yml"))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Builds a tree of a few files, with all of our configuration but the nav and the reference."""

    css = (ROOT / "docs" / "stylesheets" / "site.css").read_text()

    def built(**files: str) -> Path:
        for name, text in {"docs/stylesheets/site.css": css, **files}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        ours = load_config(
            str(ROOT / "mkdocs.yml"), docs_dir=str(tmp_path / "docs"), site_dir=str(tmp_path / "site"),
            plugins=["material/search"],
        )  # fmt: skip
        ours.nav, ours.config_file_path = None, str(tmp_path / "mkdocs.yml")
        build(ours)
        return tmp_path / "site"

    return built


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    """What MkDocs logs."""
    text = io.StringIO()
    handler, logger = logging.StreamHandler(text), logging.getLogger("mkdocs")
    logger.addHandler(handler)
    yield text
    logger.removeHandler(handler)


def pages_of(nav: Any) -> Iterator[str]:
    for one in nav if isinstance(nav, list) else nav.values():
        if isinstance(one, str):
            yield one
        else:
            yield from pages_of(one)


def test_every_page_is_in_the_nav_once(config: Any) -> None:
    found = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.ipynb")]
    docs = [str(path.relative_to(ROOT / "docs").with_suffix(".md")) for path in found]
    assert sorted(pages_of(config.nav)) == sorted([*docs, *outside.ROOT_PAGES.values()])
    assert config.not_in_nav.match_file("source/examples/mezo.py.md")


# ---------------------------------------------------------------------------------------------------------- formulas


def test_formulas() -> None:
    assert re.sub("<[^>]+>", "", formulas.mathml(r"\eta z_k")) == "&#x003B7;zk"
    assert 'display="block"' in formulas.mathml("x", display=True)
    assert "arg" in formulas.mathml(r"\arg\min_j l_j")


@pytest.mark.parametrize(
    ("tex", "why"),
    [
        (r"\nosuch x", r"not known: \\nosuch"), (r"\text{a", "1 { and 0 }"), (r"\frac{1}", "mfrac has 1 parts of 2"),
        (r"\left( x", "is no formula: ExtraLeft"), ("x_", "is no formula: Missing"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_no_formula(tex: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        formulas.mathml(tex)


def test_a_wrong_formula_fails_with_its_page(site: Site, logged: io.StringIO) -> None:
    with pytest.raises(Abort):
        site(**{"docs/index.md": "# A", "docs/part/page.md": "# B\n\nWith $\\nosuch$."})
    assert r"part/page.md: '\\nosuch' has commands that are not known: \nosuch" in logged.getvalue()


def test_a_dollar_in_code_or_of_money_is_no_formula(config: Any) -> None:
    text = "`$A` or `$B`, $x$, 5 $ or 6 $ and\n\n```sh\necho $C $D\n```\n\n$$y$$\n"
    made = markdown.markdown(text, extensions=config.markdown_extensions, extension_configs=config.mdx_configs)
    assert [(one[1], one[3]) for one in formulas.FOUND.finditer(made)] == [("span", "x"), ("div", "y")]


# --------------------------------------------------------------------------------------------------------- a notebook


def test_a_notebook_is_a_page(site: Site) -> None:
    """Its links lead to pages, also from the README, its outputs are shown, and it can be had itself."""
    pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    v4 = nbformat.v4
    outputs = [v4.new_output("stream", text="six of nine\n"), v4.new_output("display_data", {"image/png": pixel})]
    cells = [v4.new_markdown_cell("# Six\n\n[On](other.md#part), $x$"), v4.new_code_cell("print(6)", outputs=outputs)]
    text = nbformat.writes(v4.new_notebook(cells=cells))
    files = {
        "docs/deep/one.ipynb": text,
        "docs/deep/other.md": "# A\n\n## Part\n",
        "README.md": "[n](docs/deep/one.ipynb)",
    }
    built = site(**files)
    page = (built / "deep" / "one.html").read_text()
    assert 'href="other.html#part"' in page
    assert "<math" in page
    assert "six of nine" in page
    (picture,) = re.findall(r'<img alt="png" src="(one/[^"]+\.png)"', page)
    assert (built / "deep" / picture).read_bytes() == base64.b64decode(pixel)
    assert '<a href="deep/one.html">n</a>' in (built / "index.html").read_text()
    assert json.loads((built / "deep" / "one.ipynb").read_text())["nbformat"] == 4


# ------------------------------------------------------------------------------------------------------ outside docs/


def test_links_to_files_outside() -> None:
    def at(page: str, text: str) -> str:
        return outside.Links(ROOT, page).rewritten(text)

    assert at("methods/es.md", "[a](../noise.md#b) [c](../../examples/mezo.py) [d](https://e.f/g) [h](#i)") == (
        "[a](../noise.md#b) [c](../source/examples/mezo.py.md) [d](https://e.f/g) [h](#i)"
    )
    assert (
        at("noise.md", "![](images/a.png) [b](../tests/data/zk1.json)")
        == "![](images/a.png) [b](source/tests/data/zk1.json)"
    )
    assert at("noise.md", "[a](../README.md) [b](../CHANGELOG.md#c)") == "[a](index.md) [b](changelog.md#c)"
    assert at("contributing.md", "[a](docs/noise.md)\n\n[b]: CHANGELOG.md") == "[a](noise.md)\n\n[b]: changelog.md"
    code = "`[a](../none.py)` and\n```py\nx = '```'\n# [b](../none.py)\n<!-- c: begin -->\n```\n"
    assert at("noise.md", f"{code}\n<!-- c: begin -->\n| d |") == f"{code}\n\n| d |"


def test_a_missing_file_outside_fails_with_the_pages_name(site: Site, logged: io.StringIO) -> None:
    with pytest.raises(PluginError, match=r"docs/noise\.md links to \.\./none\.py, and there is no file none\.py"):
        outside.Links(ROOT, "noise.md").page_of("../none.py")
    with pytest.raises(PluginError, match="there is no file examples"):
        outside.Links(ROOT, "noise.md").page_of("../examples")
    with pytest.raises(Abort):
        site(**{"docs/index.md": "# A", "docs/a.md": "[a](../none.py)"})
    assert "docs/a.md links to ../none.py, and there is no file none.py" in logged.getvalue()


def test_code_with_fences_stays_whole() -> None:
    assert outside.code_page("a.sh", "# ````\n").endswith("\n\n`````bash\n# ````\n`````\n")


@pytest.mark.parametrize("wrong", ["[a](b.md)", "[a](#b)", "[a](part/c.md#d)", "[a](/b.md)"])
def test_a_broken_link_fails(wrong: str, site: Site) -> None:
    with pytest.raises(Abort, match="1 warnings in strict mode"):
        site(**{"docs/index.md": f"# A\n\n{wrong}", "docs/part/c.md": "# C"})


# --------------------------------------------------------------------------------------------------------- what is built

LOADED = re.compile(
    r"""<(?:script|img|iframe|source|link)\b[^>]*?\b(?:src|href)=["']?(?P<tag>[^"'\s>]+)"""
    r"""|url\(["']?(?P<url>[^"')]+)|@import\s+["'](?P<sheet>[^"']+)"""
)


def test_a_small_site(site: Site) -> None:
    """Its links lead to pages of its own, and it loads nothing from another host."""
    built = site(**{
        "docs/index.md": "# A\n\n$x_1$ [b](part/b.md#far-δw-end) [c](../code.py) [d](../d.csv) [e](../CHANGELOG.md)\n",
        "docs/part/b.md": "# B\n\n## Far ΔW end\n\n```python\nprint(1)\n```\n",
        "docs/made.py": "", "docs/site/hook.py": "",
        "code.py": "def f():\n    return 1\n", "d.csv": "1,2\n", "CHANGELOG.md": "# Changes\n\n[f](code.py)\n",
    })  # fmt: skip
    index = (built / "index.html").read_text()
    assert '<span class="formula"><math' in index
    for link in ("part/b.html#far-δw-end", "source/code.py.html", "source/d.csv", "changelog.html"):
        assert f'href="{link}"' in index, link
        assert (built / link.partition("#")[0]).exists()
    assert 'href="source/code.py.html"' in (built / "changelog.html").read_text()
    assert '<span class="nf">f</span>' in (built / "source" / "code.py.html").read_text()
    assert "return" not in (built / "search" / "search_index.json").read_text()
    assert not list(built.rglob("*.py"))
    loaded = [
        (path.name, next(filter(None, found.groups())))
        for path in built.rglob("*")
        if path.suffix in (".html", ".css")
        for found in LOADED.finditer(path.read_text())
    ]
    assert len(loaded) > 20
    assert [one for one in loaded if re.match(r"(?!data:)[a-z]+:|//", one[1])] == []


def test_nothing_asks_the_theme_for_another_host(config: Any) -> None:
    """Its script would fetch mermaid where a page has a diagram, and ask about a repository; its fonts are a host's."""
    assert config.theme["font"] is False
    assert not config.repo_url
    assert not config.extra_javascript
    assert not {"analytics", "polyfills"} & set(config.extra)
    for page in (ROOT / "docs").rglob("*.md"):
        assert "```mermaid" not in page.read_text(), page.name
