"""A tuned model made again from its journal, as files: what `zokern replay` does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from zokern.finetune import adapter_files, adapters, failures, surroundings
from zokern.finetune.options import FinetuneError, Options
from zokern.finetune.replacing import refuse, replacing, sweep
from zokern.journal import JournalError, Reader, replay
from zokern.journal.replay import Replayed

_OBJECTIVES = ("similarity", "classifier", "prompt", "choices", "answer", "image")
_DTYPES = ("float32", "bfloat16", "float16")


def rebuild(
    base: str,
    path: Path,
    output: Path,
    *,
    until: int | None,
    verify: bool,
    force: bool,
    device: str,
    backend: str,
    progress: Callable[[int], None],
) -> Replayed:
    """Writes the tuned model of a journal to `output`, made from `base`; returns the number of steps done.

    base: for the journal of a `zokern finetune` run what was its --model; otherwise a .safetensors file whose names are the
    parameters' names, and `output` is such a file too. force: replaces an earlier model or .safetensors file at `output`,
    when the new one is complete; nothing else is ever replaced.
    """
    about = Reader(path).header.get("about") or {}
    whole = isinstance(about, dict) and "objective" in about
    options = {"until": until, "verify": verify, "fold": True, "backend": backend, "progress": progress}
    place = output if output.name else output.absolute()
    kind, sources = ("directory" if whole else "file"), (Path(base), path)
    with failures.telling(f"--output {str(output)!r} cannot be written", "make room there, or give another name"):
        refuse(place, kind, "--output", force, sources)  # type: ignore[arg-type]
        sweep(place.parent, alone=False)
    if whole:
        model, tokenizer = _model(base, path, about, device)
        done = replay(path, model, **options)  # type: ignore[arg-type]
        with _writing(output), replacing(place, "directory", "--output", force, sources) as new:
            adapter_files.save(model, tokenizer, new)
        return done
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    if not Path(base).is_file():
        raise JournalError(
            f"{base} is not a file; this journal is of a loop in Python or a Trainer, and needs a .safetensors file "
            f"with the base weights, as {Path(base) / 'model.safetensors'} may be one. --output is then such a file, too"
        )
    try:
        tensors = load_file(base, device="cpu" if device == "auto" else device)
    except (OSError, SafetensorError) as error:
        raise JournalError(f"{base} cannot be read as a .safetensors file ({error})") from error
    done = replay(path, tensors, **options)  # type: ignore[arg-type]
    with _writing(output), replacing(place, "file", "--output", force, sources) as new:
        save_file(tensors, new)
    return done


def _writing(output: Path) -> contextlib.AbstractContextManager[None]:
    return failures.telling(f"--output {str(output)!r} cannot be written", "make room there, or give another name")


def _model(base: str, path: Path, about: dict[str, Any], device: str) -> tuple[Any, Any]:
    """The base model and its tokenizer, as the header says that the run had them. The header may be anybody's."""
    labels, seed = about.get("labels"), about.get("seed")
    if (
        about["objective"] not in _OBJECTIVES
        or about.get("dtype") not in _DTYPES
        or not isinstance(labels, list)
        or not all(isinstance(label, str) for label in labels)
        or not isinstance(seed, int)
        or not 0 <= seed < 1 << 63
    ):
        raise JournalError(f"{path}: what its header says about the run is damaged; take another copy of it")
    from zokern.finetune import models  # transformers, which other journals do not need

    options = _options(base, path, about, seed)
    with surroundings.kept():
        config = models.load_config(base)
        dtype = getattr(torch, about["dtype"])
        model, tokenizer = models.load(options, about["objective"], labels, config, dtype)
    return model.to(models.choose_device(device)), tokenizer


def _options(base: str, path: Path, about: dict[str, Any], seed: int) -> Options:
    """What the model is loaded with: the run's seed, and its adapter."""
    adapter = about.get("adapter")
    try:
        given = {} if adapter is None else {"adapter": adapter["kind"]}
        given |= {adapters.PREFIX + name: value for name, value in (adapter or {}).items() if name != "kind"}
        options = Options(model=base, seed=seed, **given)
        options.check_stored()
    except (FinetuneError, TypeError, KeyError, AttributeError) as error:
        raise JournalError(
            f"{path}: what its header says about the run's adapter is damaged ({error}); take another copy of it"
        ) from error
    return options
