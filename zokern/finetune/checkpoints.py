"""What a model's files may be: Hugging Face directories and names, GGUF files; and what is refused, in a sentence."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from zokern._checks import is_quantised
from zokern.finetune import adapter_files
from zokern.finetune.options import FinetuneError
from zokern.scales import keep_codes


class Place(NamedTuple):
    """Where from_pretrained looks, and with which arguments besides. Nothing ever runs a checkpoint's own code."""

    path: str
    also: dict[str, Any]
    adapter: str = ""  # the directory of an adapter, whose base is at `path`

    @property
    def is_gguf(self) -> bool:
        """Whether it is one GGUF file."""
        return "gguf_file" in self.also


def place_of(path: str) -> Place:
    """The place of a directory, a name of the hub, or a .gguf file. Raises FinetuneError for what can't be a model."""
    file = Path(path)
    if path.lower().endswith(".gguf"):
        if not file.is_file():
            raise FinetuneError(f"--model {path!r} is not a file here ({Path.cwd()}); a GGUF model must be one")
        require_gguf(path)
        return Place(str(file.parent), {"gguf_file": file.name, "trust_remote_code": False})
    if adapter_files.is_directory(path):
        base = adapter_files.base_of(path)
        if adapter_files.is_directory(base):
            raise FinetuneError(f"--model {path!r} is an adapter whose base {base!r} is one too; merge that first")
        if Path(base).is_absolute() and not Path(base).exists():
            raise FinetuneError(
                f"--model {path!r} cannot be loaded: the adapter's base {base!r} is not there; bring it back, "
                f"or put its directory or name into {Path(path) / adapter_files.CONFIG} as base_model_name_or_path"
            )
        return place_of(base)._replace(adapter=path)
    return Place(path, {"trust_remote_code": False})


def require_gguf(name: str) -> None:
    """Raises FinetuneError where transformers could not read GGUF. name: of the model."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise FinetuneError(
            f"--model {name!r}: reading GGUF needs the package gguf; install it with: pip install gguf"
        ) from None


def dequantized(transformers: Any) -> dict[str, Any]:
    """Arguments that make plain weights of a GGUF file, which can be trained and saved."""
    if not hasattr(transformers, "GgufConfig"):  # before 5: the weights are plain, the model says so
        return {}
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


def explain(error: BaseException, name: str, doing: str) -> FinetuneError:
    """The FinetuneError for what transformers raised. doing: "read", for example."""
    if "trust_remote_code" in str(error):
        return FinetuneError(
            f"--model {name!r} brings Python code of its own, which the command does not run; give a model whose class "
            "transformers has, or load this one in Python and tune it with zokern.MeZO(model)"
        )
    if isinstance(error, pickle.UnpicklingError):
        return FinetuneError(
            f"--model {name!r}: its weights are a pickle file with more in it than tensors, which could run any code, so "
            "it is not loaded; give a checkpoint in safetensors"
        )
    return FinetuneError(f"--model {name!r} cannot be {doing}: {str(error).strip()}")


def check_tokens(model: nn.Module, tokenizer: Any, ids: set[int], what: str) -> None:
    """Refuses token ids for which the model has no embedding. what: whose ids these are."""
    rows = rows_of(model)
    wrong = sorted(i for i in ids if rows is not None and not 0 <= i < rows)
    if wrong:
        tokens = [tokenizer.convert_ids_to_tokens(i) for i in wrong[:3]]
        raise FinetuneError(
            f"{what} has {len(wrong)} tokens for which the model has no embedding: {tokens}, ids {wrong[:3]}; the model "
            f"has {rows} rows. Give model and tokenizer that belong together, or call "
            "model.resize_token_embeddings(len(tokenizer)) and save both"
        )


def rows_of(model: nn.Module) -> int | None:
    """How many tokens the model has embeddings for; None if it does not say."""
    try:
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    weight = getattr(embedding, "weight", None)
    return None if weight is None else int(weight.shape[0])


def longest(model: nn.Module, tokenizer: Any) -> int:
    """The number of tokens that a text may have for this model: of its configuration, its positions and its tokenizer."""
    config: Any = model.config
    limits = [int(tokenizer.model_max_length)]
    for part in (config, config.get_text_config()):
        named = [getattr(part, name, None) for name in ("max_position_embeddings", "n_positions")]
        limits += [limit for limit in named if isinstance(limit, int) and limit > 0]
    for name, module in model.named_modules():
        if name.rpartition(".")[2] != "position_embeddings":
            continue
        weight, padding = getattr(module, "weight", None), getattr(module, "padding_idx", None)
        if weight is not None and padding is not None:  # RoBERTa and its kin: positions start after the padding's
            limits.append(int(weight.shape[0]) - padding - 1)
    return min(limits)


def freeze_quantised(model: nn.Module) -> bool:
    """Leaves quantised weights out of the training, and as they are. Returns whether there are any."""
    found = [p for p in model.parameters() if is_quantised(p)]
    for p in found:
        p.requires_grad_(False)  # torchao's may have it
    keep_codes(model)
    return bool(found)


def freeze_unread(model: nn.Module) -> int:
    """Leaves out of the training what a text never reaches: towers for pictures and sounds. Returns how many weights."""
    config: Any = model.config
    towers = any(hasattr(config, f"{part}_config") for part in ("vision", "audio"))
    if not (towers and hasattr(model, "get_decoder")):
        return 0
    whole: Any = model
    read = {id(p) for part in (whole.get_decoder(), whole.get_input_embeddings(), whole.get_output_embeddings())
            if part is not None for p in part.parameters()}  # fmt: skip
    unread = [p for p in model.parameters() if id(p) not in read]
    for p in unread:
        p.requires_grad_(False)
    return sum(p.numel() for p in unread)
