"""The objective of a language model that the options ask for."""

from __future__ import annotations

from typing import Any

from torch import nn

from zokern.finetune import examples
from zokern.finetune.answering import Answers
from zokern.finetune.framing import Frame
from zokern.finetune.options import Options
from zokern.finetune.prompts import Prompt
from zokern.finetune.scored import Choices, Spoken
from zokern.finetune.tasks import Task


def task(options: Options, model: nn.Module, tokenizer: Any, labels: list[str], words: list[str], limit: int) -> Task:
    """options.objective: prompt, choices or answer. words: of the labels. limit: of the model, in tokens."""
    config: Any = model.config
    encoder = bool(getattr(config, "is_encoder_decoder", False))
    given: dict[str, Any] = {"space": options.space, "cut": examples.cut_place(options), "chat": options.chat}
    if options.objective == "prompt" and not encoder:
        return Prompt(model, tokenizer, labels, options.max_length, options.template, words, limit=limit, **given)
    frame = Frame(tokenizer, options.template, options.max_length, encoder=encoder, **given)
    if options.objective == "choices":
        return Choices(model, tokenizer, frame, limit, labels)
    if options.objective == "answer":
        return Answers(model, tokenizer, frame, limit, options.max_answer)
    return Spoken(model, tokenizer, frame, limit, labels, words)
