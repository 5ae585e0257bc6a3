"""The eleven tasks on which zeroth-order fine-tuning is usually shown (Malladi et al. 2023), a row each.

The prompts are ours, from the tasks' public descriptions. Data is read as the benchmarks publish it, or from the hub
(zokern/tasks/formats.py has the forms).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from zokern.tasks import formats

Row = dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """A task.

    hub: the data set, as --data takes it. rows: makes rows with the columns below of what a file or the hub has. template,
    cut: of a prompt. texts: the columns that a classifier reads, one or a pair; () where no classifier can do the task.
    words: the word of each label, in the order of the classes. choices, answer: columns of the row's own candidates or
    answers. metric: a name of zokern.tasks.metrics.
    """

    about: str
    hub: str
    rows: Callable[[Mapping[str, Any]], Iterator[Row]]
    template: str
    texts: tuple[str, ...] = ()
    cut: str | None = None
    words: Mapping[str, str] = field(default_factory=dict)
    choices: str | None = None
    answer: str | None = None
    metric: str = "accuracy"


_TRUE = {"False": "No", "True": "Yes"}

PRESETS = {
    "sst2": Preset(
        "is a film review good or bad", "nyu-mll/glue:sst2", formats.sst2, "{sentence} The film is", ("sentence",),
        words={"negative": "bad", "positive": "good"},
    ),
    "rte": Preset(
        "does one text follow from another", "aps/super_glue:rte", formats.entailment("rte"),
        "{premise}\nIf that is so, is this true? {hypothesis}\nAnswer:", ("premise", "hypothesis"), "premise",
        {"entailment": "Yes", "not_entailment": "No"},
    ),
    "cb": Preset(
        "does its writer hold a clause to be true", "aps/super_glue:cb", formats.entailment("cb"),
        "{premise}\nIf that is so, is this true? {hypothesis}\nAnswer:", ("premise", "hypothesis"), "premise",
        {"entailment": "Yes", "contradiction": "No", "neutral": "Maybe"},
    ),
    "boolq": Preset(
        "a question to be answered by yes or no", "aps/super_glue:boolq", formats.boolq,
        "{passage}\nQuestion: {question}?\nAnswer:", ("question", "passage"), "passage", _TRUE,
    ),
    "wsc": Preset(
        "does a pronoun stand for a name", "aps/super_glue:wsc.fixed", formats.wsc,
        '{text}\nDoes "{pronoun}" stand for "{name}" here?\nAnswer:', ("text", "name"), "text", _TRUE,
    ),
    "wic": Preset(
        "does a word mean the same in two sentences", "aps/super_glue:wic", formats.wic,
        '{sentence1}\n{sentence2}\nDoes "{word}" mean the same in both sentences?\nAnswer:', ("sentence1", "other"), None,
        _TRUE,
    ),
    "multirc": Preset(
        "is an answer to a question about a passage right", "aps/super_glue:multirc", formats.multirc,
        "{paragraph}\nQuestion: {question}\nSuggested answer: {answer}\nIs it right?", ("paragraph", "claim"), "paragraph",
        _TRUE,
    ),
    "copa": Preset(
        "which of two sentences is the cause or the effect", "aps/super_glue:copa", formats.copa, "{premise} {link}",
        cut="premise", choices="choice1,choice2",
    ),
    "record": Preset(
        "which name is left out of a sentence about a news item", "aps/super_glue:record", formats.record,
        "{passage}\n{query}\nWhat @placeholder stands for:", cut="passage", choices="entities",
    ),
    "squad": Preset(
        "a question about a passage, answered by words of it", "rajpurkar/squad", formats.squad,
        "{context}\nQuestion: {question}\nAnswer:", cut="context", answer="answers", metric="token_f1",
    ),
    "drop": Preset(
        "a question about a passage, answered by counting or comparing", "ucinlp/drop", formats.drop,
        "{passage}\nQuestion: {question}\nAnswer:", cut="passage", answer="answers", metric="token_f1",
    ),
}  # fmt: skip
