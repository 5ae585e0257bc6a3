"""Virtual tokens of an adapter take positions of the model's: how many, and what a text has left."""

from __future__ import annotations

from torch import nn

from zokern.finetune import adapted, adapters
from zokern.finetune.options import FinetuneError, Options

LEAST = 4  # that --max-length may be


def room(model: nn.Module) -> int:
    """How many of the model's positions the adapter takes: those of its virtual tokens; 0 without any."""
    if not adapted.is_adapted(model):
        return 0
    return int(getattr(adapted.config_of(model), "num_virtual_tokens", 0) or 0)


def beside(model: nn.Module) -> str:
    """What is said behind a number of tokens that a model takes; "" without virtual ones."""
    taken = room(model)
    return f" beside its adapter's {taken} virtual ones" if taken else ""


def check(options: Options, limit: int) -> None:
    """Raises FinetuneError for more virtual tokens than a model has room for. limit: of the model, in tokens."""
    if options.adapter is None:
        return
    tokens = adapters.settings(options).get("tokens") or 0
    if tokens + LEAST > limit:
        raise FinetuneError(
            f"--adapter-tokens is {tokens}; allowed: at most {limit - LEAST} for --model {options.model!r}, which takes "
            f"{limit} tokens, of which a text needs {LEAST}"
        )
