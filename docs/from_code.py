"""Parts of pages that are made from the code: methods and their settings, the command's options, heads of findings/.

python -m docs.from_code            # writes them anew
python -m docs.from_code --check    # changes nothing, and fails where a page is not what it would write
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable

from benchmarks.parts import table, write
from docs.findings import findings
from docs.released import RECIPES, released
from zokern.cli.tuning import described
from zokern.finetune import takers
from zokern.finetune.options import Options
from zokern.optim import ENTRIES
from zokern.optim.common import Common
from zokern.optim.registry import Entry
from zokern.settings import REQUIRED, Setting, shown
from zokern.tasks.presets import PRESETS


def setting(one: Setting) -> tuple[str, ...]:
    default = "" if one.default is REQUIRED else f"`{shown(one.default)}`"
    name = f"`{one.name}`" + (f" ({', '.join(f'`--{part}`' for part in one.parts)})" if one.parts else "")
    return name, default, one.kind.in_words, one.help.replace("|", "\\|")


def settings(of: dict[str, Setting]) -> str:
    return table(("setting", "default", "allowed", "what it does"), map(setting, of.values()))


def own(entry: Entry) -> dict[str, Setting]:
    """What a method declares itself, also where it changes a common setting."""
    return {name: one for name, one in entry.cls.settings.items() if Common.settings.get(name) is not one}


def methods() -> str:
    rows = []
    for name, entry in ENTRIES.items():
        title = f"[{entry.title}](methods/{name}.md)" + (f", {entry.many}" if entry.many else "")
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


def tasks() -> str:
    """The presets of --task."""
    rows = []
    for name, one in PRESETS.items():
        said = ", ".join(one.words.values()) or (f"candidates: {one.choices}" if one.choices else "written")
        prompt = one.template.replace("\n", " / ")
        rows.append((f"`{name}`", one.about, f"`{prompt}`", said, one.metric.replace("_", " "), f"`{one.hub}`"))
    return table(("`--task`", "asks", "prompt (a / is a line break)", "answers", "metric", "on the hub"), rows)


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "docs/methods.md": {"methods": methods, "settings": lambda: settings(Common.settings)},
    "docs/finetune.md": {"options": options, "tasks": tasks},
    "docs/findings.md": {"findings": findings},
    **{
        f"docs/methods/{name}.md": {
            "settings": lambda entry=entry: settings(own(entry)),
            **({"released": lambda name=name: released(name)} if any(one.page == name for one in RECIPES) else {}),
        }
        for name, entry in ENTRIES.items()
        if "__init__" not in vars(entry.cls)  # LeZO has MeZO's
    },
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, and fail where a page is not up to date")
    check = parser.parse_args().check
    wrong = [page for page, parts in PAGES.items() if not write(page, parts, check=check)]
    if check and wrong:
        sys.exit(f"not what this would write: {', '.join(wrong)}; run python -m docs.from_code")
