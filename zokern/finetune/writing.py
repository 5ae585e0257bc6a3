"""What a language model writes after prompts: greedily, whatever the checkpoint's generation_config.json asks for.

Virtual tokens go to transformers' generate() here, and not through PEFT's: that (0.21) gives them no place in the cache of
transformers 5, so that it writes other texts than the model's own forward says, or fails.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zokern.finetune import adapted, virtual
from zokern.finetune.options import FinetuneError
from zokern.passes.table import upload

SPECIAL = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id")  # how a text begins


@contextlib.contextmanager
def _plainly(model: Any) -> Iterator[None]:
    """Inside, generate() is greedy: what it is not told, it takes from the model's own configuration, also where it has
    a GenerationConfig too (transformers 5.24; findings/transformers_generation_config_is_filled_up.sh)."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(**{name: getattr(own, name, None) for name in SPECIAL})
    try:
        yield
    finally:
        model.generation_config = own


@torch.no_grad()
def greedily(
    model: Any, prompts: Sequence[list[int]], *, most: int, ends: list[int], padding: int, encoder: bool
) -> list[list[int]]:
    """The tokens that a model writes after each prompt, until one of `ends` or `most` of them; then there may be padding.

    encoder: an encoder reads the prompts.
    """
    written: list[list[int]] = [[] for _ in prompts]
    for rows in _together(model, prompts, most):
        part = _written(model, [prompts[i] for i in rows], most, ends, padding, encoder)
        for i, tokens in zip(rows, part, strict=True):
            written[i] = tokens
    return written


def _together(model: Any, prompts: Sequence[list[int]], most: int) -> list[list[int]]:
    """Which prompts are read in one batch. Attention in a window counts padding: where a prefix would be further away for
    that, only prompts of one length."""
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    longest = virtual.room(model) + max(map(len, prompts)) + most
    if adapted.kind_of(model) != "prefix" or not isinstance(window, int) or longest <= window:
        return [list(range(len(prompts)))]
    rows: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(len(prompt), []).append(i)
    return list(rows.values())


def _written(
    model: Any, prompts: Sequence[list[int]], most: int, ends: list[int], padding: int, encoder: bool
) -> list[list[int]]:
    width = max(map(len, prompts))
    begins = [0 if encoder else width - len(prompt) for prompt in prompts]  # a decoder goes on at the right end
    ids = torch.full((len(prompts), width), padding)
    mask = torch.zeros_like(ids)
    for i, (prompt, begin) in enumerate(zip(prompts, begins, strict=True)):
        place = slice(begin, begin + len(prompt))
        ids[i, place], mask[i, place] = torch.tensor(prompt), 1
    device = next(model.parameters()).device
    given = {"input_ids": upload(ids, device), "attention_mask": upload(mask, device)}
    read = 0 if encoder else width
    if room := virtual.room(model):
        given, read = _behind(model, given, upload(torch.tensor(begins), device), room, padding)
        model = adapted.plain(model)
    with _plainly(adapted.plain(model)):
        found = model.generate(
            **given, max_new_tokens=most, pad_token_id=padding, eos_token_id=ends, do_sample=False, use_cache=True
        )
    written: list[list[int]] = found[:, read:].tolist()
    return written


def _behind(
    model: Any, given: dict[str, Tensor], begins: Tensor, room: int, padding: int
) -> tuple[dict[str, Any], int]:
    """What generate() of the plain model takes for prompts behind virtual tokens, and how much of what it returns was read.

    Each row is padding, virtual tokens and prompt, so that all have the positions that they have in a forward. Those of a
    prefix are in the cache before everything: padding between has no position.
    """
    ids, mask = given["input_ids"], given["attention_mask"]
    tokens: Any = model.get_prompt(batch_size=len(ids))
    if adapted.kind_of(model) == "prefix":
        ahead = torch.full((len(ids), room), padding, device=ids.device)  # generate() leaves out what the cache has
        ids, mask = torch.cat([ahead, ids], 1), torch.cat([torch.ones_like(ahead), mask], 1)
        return {"input_ids": ids, "attention_mask": mask, "past_key_values": tokens}, ids.shape[1]
    text = model.word_embeddings(ids)
    columns = torch.arange(room + ids.shape[1], device=ids.device)
    place = columns - begins[:, None]  # 0: where the virtual tokens begin
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    first = tokens.to(text.dtype)[rows, place.clamp(0, room - 1)]
    both = torch.where((place < room)[..., None], first, text[:, (columns - room).clamp_min(0)])
    return {"inputs_embeds": both, "attention_mask": (place >= 0).to(mask.dtype)}, 0  # nothing of it is returned


def check(model: nn.Module, ends: list[int], padding: int) -> None:
    """Raises FinetuneError for virtual tokens behind which a model cannot write: found by writing one token."""
    if not virtual.room(model):
        return
    try:
        greedily(model, [[ends[0]]], most=1, ends=ends, padding=padding, encoder=False)
    except Exception as error:
        why = str(error).strip() or type(error).__name__
        raise FinetuneError(
            f"--adapter {adapted.kind_of(model)} does not serve --answer with this model, a "
            f"{type(adapted.plain(model)).__name__}: it writes nothing behind virtual tokens ({why}); take --adapter lora"
        ) from error
