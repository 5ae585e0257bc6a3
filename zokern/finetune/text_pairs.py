"""Two texts as the one row of tokens that an encoder reads, with its own marks between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zokern.finetune.examples import Text, parts
from zokern.finetune.fitting import Cut, fitted
from zokern.finetune.options import FinetuneError

Row = tuple[list[int], list[int]]  # tokens, and which text each is of


def encode(tokenizer: Any, rows: Sequence[Text], max_length: int, cut: int | None) -> tuple[list[Row], Cut]:
    """Each pair as (tokens, types), at most max_length, and how many pairs were cut for that. cut: as of `fitted`."""
    found = _encoded(tokenizer, [parts(row) for row in rows])
    told = Cut.of([len(ids) for ids, _ in found], max_length)
    for i, (ids, _) in enumerate(found):
        if len(ids) > max_length:
            found[i] = _cut(tokenizer, parts(rows[i]), max_length, cut)
    if worst := max((len(ids) for ids, _ in found if len(ids) > max_length), default=0):
        raise FinetuneError(
            f"pairs have up to {worst} tokens without the text that --cut lets give way; --max-length is {max_length}: "
            "raise it, or leave out --cut"
        )
    return found, told


def _cut(tokenizer: Any, pair: Sequence[str], max_length: int, cut: int | None) -> Row:
    def count(texts: Sequence[str]) -> int:
        return len(_encoded(tokenizer, [texts])[0][0])

    return _encoded(tokenizer, [fitted(pair, tokenizer, count, max_length, cut)])[0]


def _encoded(tokenizer: Any, rows: Sequence[Sequence[str]]) -> list[Row]:
    first, second = ([row[i] for row in rows] for i in (0, 1))
    said = tokenizer(first, second, return_token_type_ids=True)
    return list(zip(said["input_ids"], said["token_type_ids"], strict=True))


def are_told_apart(types: Sequence[Sequence[int]], config: Any) -> bool:
    """Whether the tokenizer marks a second text, and the model has an embedding for the mark."""
    most = max(max(row) for row in types)
    size = getattr(config, "type_vocab_size", None)  # XLNet does not say, and takes them
    return most > 0 and (size is None or most < size)
