"""Adapters in directories: found, taken up to be trained on, and saved alone."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zokern.finetune import adapted, adapters
from zokern.finetune.options import FinetuneError, Options
from zokern.integrations import published

CONFIG = "adapter_config.json"


def is_directory(path: str) -> bool:
    """Whether a path is a directory with an adapter alone."""
    directory = Path(path)
    whole = ("model*.safetensors", "pytorch_model*.bin")
    return (directory / CONFIG).is_file() and not any(any(directory.glob(pattern)) for pattern in whole)


def base_of(path: str) -> str:
    """The model that the adapter in a directory is for."""
    try:
        values = json.loads((Path(path) / CONFIG).read_text(encoding="utf-8"))
        base = values.get("base_model_name_or_path") if isinstance(values, dict) else None
        if not isinstance(base, str) or not base:
            raise ValueError("it names no base model")
    except (OSError, ValueError, RecursionError) as error:
        raise FinetuneError(
            f"--model {path!r} is a PEFT adapter, and its {CONFIG} cannot be read ({error}); put its base model's "
            "directory or name there as base_model_name_or_path"
        ) from error
    return base


def take_up(model: nn.Module, path: str, objective: str, options: Options) -> nn.Module:
    """`model` with the adapter in a directory, to be trained on, in eval mode.

    Raises:
        FinetuneError: for an adapter of another objective or model.
    """
    peft = adapted.require()
    if options.adapter is not None:
        raise FinetuneError(
            f"--adapter {options.adapter}: --model {path!r} is an adapter already, and is trained on; leave --adapter out, "
            "or merge it into its base (merge_and_unload) and give that"
        )
    try:
        config = peft.PeftConfig.from_pretrained(path)
        wanted = adapted.task_of(objective, model)
        if config.task_type not in (None, wanted):
            fitting = adapted.objective_of(config.task_type)
            remedy = f"give --objective {fitting}" if fitting else "no objective here is of that task"
            raise FinetuneError(
                f"--model {path!r} is an adapter for {config.task_type}, and --objective {objective} needs "
                f"{wanted}; {remedy}"
            )
        kind = published.name_of(config)
        if kind not in adapters.KINDS or getattr(config, "prefix_projection", False):
            raise FinetuneError(
                f"--model {path!r} is an adapter of a kind ({config.peft_type.value}) that the command does not train on; "
                f"it has {', '.join(adapters.KINDS)}. In Python, load it with PeftModel.from_pretrained(..., "
                "is_trainable=True) and give that to zokern.MeZO"
            )
        adapted.refuse(kind, objective, model)
        with warnings.catch_warnings(record=True) as told, torch.random.fork_rng(devices=[]):
            warnings.simplefilter("always")
            torch.default_generator.manual_seed(adapted.seed_of(options.seed))  # of what its files may lack
            found = _loaded(peft, model, path, config)
        if missing := [str(one.message) for one in told if "missing adapter keys" in str(one.message)]:
            raise ValueError(f"its files lack weights: {missing[0][:200]}")
    except (OSError, ValueError, TypeError, RuntimeError, KeyError) as error:
        if isinstance(error, FinetuneError):
            raise
        why = " ".join(str(error).split("\n")[:2])  # the first of the tensors
        raise FinetuneError(
            f"--model {path!r}: its adapter cannot be put on {base_of(path)!r} ({why}); give an adapter of that model"
        ) from error
    return adapted.ready(found)


def _loaded(peft: Any, model: nn.Module, path: str, config: Any) -> nn.Module:
    """PEFT refuses to load virtual tokens for training: those are made anew, and then given what is saved."""
    if not config.is_prompt_learning:
        found: nn.Module = peft.PeftModel.from_pretrained(model, path, is_trainable=True)
        return found
    base, config.inference_mode = config.base_model_name_or_path, False
    found = peft.get_peft_model(model, config)
    peft.set_peft_model_state_dict(found, peft.utils.load_peft_weights(path, device="cpu"))
    adapted.config_of(found).base_model_name_or_path = base
    return found


def save(model: Any, tokenizer: Any, directory: Path) -> None:
    """Model and tokenizer, as from_pretrained loads them; of an adapted model the adapter alone, beside the base's
    configuration, which has the labels."""
    if adapted.is_adapted(model):
        config = adapted.config_of(model)
        for name in ("target_modules", "modules_to_save"):  # sets, and lists that PEFT adds to: the same file each time
            if isinstance(value := getattr(config, name, None), (set, list)):
                setattr(config, name, sorted(set(value)))
    model.save_pretrained(directory, **({"save_embedding_layers": False} if adapted.is_adapted(model) else {}))
    if adapted.is_adapted(model):
        (directory / "README.md").unlink(missing_ok=True)  # a form to fill in
        base: Any = adapted.plain(model)
        config = copy.deepcopy(base.config)
        config.architectures = [type(base).__name__]
        config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
