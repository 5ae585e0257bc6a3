"""Which objective `--objective auto` picks for a model: by the options, and by the class that its checkpoint is of."""

from __future__ import annotations

from typing import Any

from zokern.finetune import preset
from zokern.finetune.examples import OWN, PROMPTED
from zokern.finetune.options import FinetuneError, Options


def objective(config: Any, options: Options | None = None) -> tuple[str, str]:
    """(objective, the reason): what `--objective auto` picks for options and a configuration."""
    for own in OWN:
        if options is not None and getattr(options, own) is not None:
            return own, f"of --task {options.task}" if options.task else f"--{own} is given"
    found, reason = _of_config(config)
    pair = options is not None and (options.pair_column is not None or preset.is_pair(options))
    if pair and found == "similarity" and not saved_from(config).endswith("EncoderModel"):
        return "classifier", f"{saved_from(config)} takes a classification head, for pairs of texts"
    return found, reason


def saved_from(config: Any) -> str:
    """The class that the checkpoint was saved from; "" where it does not say."""
    return str((getattr(config, "architectures", None) or [""])[0])


def _of_config(config: Any) -> tuple[str, str]:
    name = saved_from(config)
    if name.endswith("ForImageClassification"):
        return "image", f"{name} has a head for pictures"
    if name.endswith("EncoderModel"):
        return "similarity", f"{name} is an encoder: labels are compared as sentences"
    if getattr(config, "is_encoder_decoder", False):
        if name.endswith("ForSequenceClassification"):
            return "classifier", f"{name} has a classification head"
        return "prompt", f"{name or config.model_type} is an encoder-decoder: its decoder says the label's word"
    if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return "prompt", f"{name} generates text: labels are scored as words"
    if name.endswith("Model"):
        return "similarity", f"{name} has no head: labels are compared as sentences"
    if not name:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

        if config.model_type in CAUSAL and config.model_type not in MASKED:
            return "prompt", f"{config.model_type} generates text: labels are scored as words"
    return "classifier", f"{name or config.model_type} takes a classification head"


def check(objective: str, config: Any) -> None:
    """Raises FinetuneError where an objective needs a language model, for those that read a text from both its sides: for
    them nothing comes after a prompt, and they would see the word that they are asked for.
    """
    if objective not in PROMPTED:
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    if config.model_type in MASKED and not config.is_encoder_decoder and not getattr(config, "is_decoder", False):
        raise FinetuneError(
            f"--objective {objective} needs a language model; {config.model_type} reads a text from both its sides. Give a "
            "decoder, as an OPT, or an encoder-decoder, as a T5"
        )


def has_head(objective: str, config: Any) -> bool:
    """Whether the model has a trained head that the objective uses."""
    name = saved_from(config)
    heads = {"classifier": "ForSequenceClassification", "image": "ForImageClassification"}
    return objective in heads and name.endswith(heads[objective])
