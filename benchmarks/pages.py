"""Figures in pages: what lies between `<!-- name: begin -->` and `<!-- name: end -->` is made from stored results."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def load(name: str) -> dict[str, Any]:
    """A stored run, by the name of its file."""
    return json.loads((RESULTS / name).read_text())


def fill(page: str, text: str, parts: Mapping[str, str]) -> str:
    """The text of `page` with each part between its markers made anew."""
    for name, content in parts.items():
        pattern = rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)"
        text, count = re.subn(pattern, lambda m, c=content: f"{m[1]}{c}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(
                f"{page} needs exactly one pair of markers '<!-- {name}: begin -->' and '<!-- {name}: end -->'"
            )
    return text


def update(parts: Mapping[str, Mapping[str, str]], script: str, *, check: bool) -> int:
    """Fills pages, {page: {marker: content}}, named from the checkout's root. The exit code of `script`.

    check: change nothing; say which pages are not what `script` would write, and return 1 if there is one.
    """
    wrong = []
    for page, made in parts.items():
        path = ROOT / page
        old = path.read_text()
        new = fill(page, old, made)
        if new != old:
            wrong.append(page)
            if not check:
                path.write_text(new)
    if check and wrong:
        print(f"disagrees with benchmarks/results: {', '.join(wrong)}; run python benchmarks/{script}")
    return int(check and bool(wrong))
