"""PEFT's adapters by kind: which one a model has, and the eps that is published for it. PEFT is not loaded here."""

from __future__ import annotations

from typing import Any

# By the kinds' names in zokern finetune (zokern/finetune/adapters.py has them all, with lr and sources).
EPS = {"lora": 1e-2, "dora": 1e-2, "vera": 1e-2, "ia3": 1e-2, "prefix": 1e-1, "prompt": 1e-2}
_WHERE = {
    "lora": "for LoRA MeZO's paper has",
    "prefix": "for prefix tuning MeZO's paper has",
    "prompt": "for prompt tuning arXiv 2402.11592 has",
}
_LIKE_LORA = "for LoRA, the nearest kind that was published, MeZO's paper has"


def name_of(config: Any) -> str:
    """The name in `EPS` of a configuration of PEFT's; for a kind that is not there, PEFT's own."""
    name = {"PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt"}.get(
        config.peft_type.value, config.peft_type.value.lower()
    )
    return "dora" if getattr(config, "use_dora", False) else name


def trained(model: Any) -> str:
    """The name of the kind of adapter that a model trains; "" for none. Also of one by transformers' add_adapter."""
    configs = getattr(model, "peft_config", None)
    for config in configs.values() if isinstance(configs, dict) else ():
        if hasattr(config, "peft_type") and not config.inference_mode:
            return name_of(config)
    return ""


def other_eps(model: Any, eps: float) -> tuple[float, str] | None:
    """The published eps for what a model trains, and whose it is, where it is another one."""
    kind = trained(model)
    if EPS.get(kind, eps) == eps:
        return None
    return EPS[kind], _WHERE.get(kind, _LIKE_LORA)
