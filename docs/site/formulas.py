"""A hook of MkDocs: formulas become MathML, which browsers draw without a script.

pymdownx.arithmatex finds `$...$` and `$$...$$` outside of code, and leaves them as TeX in an element of its own.
"""

from __future__ import annotations

import html
import re
from typing import Any
from xml.etree import ElementTree

from latex2mathml import converter
from mkdocs.exceptions import PluginError

FOUND = re.compile(r'<(span|div) class="arithmatex">\s*\\([(\[])(.*?)\\[)\]]\s*</\1>', flags=re.DOTALL)
ARITY = {"mfrac": 2, "msub": 2, "msup": 2, "msubsup": 3, "munder": 2, "mover": 2, "munderover": 3}
ALSO = {r"\arg": r"\operatorname{arg}"}  # of TeX, and unknown to the converter


def mathml(tex: str, *, display: bool = False) -> str:
    """
    Raises:
        ValueError: for what is no formula, and for a command that is not known, which would be shown as it is written.
    """
    for command, same in ALSO.items():
        tex = re.sub(rf"{re.escape(command)}(?![a-zA-Z])", lambda _, same=same: same, tex)
    try:
        made = converter.convert(tex, display="block" if display else "inline")
        tree = list(ElementTree.fromstring(made).iter())
    except Exception as error:  # the converter has a dozen kinds
        raise ValueError(f"{tex!r} is no formula: {type(error).__name__} {error}".rstrip()) from error
    # What it does not refuse: it goes on where braces or arguments are missing, and shows a command as it is written.
    bare = re.sub(r"\\.", "", tex, flags=re.DOTALL)
    opened, closed = bare.count("{"), bare.count("}")
    if opened != closed:
        raise ValueError(f"{tex!r} is no formula: it has {opened} {{ and {closed} }}")
    for one in tree:
        name = one.tag.rpartition("}")[2]
        if name in ARITY and len(one) != ARITY[name]:
            raise ValueError(f"{tex!r} is no formula: {name} has {len(one)} parts of {ARITY[name]}")
    unknown = [one.text for one in tree if one.text and "\\" in one.text]
    if unknown:
        raise ValueError(f"{tex!r} has commands that are not known: {', '.join(unknown)}")
    return made


def on_page_content(content: str, *, page: Any, **rest: Any) -> str:
    """
    Raises:
        PluginError: naming the page of a formula that is not understood.
    """

    def drawn(found: re.Match[str]) -> str:
        try:
            made = mathml(html.unescape(found[3]).strip(), display=found[2] == "[")
        except ValueError as error:
            raise PluginError(f"{page.file.src_uri}: {error}") from error
        return f'<{found[1]} class="formula">{made}</{found[1]}>'

    return FOUND.sub(drawn, content)
