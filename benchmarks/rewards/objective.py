"""What run.py climbs: a sentence of an exact form about a thing that is named.

The form: one sentence of six to ten words, which ends as a sentence does and has the thing's own word in it. Whether all of
that holds is what the figures are of; what is climbed are three rewards that say how far a text is from it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

Messages = list[dict[str, str]]
WORDS = 8
NEAR = 2  # words more or less than that are still the form
THINGS = (
    "a cat", "the sea", "a train", "winter", "a violin", "bread", "the moon", "a garden", "a bicycle", "rain", "a mountain",
    "a library", "coffee", "a spider", "a castle", "the sun", "a river", "a clock", "an apple", "snow", "a bridge",
    "a horse", "a lamp", "a forest", "a letter", "the wind", "a piano", "a market", "tea", "a lighthouse", "a pencil",
    "autumn", "a dog", "a ship", "the desert", "a candle", "music", "a farmer", "a school", "honey", "a window", "a road",
    "the night", "a doctor", "a mirror", "an island", "a painter", "cheese", "a volcano", "a song", "a whale", "a stone",
    "spring", "a kitchen", "a camera", "an owl", "salt", "a valley", "a soldier", "a hat", "a rabbit", "thunder", "a tower",
    "a river boat", "a rose", "a storm", "a teacher", "a cloud", "a ladder", "an orange", "a beach", "a drum", "a harbour",
    "a blanket", "a planet", "a frog", "a door", "a kite", "a glacier", "ice",
)  # fmt: skip
PARTS = {"train": slice(0, 40), "validation": slice(40, 56), "test": slice(56, 80)}


def rows(part: str) -> list[dict[str, Any]]:
    """Of a data set: the prompt, and the word that has to be in the answer."""
    return [
        {"prompt": [{"role": "system", "content": "Be brief."},
                    {"role": "user", "content": f"Write one sentence about {thing}."}],
         "word": thing.split()[-1]}
        for thing in THINGS[PARTS[part]]
    ]  # fmt: skip


def text(completion: Messages) -> str:
    return completion[0]["content"]


def brief(completions: Sequence[Messages], **_: Any) -> list[float]:
    """1 for eight words, 0 for twenty-four, 0.5 for none."""
    return [1.0 - min(abs(len(said.split()) - WORDS) / (2 * WORDS), 1.0) for said in map(text, completions)]


def one_sentence(completions: Sequence[Messages], **_: Any) -> list[float]:
    """Whether it ends as a sentence does, and nowhere before."""
    return [float(_ends(said) == 1 and said.rstrip()[-1:] in tuple(".!?")) for said in map(text, completions)]


def names_it(completions: Sequence[Messages], word: Sequence[str], **_: Any) -> list[float]:
    """Whether the thing's word is in it, or one that begins with it."""
    return [
        float(re.search(rf"\b{re.escape(one)}", text(said), re.IGNORECASE) is not None)
        for said, one in zip(completions, word, strict=True)
    ]


def exact(completions: Sequence[Messages], word: Sequence[str], **_: Any) -> list[float]:
    """Whether it has the form."""
    near = [abs(len(text(said).split()) - WORDS) <= NEAR for said in completions]
    both = zip(near, one_sentence(completions), names_it(completions, word), strict=True)
    return [float(close and ends == names == 1.0) for close, ends, names in both]


def _ends(said: str) -> int:
    """Of sentences."""
    return len(re.findall(r"[.!?]+(?=\s|$)", said))


REWARDS = {"brief": brief, "one_sentence": one_sentence, "names_it": names_it, "exact": exact}
WEIGHTS = {"exact": 0.0}  # it is looked at, and not climbed
