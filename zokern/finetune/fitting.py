"""Texts made to fit a number of tokens. What is cut is the text, by its characters, and never anything around it.

Tokens are not characters: a byte-level tokenizer may take several for one, so that decoding a part of them and encoding
it again may give more. Here a text only ever gets shorter, by the offsets of its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cut:
    """count of total texts were cut to max_length tokens; the longest has `longest`, nothing cut."""

    count: int
    total: int
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], max_length: int) -> Cut:
        """From the lengths in tokens."""
        return cls(sum(length > max_length for length in lengths), len(lengths), max(lengths, default=0))

    def said(self, name: str, max_length: int, limit: int) -> str:
        """A sentence. limit: of the model, in tokens."""
        needed = f"--max-length {self.longest} cuts none"
        if self.longest > limit:
            needed = f"the longest has {self.longest} tokens, the model takes {limit}"
        share = 100 * self.count / self.total
        return f"{name}: {self.count} of {self.total} texts ({share:.1f} %) are cut to {max_length} tokens; {needed}"


def fit(text: str, tokenizer: Any, count: Callable[[str], int], limit: int) -> str:
    """The beginning of a text for which count(text) <= limit, nearly the longest; "" where there is none.

    tokenizer: of transformers. count: how many tokens a text comes to, with what is around it.
    """
    length = count(text)
    if length <= limit:
        return text
    starts = _starts(text, tokenizer)
    keep = len(starts)
    while text and length > limit:
        keep -= length - limit  # at least one
        text = text[: starts[keep]].rstrip() if keep > 0 else ""
        length = count(text)
    return text


def fitted(
    texts: Sequence[str], tokenizer: Any, count: Callable[[Sequence[str]], int], limit: int, place: int | None
) -> list[str]:
    """The texts of a row cut so that count(texts) <= limit, as far as that goes.

    place: which of them gives way; None: the longest, down to the same number of tokens.
    """
    if len(texts) > 1 and place is None:
        return _level(texts, tokenizer, count, limit)
    at = place or 0
    before, after = list(texts[:at]), list(texts[at + 1 :])
    return [*before, fit(texts[at], tokenizer, lambda part: count([*before, part, *after]), limit), *after]


def _level(texts: Sequence[str], tokenizer: Any, count: Callable[[Sequence[str]], int], limit: int) -> list[str]:
    starts = [_starts(text, tokenizer) for text in texts]

    def at_most(tokens: int) -> list[str]:
        return [
            text if tokens >= len(begin) else text[: begin[tokens]].rstrip()
            for text, begin in zip(texts, starts, strict=True)
        ]

    low, high = 0, max(map(len, starts))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(at_most(middle)) <= limit else (low, middle - 1)
    return at_most(low)


def _starts(text: str, tokenizer: Any) -> list[int]:
    """For each token of a text the character where it begins: never falling, a character's tokens in one place."""
    said = tokenizer(text, add_special_tokens=False, return_offsets_mapping=bool(tokenizer.is_fast))
    tokens = len(said["input_ids"])
    starts = [begin for begin, _ in said.get("offset_mapping", ())]
    if not any(starts):  # it does not say: as if its tokens were of equal length
        starts = [i * len(text) // tokens for i in range(tokens)]
    for i in range(1, len(starts)):
        starts[i] = max(starts[i], starts[i - 1])
    return starts
