"""In-context learning: no weight is tuned; the prompt begins with examples and their words.

Each example is a training sentence in the template with its word, with an empty line behind it. The examples are the same
for all test sentences, so their keys and values are read once and used by each of them: a test sentence then costs its own
tokens, not the some 500 of the whole prompt.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.llm import reviews
from benchmarks.llm.packed import Reviews
from zokern.finetune.data import TextSet
from zokern.finetune.packer import accepts

EXAMPLES = 16
BETWEEN = "\n\n"
TOGETHER = 16  # sentences of a forward


def examples(train: TextSet, seed: int, count: int = EXAMPLES) -> str:
    """The beginning of a prompt: of each label count / 2 training texts, chosen and ordered by `seed`."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train), generator=draw).tolist()
    chosen: list[int] = []
    for label in range(len(reviews.WORDS)):
        chosen += [i for i in order if train.targets[i] == label][: count // len(reviews.WORDS)]
    if len(chosen) < count:
        raise ValueError(f"the training set has only {len(chosen)} of the {count} examples, as many of each label")
    mixed = [chosen[i] for i in torch.randperm(count, generator=draw).tolist()]
    told = [f"{asked(train.texts[i])} {reviews.WORDS[train.targets[i]]}" for i in mixed]
    return "".join(text + BETWEEN for text in told)


def asked(text: Any) -> str:
    return reviews.TEMPLATE.format(text=text)


def split(rows: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """The tokens that all rows begin with, and what each has beyond them, at least one token."""
    most = min(map(len, rows)) - 1
    same = next((i for i in range(most) if len({row[i] for row in rows}) > 1), most)
    return rows[0][:same], [row[same:] for row in rows]


@torch.no_grad()
def logits(task: Reviews, rows: list[list[int]]) -> tuple[Tensor, int]:
    """(rows, 2), in float32, of the two words after each row; how many tokens were read once for all."""
    shared, rest = split(rows)
    model: Any = task.model
    known = model(input_ids=torch.tensor([shared]), use_cache=True, logits_to_keep=1).past_key_values
    by_length = sorted(range(len(rest)), key=lambda i: len(rest[i]))
    found = torch.empty(len(rows), len(task.words))
    for start in range(0, len(rest), TOGETHER):
        part = by_length[start : start + TOGETHER]
        found[part] = _after(task, known, len(shared), [rest[i] for i in part])
    return found, len(shared)


def _after(task: Reviews, known: Any, shared: int, rows: list[list[int]]) -> Tensor:
    """Rows that go on after tokens whose keys and values are known; padded on the right, where no real token looks."""
    lengths = torch.tensor([len(row) for row in rows])
    width, shortest = int(lengths.max()), int(lengths.min())
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    seen = torch.arange(shared + width) < shared + lengths[:, None]
    own = copy.deepcopy(known)  # the forward appends to it
    own.batch_repeat_interleave(len(rows))
    model: Any = task.model
    past = "cache" if accepts(model, "cache") else "past_key_values"  # its name in transformers 5.24 and before
    out = model(
        input_ids=ids, attention_mask=seen.long(), position_ids=torch.arange(shared, shared + width).expand(len(rows), -1),
        use_cache=True, logits_to_keep=width - shortest + 1, **{past: own},
    ).logits  # fmt: skip
    last: Tensor = out[torch.arange(len(rows)), lengths - shortest]
    return last.index_select(1, task.words).float()


def evaluate(task: Reviews, part: str, seed: int) -> dict[str, Any]:
    """Loss and accuracy on a set, with examples drawn by `seed`. tokens: of the examples. seconds: for the whole set."""
    begun = time.perf_counter()
    tokenizer: Any = task.tokenizer
    first, texts = examples(task.texts["train"], seed), task.texts[part]
    found, tokens = logits(task, tokenizer([first + asked(text) for text in texts.texts])["input_ids"])
    targets = torch.tensor(texts.targets)
    return {
        "seed": seed, "accuracy": (found.argmax(1) == targets).float().mean().item(),
        "loss": F.cross_entropy(found, targets).item(), "tokens": tokens, "seconds": time.perf_counter() - begun,
    }  # fmt: skip
