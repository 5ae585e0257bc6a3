"""An extension of griffe: short docstrings say what arguments or fields are in running text, "sync: seconds between waits.
lag: ...". On a page their names are set as code, so that they are found.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

STARTS = re.compile(r"(?:(?<=^)|(?<=[.;] ))(?P<names>\w+(?:, \w+)*): (?=\S)", flags=re.MULTILINE)


def marked(text: str, known: set[str]) -> str:
    """Where a sentence, or a line that is not indented, begins with names that are known and a colon."""

    def one(found: re.Match[str]) -> str:
        names = found["names"].split(", ")
        return f"{', '.join(f'`{name}`' for name in names)}: " if known.issuperset(names) else found[0]

    return STARTS.sub(one, text)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **rest: Any) -> None:
        if obj.docstring is None or not isinstance(obj, griffe.Function | griffe.Class):
            return
        known = {*obj.members, *(one.name for one in obj.parameters)}
        text, section, rest_of_it = obj.docstring.value.partition("\nArgs:\n")
        obj.docstring.value = marked(text, known) + section + rest_of_it
