"""Figures in pages: what lies between `<!-- name: begin -->` and `<!-- name: end -->` is made from stored results."""

from __future__ import annotations

import re
from collections.abc import Mapping


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
