"""The objective of a language model that the options ask for."""

from __future__ import annotations

from typing import Any

from torch import nn

from zokern.finetune import examples
from zokern.finetune.answering import Answers
from zokern.finetune.candidates import Choices, Spoken
from zokern.finetune.framing import Frame
from zokern.finetune.labels import few
from zokern.finetune.options import Options
from zokern.finetune.prompts import Prompt
from zokern.finetune.tasks import Task


def task(options: Options, model: nn.Module, tokenizer: Any, labels: list[str], words: list[str], limit: int) -> Task:
    """options.objective: prompt, choices or answer. words: of the labels. limit: of the model, in tokens."""
    config: Any = model.config
    encoder = bool(getattr(config, "is_encoder_decoder", False))
    given: dict[str, Any] = {"space": options.space, "cut": examples.cut_place(options), "chat": options.chat}
    frame = Frame(tokenizer, options.template, options.max_length, encoder=encoder, **given)
    if options.objective == "choices":
        return Choices(model, tokenizer, frame, limit, labels)
    if options.objective == "answer":
        return Answers(model, tokenizer, frame, limit, options.max_answer)
    made: Task
    if encoder:
        made = Spoken(model, tokenizer, frame, limit, labels, words)
    else:
        made = Prompt(model, tokenizer, labels, options.max_length, options.template, words, limit=limit, **given)
    if all(word.strip().isdecimal() for word in words):
        made.notes.append(
            f"WARNING: the model is to say numbers, {few(words)}, after --template; --verbalizers gives the labels words, "
            f'as {{"{labels[0]}": "bad"}}'
        )
    return made
