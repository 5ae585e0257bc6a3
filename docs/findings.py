"""The page of findings, made from the heads of findings/*.sh; docs/from_code.py writes it.

A head is paragraphs of comment lines: a title of one line, what is seen, "It matters to ..." with "What helps: ...",
"In zokern: ...", and "Seen in ...", which names the software with its versions. Below stand the subject and the date.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from benchmarks.parts import ROOT

FOLDER = ROOT / "findings"
SUBJECTS = ("PyTorch, compilers and number formats", "distributed", "fine-tuning frameworks")
WIDTH = 124
_PINNED = re.compile(r"\b[\w-]+==(\d[\w.]*)")
_MARKS = re.compile("(It matters to|What helps:|In zokern:)")
_PAGE = re.compile(r"\bdocs/(\w+)\.md(#[\w-]+)?")


@dataclass(frozen=True)
class Finding:
    """One script's head. versions: the sentences that say in which software it was seen."""

    name: str
    title: str
    seen: str
    matters: str
    here: str
    versions: str
    subject: str
    date: str


def read(path: Path) -> Finding:
    """
    Raises:
        SystemExit: for a head that lacks something, or names other versions than the script installs.
    """

    def need(fine: object, what: str) -> None:
        if not fine:
            raise SystemExit(f"{path.parent.name}/{path.name}: its head {what}")

    head, _, code = path.read_text().partition("\nset -euo pipefail\n")
    lines = [line.removeprefix("#").strip() for line in head.splitlines()[1:]]
    need(code and all(line.startswith("#") for line in head.splitlines()), "does not end with 'set -euo pipefail'")
    date = lines.pop()
    need(re.fullmatch(r"\d{4}-\d\d-\d\d", date), "does not end with a date, as 2026-11-28")
    subject = lines.pop().removeprefix("Subject: ")
    need(subject in SUBJECTS, f"has no line 'Subject: ...' before the date, one of {', '.join(SUBJECTS)}")
    parts = [" ".join(part.split("\n")) for part in "\n".join(lines).split("\n\n")]
    need(
        len(parts) == 5,
        f"has {len(parts)} paragraphs, not 5: title, what is seen, whom it matters to, zokern, software",
    )
    title, seen, matters, here, versions = parts
    need(len(lines[0]) == len(title), "has a title of more than one line")
    need(
        matters.startswith("It matters to ") and "What helps: " in matters, "has no 'It matters to ... What helps: ...'"
    )
    need(here.startswith("In zokern: "), "has no 'In zokern: ...'")
    need(re.match(r"Seen in \S+ .*?\d+\.\d+", versions), "names no software with its version after 'Seen in'")
    apart = sorted(version for version in set(_PINNED.findall(code)) if version not in versions)
    need(not apart, f"does not name what the script installs: {', '.join(apart)}")
    return Finding(path.name, title, seen, matters, here, versions.partition(" Needs ")[0], subject, date)


def shown(one: Finding) -> str:
    matters, here = (_MARKS.sub(r"**\1**", escaped(part)) for part in (one.matters, one.here))
    here = _PAGE.sub(lambda m: f"[{m[1]}]({m[1]}.md{m[2] or ''})", here)
    last = f"{here} {escaped(one.versions)} {one.date}, [script](../findings/{one.name})."
    parts = "\n\n".join(map(wrapped, (escaped(one.seen), matters, last)))
    return f"### {escaped(one.title.removesuffix('.'))}\n{parts}"


def escaped(text: str) -> str:
    """Outside of `code`, a star and an angle bracket as they are: Markdown would take them for its own."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*<])", r"\\\1", part) for part in parts)


def wrapped(text: str) -> str:
    """No line begins as an item of a list does, or a heading."""
    lines = textwrap.wrap(text, WIDTH - 1, break_long_words=False, break_on_hyphens=False)
    return "\n".join(re.sub(r"^(?=[-+#>])", r"\\", line) for line in lines)


def findings() -> str:
    every = [read(path) for path in sorted(FOLDER.glob("*.sh"))]
    parts = []
    for subject in SUBJECTS:
        parts.append(f"## {subject[0].upper()}{subject[1:]}")
        parts += [shown(one) for one in every if one.subject == subject]
    return "\n\n".join(parts)
