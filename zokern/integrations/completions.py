"""Prompts to tokens, tokens to completions: texts, or messages where the prompts are messages."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zokern.integrations.notes import Notes

PROMPT = "prompt"
MAX_NEW_TOKENS = 64
_NOT_HERE = {
    "num_return_sequences": (1, "must be 1: a step has many completions of its own"),
    "max_length": (None, "would count the prompt too; give max_new_tokens"),
    "return_dict_in_generate": (False, "must be left out: completions are all that is read"),
}


class Examples(list):  # type: ignore[type-arg]
    """The rows of a batch. They are repeated whole, whatever is in them; blocks: how often they have been."""

    blocks = 1

    def __mul__(self, count: Any) -> Examples:
        made = Examples(super().__mul__(count))
        made.blocks = self.blocks * count
        return made


class Prompts:
    """Makes batches of rows that have a "prompt", a text or a list of messages: the collator of the trainer.

    tokenizer: its padding token is its end where it has none. room: of the model's positions, for a prompt.

    Raises (when called):
        ValueError, TypeError: for a row without a prompt, or one that is too long.
    """

    def __init__(self, tokenizer: Any, room: int | None) -> None:
        if tokenizer is None:
            raise ValueError("processing_class is missing: give the model's tokenizer")
        self.tokenizer, self.room = tokenizer, room
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise ValueError("processing_class has neither a padding token nor an end; set its pad_token")
            self.tokenizer = copy.deepcopy(tokenizer)
            self.tokenizer.pad_token = tokenizer.eos_token

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
        """input_ids and attention_mask [n, tokens], padded on the left, and the rows themselves."""
        for row in rows:
            if PROMPT not in row:
                raise ValueError(f"the dataset has no column {PROMPT!r}; it has {', '.join(map(repr, row))}")
        texts = [self._text(row[PROMPT]) for row in rows]
        made = self.tokenizer(
            texts, return_tensors="pt", padding=True, padding_side="left",
            add_special_tokens=isinstance(rows[0][PROMPT], str),  # a chat template has its own
        )  # fmt: skip
        nothing = [row[PROMPT] for row, mask in zip(rows, made["attention_mask"], strict=True) if not mask.any()]
        if nothing:
            raise ValueError(
                f"a prompt has no tokens: {nothing[0]!r}; leave it out, or begin it with the tokenizer's bos_token"
            )
        length = made["input_ids"].shape[1]
        if self.room is not None and length > self.room:
            longest = max(rows, key=lambda row: len(self._text(row[PROMPT])))[PROMPT]
            raise ValueError(
                f"a prompt has {length} tokens, and beside max_new_tokens the model has room for {self.room}: "
                f"{str(longest)[:80]!r}; leave it out, or lower max_new_tokens"
            )
        return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"], "rows": Examples(rows)}

    def _text(self, prompt: Any) -> str:
        if isinstance(prompt, str):
            return prompt
        if isinstance(prompt, list) and prompt and all(isinstance(one, Mapping) for one in prompt):
            text: str = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            return text
        raise TypeError(f"a prompt is a {type(prompt).__name__}; it must be a text or a list of messages")


class Writer:
    """Lets the model complete a batch of prompts.

    settings: for transformers' GenerationConfig; what is not in it is as the model's own, but that nothing is sampled
    unless do_sample says so.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: Mapping[str, Any], notes: Notes) -> None:
        from transformers import GenerationConfig

        own = getattr(model, "generation_config", None)
        config = GenerationConfig() if own is None else copy.deepcopy(own)
        config.max_new_tokens, config.use_cache, config.do_sample = MAX_NEW_TOKENS, True, False
        config.pad_token_id = tokenizer.pad_token_id
        if config.eos_token_id is None:
            config.eos_token_id = tokenizer.eos_token_id
        unknown = [name for name in settings if not hasattr(config, name)]
        if unknown:
            raise ValueError(f"generation: GenerationConfig has no {', '.join(map(repr, unknown))}")
        for name, (allowed, why) in _NOT_HERE.items():
            if settings.get(name, allowed) not in (None, allowed):
                raise ValueError(f"generation: {name} {why}")
        try:
            config.update(**settings)
        except ValueError as error:
            raise ValueError(f"generation: {error}") from error
        if config.max_new_tokens is None:
            raise ValueError("generation: max_new_tokens is None; give the most tokens that a completion may have")
        self.config, self.tokenizer, self.notes = config, tokenizer, notes
        self.decoder_only = not getattr(model.config, "is_encoder_decoder", False)
        ends = config.eos_token_id
        self.ends = {ends} if isinstance(ends, int) else set(ends or ())

    @property
    def samples(self) -> bool:
        return bool(self.config.do_sample)

    def write(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[list[Any], list[list[int]]]:
        """Completions of a batch as the model stands, and their tokens without the end."""
        prompts: Tensor = batch["input_ids"]
        generate: Any = model.generate
        out: Tensor = generate(
            input_ids=prompts, attention_mask=batch["attention_mask"], generation_config=self.config,
            tokenizer=self.tokenizer,  # finds stop_strings
        )  # fmt: skip
        out = out[:, prompts.shape[1] :] if self.decoder_only else out[:, 1:]
        ids = [self._until_end(row) for row in out.tolist()]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        rows = batch["rows"]
        self._look(rows, texts)
        spoken = [text if isinstance(row[PROMPT], str) else [{"role": "assistant", "content": text}]
                  for row, text in zip(rows, texts, strict=True)]  # fmt: skip
        return spoken, ids

    def _until_end(self, row: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(row) if token in self.ends), len(row))
        while end and row[end - 1] == self.config.pad_token_id:  # after a stop string there is no end
            end -= 1
        return row[:end]

    def _look(self, rows: list[Any], texts: list[str]) -> None:
        empty = next((row[PROMPT] for row, text in zip(rows, texts, strict=True) if not text), None)
        if empty is not None:
            self.notes.add(
                "empty",
                f"the completion of the prompt {empty!r} is empty: the model ends at once. Its reward is what the "
                "functions give an empty text; further ones are counted in the log, as empty_completions",
            )


def room(model: Any, new_tokens: int) -> int | None:
    """How many tokens a prompt may have; None where the model does not say. An encoder-decoder's are apart."""
    config = getattr(model, "config", None)
    positions = getattr(config, "max_position_embeddings", None)  # and not n_positions, which limits nothing in T5
    if positions is None:
        return None
    return int(positions) if getattr(config, "is_encoder_decoder", False) else int(positions) - new_tokens


def mean(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean()) if values else float("nan")
