"""Tables of pages that are made from the code: methods and their settings, the command's options.

python -m docs.from_code            # writes them anew
python -m docs.from_code --check    # changes nothing, and fails where a page is not what it would write
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from benchmarks.pages import update
from zokern.cli.tuning import described
from zokern.finetune import takers
from zokern.finetune.options import Options
from zokern.optim import ENTRIES
from zokern.optim.common import Common
from zokern.optim.registry import Entry
from zokern.settings import REQUIRED, Setting, shown


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def setting(one: Setting) -> tuple[str, ...]:
    default = "" if one.default is REQUIRED else f"`{shown(one.default)}`"
    return f"`{one.name}`", default, one.kind.in_words, one.help


def settings(of: dict[str, Setting]) -> str:
    return table(("setting", "default", "allowed", "what it does"), [setting(one) for one in of.values()])


def own(entry: Entry) -> dict[str, Setting]:
    """What a method declares itself, also where it changes a common setting."""
    return {name: one for name, one in entry.cls.settings.items() if Common.settings.get(name) is not one}


def methods() -> str:
    rows = []
    for name, entry in ENTRIES.items():
        title = f"[{entry.title}](docs/methods/{name}.md)" + (f", {entry.many}" if entry.many else "")
        rows.append((title, f"`zokern.{entry.cls.__name__}`{entry.also}", entry.forwards, entry.passes, entry.state))
    return table(("method", "class", "forwards a step", "passes a step", "state"), rows)


def options() -> str:
    """Those of the run; the methods' are on their pages."""
    fields = {field.name for field in dataclasses.fields(Options)} - set(takers.TAKERS)
    rows = []
    for name, one in described().items():
        if name in fields:
            default = "" if one.default is None else f"`{shown(one.default)}`"
            rows.append((f"`--{name.replace('_', '-')}`", default, one.kind.in_words, one.says))
    return table(("option", "default", "allowed", "what it does"), rows)


def pages() -> dict[str, dict[str, str]]:
    made = {
        "README.md": {"methods": methods()},
        "docs/methods.md": {"settings": settings(Common.settings)},
        "docs/finetune.md": {"options": options()},
    }
    for name, entry in ENTRIES.items():
        if "__init__" not in vars(entry.cls):  # LeZO has MeZO's
            made[f"docs/methods/{name}.md"] = {"settings": settings(own(entry))}
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say which pages are not up to date")
    sys.exit(update(pages(), "../docs/from_code.py", check=parser.parse_args().check))
