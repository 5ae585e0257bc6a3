"""The reference in docs/api: what mkdocstrings makes pages of."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import griffe
import pytest
from mkdocs.config import load_config

import zokern
from docs.site import constructors, docstrings

ROOT = Path(__file__).parents[2]
API = sorted((ROOT / "docs" / "api").glob("*.md"))


def named_by(path: str) -> Any:
    parts = path.split(".")
    for i in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for part in parts[i:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"there is no {path}")


def test_every_public_name_is_in_the_reference() -> None:
    text = "\n".join(page.read_text() for page in API)
    assert "`zokern.__version__`" in text
    paths = re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)
    documented = [named_by(path) for path in paths if ".integrations." not in path]  # these load frameworks
    for module in (zokern, zokern.journal):
        left_out = [name for name in module.__all__ if not any(one is getattr(module, name) for one in documented)]
        assert set(left_out) <= {"__version__"}, module.__name__


@pytest.fixture(scope="module")
def package() -> Any:
    """As mkdocstrings reads it."""
    config = load_config(str(ROOT / "mkdocs.yml"))
    options = config.plugins["mkdocstrings"].config["handlers"]["python"]["options"]
    extensions = griffe.load_extensions(*(str(ROOT / path) for path in options["extensions"]))
    return griffe.GriffeLoader(search_paths=[ROOT], extensions=extensions).load("zokern")


def test_members_that_the_reference_lists_are_there(package: Any) -> None:
    """One that is not would be left out without a word."""
    seen = 0
    for page in API:
        for path, options in re.findall(r"^::: zokern\.(\S+)\n((?:    .*\n)+)", page.read_text(), flags=re.MULTILINE):
            for names in re.findall(r"      members: \[(.*)\]", options):
                assert [name for name in names.split(", ") if name not in package[path].all_members] == [], path
                seen += 1
    assert seen >= 5


def test_a_methods_reference_has_its_true_signature_and_its_own_settings(package: Any) -> None:
    for cls in (zokern.HiZOO, zokern.ES, zokern.LeZO):
        seen = package[cls.__name__]
        given = {one.name: one.default for one in seen.parameters if one.name != "self"}
        assert list(given) == list(inspect.signature(cls).parameters)
        assert "    placement: " not in seen.docstring.value
    assert {name: given[name] for name in ("model", "num_dropped")} == {"model": None, "num_dropped": None}
    hizoo = package["HiZOO"]
    assert hizoo.parameters["lr"].default is None
    assert hizoo.parameters["eps"].default == "0.001"
    assert "    smoothing: " in hizoo.docstring.value
    assert constructors.LIKE_ALL in hizoo.docstring.value
    assert "    maximize: " in package["ES"].docstring.value  # another default than the common one
    assert "    placement: " in package["optim.ZerothOrderOptimizer"].docstring.value


def test_names_in_running_text_of_the_reference_are_code(package: Any) -> None:
    assert "\n\n`optimizer`: with the weights" in package["journal.append"].docstring.value
    assert "\n\n`rows`: every" in package["checking.Result"].docstring.value


def test_names_in_running_text_are_set_as_code() -> None:
    text = "A file.\n\nsync: seconds. lag, force: as there. other: no name. Note: sync: no\n    sync: indented"
    told = "A file.\n\n`sync`: seconds. `lag`, `force`: as there. other: no name. Note: sync: no\n    sync: indented"
    assert docstrings.marked(text, {"sync", "lag", "force"}) == told
