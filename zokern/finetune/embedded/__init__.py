"""Models and texts that the command knows by name, each from a Python package whose hash is pinned here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from zokern.finetune.embedded import docstrings, movies

MODELS = ("demo", "smollm2")


@dataclass(frozen=True)
class Texts:
    """A set of texts, each with a label. source: what it is, for a person. read: (text, label) pairs; raises ValueError.
    descriptions: a sentence about each label, for `similarity`. template, words: what `prompt` takes by default; ""
    and {}: as for any other data.
    """

    source: str
    read: Callable[[], list[tuple[str, str]]]
    descriptions: Mapping[str, str]
    template: str = ""
    words: Mapping[str, str] = field(default_factory=dict)


TEXTS = {
    "docstrings": Texts("docstrings of the Python standard library", docstrings.sentences, docstrings.DESCRIPTIONS),
    movies.NAME: Texts(
        "sentences of film reviews",
        movies.sentences,
        {"negative": "The critic finds the film bad.", "positive": "The critic finds the film good."},
        "{text} It was",
        {"negative": "terrible", "positive": "great"},
    ),
}
