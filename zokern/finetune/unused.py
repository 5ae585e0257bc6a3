"""Options that a run's objective has no use for: they are told, as a run goes on without them."""

from __future__ import annotations

from zokern.finetune.examples import PROMPTED
from zokern.finetune.options import Options, flag
from zokern.kinds import placeholders

_LABELLED = ("similarity", "classifier", "prompt", "image")
_TEXTS = ("similarity", "classifier", *PROMPTED)
_SERVES = {
    "image_column": ("image",), "label_column": (*_LABELLED, "choices"), "label_order": _LABELLED,
    "unlabelled": (*_LABELLED, "choices"), "max_answer": ("answer",), "temperature": ("similarity",),
    "text_column": _TEXTS, "max_length": _TEXTS, "template": PROMPTED, "space": PROMPTED,
}  # fmt: skip


def notes(asked: Options, options: Options) -> list[str]:
    """One line for each option without effect. asked: as given; options: with --task's, and an objective that is not auto.

    Options that are refused with another objective (examples.check) are not looked at.
    """
    given = [name for name in _SERVES if asked.changed(name)]
    found = [
        f"{_flag(name, asked)} has no effect: it is for --objective {' or '.join(_SERVES[name])}, and the objective is "
        f"{options.objective}"
        for name in given
        if options.objective not in _SERVES[name]
    ]
    if "text_column" in given and options.objective in PROMPTED and "text" not in placeholders(options.template):
        found.append("--text-column has no effect: --template does not name {text}")
    return found


def _flag(name: str, asked: Options) -> str:
    return flag(f"no_{name}" if getattr(asked, name) is False else name)
