"""Attention that asks a GPU nothing.

transformers leaves SDPA's mask out where no row has padding, because SDPA is faster without. To know, it reads the mask,
and the host waits for the device in every forward. Here the mask is always handed over, unread.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

NAME = "zokern_sdpa_unread_mask"
_NEVER_SKIP = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}


def attend_without_waiting(model: nn.Module) -> bool:
    """Gives a model that has transformers' SDPA the same attention with a mask that is not read. model: of transformers.

    Returns:
        whether it has it now: not with another attention, nor with a transformers before 5, where each model has an SDPA of
        its own. Those may wait.
    """
    config: Any = model.config
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return False
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import sdpa_mask
    except ImportError:
        return False
    known = inspect.signature(sdpa_mask).parameters
    never = {name: value for name, value in _NEVER_SKIP.items() if name in known}

    def unread_mask(*given: Any, **options: Any) -> Any:
        return sdpa_mask(*given, **{**options, **never})

    AttentionInterface.register(NAME, sdpa_attention_forward)
    AttentionMaskInterface.register(NAME, unread_mask)
    try:
        model.set_attn_implementation(NAME)  # type: ignore[operator]
    except (AttributeError, ValueError):  # its classes know no attention but their own
        return False
    return bool(config._attn_implementation == NAME)
