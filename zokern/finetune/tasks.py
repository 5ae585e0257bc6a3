"""The objectives: what the model's outputs must say for a text to count as classified, as one matrix of class logits.

Each task tokenises once, cuts batches, and turns a batch into logits (texts, classes); the loss is their cross entropy.
`logits` is all that runs inside the optimizer's closure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zokern.finetune import text_pairs
from zokern.finetune.batches import Batch, Group, Rows, cut
from zokern.finetune.checkpoints import check_tokens
from zokern.finetune.data import TextSet
from zokern.finetune.examples import Text
from zokern.finetune.fitting import Cut
from zokern.finetune.options import FinetuneError
from zokern.finetune.packed_attention import Unpackable
from zokern.finetune.packer import Packer, accepts, proven
from zokern.tasks import metrics
from zokern.tasks.metrics import Metric


class Judged(NamedTuple):
    """What a model says of a batch, what is right, and the sum of the losses, a scalar. said: classes, or texts."""

    said: Tensor | list[str]
    asked: Any
    loss: Tensor


class Task:
    """Common part of the objectives. sets[name] holds the tokenised texts of the set `name` ("train" or "eval").

    cuts[name]: how many of them were longer than max_length. empty[name]: how many have no token and are left out. room:
    how many of the model's tokens a text may not have.
    """

    room = 0
    metric: Metric = metrics.METRICS["accuracy"]
    settings: list[str] | None = None  # what else the model's input depends on
    by_metric = False  # whether a step makes minus the metric smaller
    packs = False  # whether rows may be packed
    reads_logits = True  # whether logits are read then; else hidden states
    packer: Packer | None = None  # where rows are packed

    def __init__(self, model: nn.Module, tokenizer: Any, labels: list[str], max_length: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.labels = labels
        self.max_length = max_length
        self.device = next(model.parameters()).device
        self.sets: dict[str, tuple[Rows, list[int]]] = {}
        self.cuts: dict[str, Cut] = {}
        self.empty: dict[str, int] = {}
        self.notes: list[str] = []  # what else the run is to say

    def add(self, name: str, texts: TextSet) -> None:
        """Tokenise a set once, for the whole run."""
        tokens, targets = self._tokenise(name, texts)
        self.sets[name] = (self._pack(tokens), targets)

    def batch(self, name: str, wanted: Sequence[int]) -> Batch:
        """The texts with the indices `wanted` of a set, ready for `logits`."""
        rows, targets = self.sets[name]
        return cut(rows, wanted, [targets[i] for i in wanted])

    def batches(self, name: str, wanted: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """Several batches, to be evaluated one after another with the same weights."""
        return (self.batch(name, one) for one in wanted)

    def pack(self) -> None:
        """From here on rows are packed. Raises Unpackable where that is not possible."""
        rows = [rows for rows, _ in self.sets.values()]
        self.packer = proven(self.model, rows, scores=self.reads_logits)

    def logits(self, batch: Batch) -> Tensor:
        """(texts, classes), in float32."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross entropy of a batch, a scalar."""
        return F.cross_entropy(self.logits(batch), batch.targets)

    def aim(self, batch: Batch) -> Tensor:
        """What a step makes smaller: the loss, or minus the metric of the batch, a scalar."""
        if not self.by_metric:
            return self.loss(batch)
        return torch.tensor(-self.measured(*self.told(self.judged(batch, loss=False))), device=self.device)

    def judged(self, batch: Batch, *, loss: bool = True) -> Judged:
        """What the model says of a batch, and the sum of the losses; where `loss` is not wanted, maybe 0."""
        logits = self.logits(batch)
        return Judged(logits.argmax(1), batch.targets, F.cross_entropy(logits, batch.targets, reduction="sum"))

    def told(self, judged: Judged) -> tuple[list[Any], list[Any]]:
        """(predictions, references) as the metric takes them. A device is waited for."""
        assert isinstance(judged.said, Tensor)
        said, asked = ([self.labels[i] for i in classes.tolist()] for classes in (judged.said, judged.asked))
        return said, asked

    def measure(self, metric: Metric) -> None:
        """Another metric than the objective's own. Raises FinetuneError where it does not fit."""
        self.check_metric(metric)
        self.metric = metric

    def measured(self, predictions: list[Any], references: list[Any]) -> float:
        """The metric. Raises FinetuneError for what it does not take, or where it gives no number."""
        try:
            return self.metric(predictions, references)
        except (TypeError, ValueError) as error:
            raise FinetuneError(f"--metric {self.metric.name}: {error}") from error
        except Exception as error:  # of a function of the user's
            raise FinetuneError(f"--metric {self.metric.name} failed ({type(error).__name__}: {error})") from error

    def check_metric(self, metric: Metric) -> None:
        """Raises FinetuneError for a metric that does not compare what this objective says."""
        if metric.of == metrics.TEXTS:
            raise FinetuneError(
                f"--metric {metric.name} compares texts, and the labels are classes; take accuracy, macro_f1 or matthews"
            )

    def notice(self, predictions: Sequence[Any]) -> None:
        """Looks at all predictions of an evaluation, and warns of what is strange."""

    def lengths(self, name: str) -> list[int]:
        """Of each text, its tokens."""
        rows, targets = self.sets[name]
        return rows.lengths[: len(targets)]

    def hashed(self, name: str) -> list[Rows]:
        """What the model reads of a set."""
        return [self.sets[name][0]]

    def _tokenise(self, name: str, texts: TextSet) -> tuple[list[list[int]], list[int]]:
        """(rows of tokens, targets) of the texts that have any token."""
        tokens, self.cuts[name] = self._tokens(texts.texts)
        if all(tokens):
            return tokens, texts.targets
        kept = [i for i, row in enumerate(tokens) if row]
        if not kept:
            raise FinetuneError(f"{name}: no text has a token that the tokenizer knows")
        self.empty[name] = len(tokens) - len(kept)
        return [tokens[i] for i in kept], [texts.targets[i] for i in kept]

    def _tokens(self, texts: Sequence[Text]) -> tuple[list[list[int]], Cut]:
        assert all(isinstance(text, str) for text in texts), "this objective reads one text a row"
        ids: list[list[int]] = self.tokenizer(list(texts))["input_ids"]
        long = [i for i, row in enumerate(ids) if len(row) > self.max_length]
        cut = Cut.of([len(row) for row in ids], self.max_length)
        if long:
            shorter = self.tokenizer([texts[i] for i in long], truncation=True, max_length=self.max_length)["input_ids"]
            for i, row in zip(long, shorter, strict=True):
                ids[i] = row
        return ids, cut

    def _pack(self, tokens: Sequence[Sequence[int]]) -> Rows:
        check_tokens(self.model, self.tokenizer, {i for row in tokens for i in row}, "a text")
        return Rows.pack(tokens, self.tokenizer.pad_token_id, self.device)


class Classifier(Task):
    """A model with a classification head: its logits as they are. Of pairs the tokenizer makes one row, with its own marks;
    the model is told which text a token is of, where it takes that (BERT and its kin). cut: the place of the text of a pair
    that gives way; None: the longer does.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, labels: list[str], max_length: int, *, cut: int | None = None
    ) -> None:
        super().__init__(model, tokenizer, labels, max_length)
        self.cut = cut

    def add(self, name: str, texts: TextSet) -> None:
        """Tokenise a set once, single texts or pairs."""
        if isinstance(texts.texts[0], str):
            super().add(name, texts)
            return
        said, self.cuts[name] = text_pairs.encode(self.tokenizer, texts.texts, self.max_length, self.cut)
        rows = self._pack([ids for ids, _ in said])
        types = [kinds for _, kinds in said]
        if accepts(self.model, "token_type_ids") and text_pairs.are_told_apart(types, self.model.config):
            rows.types = Rows.pack(types, 0, self.device).ids
        self.sets[name] = (rows, texts.targets)

    def logits(self, batch: Batch) -> Tensor:
        """(texts, classes), in float32."""
        return batch.gather([self._head(group) for group in batch.groups if isinstance(group, Group)])

    def _head(self, group: Group) -> Tensor:
        types = {} if group.types is None else {"token_type_ids": group.types}
        logits: Tensor = self.model(input_ids=group.ids, attention_mask=group.mask, **types).logits
        return logits.float()


def cut_notes(task: Task, limit: int) -> list[str]:
    """A sentence for each set with texts that were cut or have no token. limit: of the model, in tokens."""
    empty = [
        f"{name}: {count} texts left out, as the tokenizer makes nothing of them" for name, count in task.empty.items()
    ]
    return (
        empty
        + [cut.said(name, task.max_length, limit - task.room) for name, cut in task.cuts.items() if cut.count]
        + task.notes
    )


def choose_packing(task: Task, way: str) -> str | None:
    """Has rows packed, where --packing asks for that; returns why not, where `auto` finds that the model does not take it.

    Raises FinetuneError where it does not, and `way` is "always".
    """
    if way == "never" or (way == "auto" and (not task.packs or task.device.type != "cpu")):
        return None
    try:
        if not task.packs:
            raise Unpackable("a head reads whole texts or pictures")
        task.pack()
    except Unpackable as error:
        if way == "always":
            raise FinetuneError(f"--packing always is not possible: {error}; take --packing auto") from error
        return str(error)
    return None


@torch.no_grad()
def evaluate(task: Task, name: str, batch_size: int, between: Callable[[], None] = lambda: None) -> tuple[float, float]:
    """(the task's metric, mean loss) over a set, taken by length: hardly any padding.

    between: called before each batch; it may raise to end the evaluation.
    """
    lengths = task.lengths(name)
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    loss = torch.zeros((), device=task.device)
    found = []
    wanted = [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
    batches = task.batches(name, wanted)
    for _ in wanted:
        between()
        found.append(task.judged(next(batches)))
        loss += found[-1].loss
    told = [task.told(one) for one in found]  # where a device is waited for
    predictions, references = ([value for one in told for value in one[i]] for i in (0, 1))
    task.notice(predictions)
    return task.measured(predictions, references), loss.item() / len(lengths)
