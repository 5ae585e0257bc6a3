"""The sentences: film reviews that twenty people rated, as `zokern finetune --data movie-snippets` has them, cut into the
three sets of MeZO's protocol.
"""

from __future__ import annotations

import hashlib

from zokern.finetune.data import TextSet
from zokern.finetune.embedded import TEXTS, movies

LABELS, TEMPLATE = movies.LABELS, TEXTS[movies.NAME].template
WORDS = tuple(TEXTS[movies.NAME].words[label] for label in LABELS)
SIZES = {"train": 1000, "validation": 500, "test": 1000}


def read() -> dict[str, TextSet]:
    """The three sets, the same for everybody: chosen by a hash of the sentence. Raises FinetuneError."""
    sure = dict(movies.sentences())  # of a sentence that stands there twice the last rating counts
    texts = sorted(sure, key=lambda text: hashlib.sha256(text.encode()).digest())
    sets, start = {}, 0
    for name, size in SIZES.items():
        part = texts[start : start + size]
        sets[name], start = TextSet([*part], [LABELS.index(sure[text]) for text in part]), start + size
    return sets
