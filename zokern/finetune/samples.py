"""A few of the held-out texts, and what the model says of them: figures that one can read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from zokern.finetune.data import TextSet
from zokern.finetune.examples import key
from zokern.finetune.tasks import Task

COUNT, WIDTH, RIGHT = 3, 60, 16  # texts; characters that are shown of one, and of what is right
Said = dict[str, Any]


def places(count: int) -> list[int]:
    """Which of `count` texts: they lie far apart, as a file may be sorted by label."""
    return sorted({count * i // COUNT for i in range(COUNT)})


@torch.no_grad()
def look(task: Task) -> list[Said]:
    """Of each: "said", a label, a candidate's place or a text; "right"; and "share", the probability of what is right, of a
    written answer its tokens' geometric mean. Nothing where texts were left out, as then nobody knows which is which."""
    if task.empty.get("eval"):
        return []
    found = []
    for place in places(len(task.lengths("eval"))):
        batch = task.batch("eval", [place])
        judged = task.judged(batch)
        said, right = task.told(judged)
        share = math.exp(-judged.loss.item())
        found.append({"said": said[0], "right": right[0], "share": share if math.isfinite(share) else None})
    return found


def record(texts: TextSet, before: Sequence[Said], after: Sequence[Said]) -> list[dict[str, Any]]:
    """For run.json: of each text what was said of it before and after."""
    shown = [key(texts.texts[place]) for place in places(len(texts))]
    return [
        {"text": text, "right": last["right"], "before": _only(first), "after": _only(last)}
        for text, first, last in zip(shown, before, after, strict=False)
    ]


def lines(samples: Sequence[dict[str, Any]]) -> list[str]:
    """For a person, one each: what is right, its probability before and after, the text."""
    found = []
    for one in samples:
        right = one["right"][0] if isinstance(one["right"], list) else one["right"]
        before, after = (_percent(one[when]["share"]) for when in ("before", "after"))
        found.append(f'{_short(right, RIGHT):<10} {before:>5} -> {after:>5}  "{_short(one["text"], WIDTH)}"')
    return found


def _only(said: Said) -> Said:
    return {name: said[name] for name in ("said", "share")}


def _short(text: Any, width: int) -> str:
    words = " ".join(str(text).split())
    return words if len(words) <= width else words[: width - 3].rstrip() + "..."


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{100 * share:.0f} %"
