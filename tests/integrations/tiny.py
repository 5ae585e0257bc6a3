"""A tiny language model, its data, and a trainer's arguments."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 19


def llama(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> nn.Module:
    """Three blocks, 2 thousand weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=8, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1,
            num_hidden_layers=3, max_position_embeddings=16, attention_dropout=dropout, pad_token_id=0, bos_token_id=1,
            eos_token_id=2,
        )  # fmt: skip
        return LlamaForCausalLM(config).to(dtype)


def rows(count: int = 24, ragged: bool = False) -> list[dict[str, Tensor]]:
    """Tokens and labels; ragged: of which some are left out, another number in each row."""
    out = []
    for i in range(count):
        tokens = torch.randint(3, VOCABULARY, (7,), generator=torch.Generator().manual_seed(i))
        labels = tokens.clone()
        if ragged:
            labels[: 1 + i % 5] = -100
        out.append({"input_ids": tokens, "labels": labels})
    return out


def arguments(folder: Path, **given: Any) -> Any:
    from transformers import TrainingArguments

    usual = {
        "per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 1e-2, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "logging_steps": 2, "save_strategy": "no", "data_seed": 5,
    }  # fmt: skip
    return TrainingArguments(output_dir=os.fspath(folder), **{**usual, **given})


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which counts its calls in `.calls`."""

    def call(*args: Any, **named: Any) -> Any:
        call.calls += 1  # type: ignore[attr-defined]
        return function(*args, **named)

    call.calls = 0  # type: ignore[attr-defined]
    return call
