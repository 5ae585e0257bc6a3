"""Models with an adapter of PEFT, made from the options.

Only the adapter is trained, and what the objective needs beside it: a classifier's head, and whatever the base's files did
not have. PEFT draws initial weights from torch's generator, which is seeded here: the same seed, the same bits.
"""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from zokern._checks import is_quantised
from zokern.finetune import adapters
from zokern.finetune.examples import PROMPTED
from zokern.finetune.options import FinetuneError, Options
from zokern.integrations import published

TASKS = {"similarity": "FEATURE_EXTRACTION", "classifier": "SEQ_CLS", **dict.fromkeys(PROMPTED, "CAUSAL_LM")}
OUTPUTS = ("logits", "last_hidden_state")
HEADS = ("classifier", "score")  # which PEFT trains and saves with the adapter of a classifier


def task_of(objective: str, model: Any) -> str:
    """PEFT's name of what a model does under an objective."""
    both = objective in PROMPTED and getattr(model.config, "is_encoder_decoder", False)
    return "SEQ_2_SEQ_LM" if both else TASKS[objective]


def objective_of(task: str) -> str:
    """The first objective that has a task of PEFT's name; "" for none."""
    return "prompt" if task == "SEQ_2_SEQ_LM" else next((name for name, one in TASKS.items() if one == task), "")


def require() -> Any:
    """The peft module; FinetuneError with the remedy where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise FinetuneError(f"adapters need PEFT ({error}); install it with: pip install peft") from None
    return peft


def is_adapted(model: nn.Module) -> bool:
    """Whether a model has an adapter around it. Does not load PEFT."""
    return "peft" in sys.modules and isinstance(model, sys.modules["peft"].PeftModel)


def plain(model: Any) -> nn.Module:
    """The transformers' model itself, whose forward says which arguments there are."""
    found: nn.Module = model.get_base_model() if is_adapted(model) else model
    return found


def config_of(model: Any) -> Any:
    """PEFT's configuration of the adapter that is trained."""
    return model.peft_config[model.active_adapter]


def kind_of(model: nn.Module) -> str:
    """The name in `adapters.KINDS` of a model's adapter; "" for no adapter."""
    return published.name_of(config_of(model)) if is_adapted(model) else ""


# ---------------------------------------------------------------------------------------------------------------- making


def put_on(model: nn.Module, options: Options, objective: str, base: str, new: Iterable[str]) -> nn.Module:
    """`model` with a new adapter, as the options have it, in eval mode.

    base: where the model came from, which the adapter's files name. new: parameters that were not in its files.

    Raises:
        FinetuneError: for an objective or a model that the kind does not serve.
    """
    peft = require()
    assert options.adapter is not None
    refuse(options.adapter, objective, model)
    unread = _frozen(model)
    values, named = adapters.settings(options), {"task_type": task_of(objective, model)}
    if values.get("targets") is not None:
        values["targets"] = _targets(values["targets"], model)
    config = _config(peft, options.adapter, values, named)
    beside = sorted(_owners(model, new, unread))
    _refuse_quantised(options.model, model, [*beside, *(HEADS if objective == "classifier" else ())])
    if beside and (adapters.KINDS[options.adapter].in_blocks or objective == "classifier"):
        config.modules_to_save = beside
    elif beside:
        raise FinetuneError(
            f"--adapter {options.adapter} saves virtual tokens alone, and {', '.join(beside)} of --model {options.model!r} "
            "is new: give a model whose files have it, or --adapter lora"
        )
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # of Conv1D, whose weights lie the other way: PEFT takes care of it
        torch.default_generator.manual_seed(seed_of(options.seed))
        try:
            adapted: nn.Module = peft.get_peft_model(model, config)
        except (ValueError, TypeError) as error:
            raise FinetuneError(_does_not_fit(options, model, error)) from error
    config_of(adapted).base_model_name_or_path = base  # PEFT has put there what transformers was given
    _leave_out(adapted, unread)
    ready(adapted)
    if not adapters.KINDS[options.adapter].in_blocks:
        _try(adapted, options)
    return adapted


@torch.no_grad()
def _try(adapted: Any, options: Options) -> None:
    """Refuses virtual tokens that a model cannot take, or takes and does not look at: found by forwards of one token."""
    what = f"--adapter {options.adapter} does not serve --model {options.model!r}"
    tokens = adapted.prompt_encoder[adapted.active_adapter].embedding.weight
    given = {"input_ids": torch.ones(1, 1, dtype=torch.long), "attention_mask": torch.ones(1, 1, dtype=torch.long)}
    before, seen = tokens.detach().clone(), []
    for change in (0.0, 1.0):
        tokens.add_(change)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                output = adapted(**given)
        except Exception as error:
            why = str(error).strip() or type(error).__name__
            raise FinetuneError(f"{what}: its forward fails ({why}); take --adapter lora") from error
        seen.append(next(output[name] for name in OUTPUTS if output.get(name) is not None))
    tokens.copy_(before)
    if torch.equal(*seen):
        raise FinetuneError(f"{what}: its output does not depend on the virtual tokens; take --adapter lora")


def _config(peft: Any, kind: str, values: dict[str, Any], named: dict[str, Any]) -> Any:
    """PEFT's configuration of a kind. A prompt begins as tokens of the vocabulary: standard normal ones are far from it."""
    targets = {"target_modules": values["targets"]} if values.get("targets") is not None else {}
    if kind in ("lora", "dora"):
        return peft.LoraConfig(
            r=values["rank"], lora_alpha=values["alpha"], use_dora=kind == "dora", **targets, **named
        )
    if kind == "vera":
        return peft.VeraConfig(r=values["rank"], **targets, **named)
    if kind == "ia3":
        return peft.IA3Config(**named)
    if kind == "prefix":
        return peft.PrefixTuningConfig(num_virtual_tokens=values["tokens"], **named)
    if kind == "prompt":
        return peft.PromptTuningConfig(num_virtual_tokens=values["tokens"], prompt_tuning_init="SAMPLE_VOCAB", **named)
    raise AssertionError(kind)


def seed_of(seed: int) -> int:
    """Of the adapter's initial weights: another than that of a new head, which is drawn from `seed` itself."""
    return int.from_bytes(hashlib.sha256(f"adapter {seed}".encode()).digest()[:7], "little")


def refuse(kind: str, objective: str, model: nn.Module) -> None:
    """Raises FinetuneError for an objective that a kind does not serve with this model."""
    if unfit := adapters.unfit(kind, objective):
        raise FinetuneError(unfit)
    if not adapters.KINDS[kind].in_blocks and task_of(objective, model) == "SEQ_2_SEQ_LM":
        raise FinetuneError(
            f"--adapter {kind} does not serve an encoder-decoder, {type(model).__name__}, whose encoder does not see the "
            "virtual tokens; take --adapter lora"
        )
    if kind == "prompt" and objective == "classifier" and hasattr(model, "score"):
        raise FinetuneError(
            f"--adapter prompt does not serve --objective classifier with a {type(model).__name__}: it finds a text's last "
            "token by the ids, which a model with virtual tokens is not given; take --adapter lora, or --objective prompt"
        )


def _refuse_quantised(name: str, model: nn.Module, whole: Iterable[str]) -> None:
    """Of modules that are to be trained themselves."""
    for part, module in model.named_modules():
        if part in whole and any(is_quantised(p) for p in module.parameters()):
            raise FinetuneError(
                f"--model {name!r}: {part} has to be trained, and is quantised; quantise the model without it "
                "(transformers: llm_int8_skip_modules of BitsAndBytesConfig, modules_to_not_convert of TorchAoConfig)"
            )


def _targets(text: str, model: nn.Module) -> str | list[str]:
    if text == "all-linear":
        return text
    names = adapters.targets(text)
    every = [name for name, _ in model.named_modules()]
    if missing := [one for one in names if not any(name == one or name.endswith(f".{one}") for name in every)]:
        raise FinetuneError(
            f"--adapter-targets: no module of {type(model).__name__} is called {', '.join(missing)}; its linear ones end "
            f"in {', '.join(_linear(model))}"
        )
    return names


def _linear(model: nn.Module) -> list[str]:
    """The last parts of the names of a model's linear modules."""
    found = (name for name, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D")
    return list(dict.fromkeys(name.rpartition(".")[2] for name in found))


def _does_not_fit(options: Options, model: nn.Module, error: Exception) -> str:
    kind = adapters.KINDS[str(options.adapter)]
    remedy = "take another --adapter, for example lora"
    if "targets" in kind.settings and options.adapter_targets is None:
        names = ", ".join(_linear(model))
        remedy = f"give --adapter-targets all-linear, or names of modules: its linear ones end in {names}"
    return f"--adapter {options.adapter} cannot be put on --model {options.model!r} ({str(error).strip()}); {remedy}"


def _frozen(model: nn.Module) -> set[str]:
    """Names of modules whose parameters are all frozen: what a text never reaches."""
    found = set()
    for name, module in model.named_modules():
        own = [p for p in module.parameters() if not is_quantised(p)]  # which are frozen anywhere
        if name and own and not any(p.requires_grad for p in own):
            found.add(name)
    return found


def _owners(model: nn.Module, new: Iterable[str], unread: set[str]) -> Iterator[str]:
    """The modules of new parameters that are read."""
    known = dict(model.named_parameters())
    for name in set(new) & set(known):
        owner = name.rpartition(".")[0]
        if owner and known[name].requires_grad and owner not in unread:
            yield owner


def _leave_out(adapted: Any, unread: set[str]) -> None:
    """What PEFT has put into modules that no text reaches is not trained: it would only add noise."""
    for name, p in plain(adapted).named_parameters():
        if p.requires_grad and any(name.startswith(f"{one}.") for one in unread):
            p.requires_grad_(False)


def ready(adapted: nn.Module) -> nn.Module:
    """The model in eval mode, its outputs those of the text alone."""
    if getattr(config_of(adapted), "peft_type", None) == "PROMPT_TUNING":
        adapted.register_forward_hook(_text_alone, with_kwargs=True)
    return adapted.eval()


def _text_alone(_module: nn.Module, _given: Any, named: dict[str, Any], output: Any) -> Any:
    """Takes the positions of virtual tokens off an output: what is left are those of the text's."""
    length = named["input_ids"].shape[1]
    for name in OUTPUTS:
        value = output.get(name)
        if value is not None and value.dim() == 3 and value.shape[1] > length:
            output[name] = value[:, -length:]
    return output
