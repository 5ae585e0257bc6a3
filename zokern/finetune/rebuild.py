"""A tuned model made again from its journal, as files: what `zokern replay` does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from zokern.finetune.options import Options
from zokern.journal import JournalError, Reader, replay
from zokern.journal.replay import Replayed


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
    parameters' names, and `output` is such a file too.
    """
    if output.exists() and not force:
        raise JournalError(f"{output} exists; give another name, or --force to replace it")
    about = Reader(path).header.get("about") or {}
    temporary = output.with_name(output.name + ".tmp")
    options = {"until": until, "verify": verify, "backend": backend, "progress": progress}
    if "objective" in about:
        from zokern.finetune import models  # transformers, which other journals do not need

        config = models.load_config(base)
        model, tokenizer = models.load(
            Options(model=base, seed=about["seed"]),
            about["objective"],
            about["labels"],
            config,
            getattr(torch, about["dtype"]),
        )
        model.to(models.choose_device(device))
        done = replay(path, model, **options)  # type: ignore[arg-type]
        shutil.rmtree(temporary, ignore_errors=True)
        saveable: Any = model
        saveable.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    else:
        from safetensors.torch import load_file, save_file

        if not Path(base).is_file():
            raise JournalError(f"{base} is not a file; this journal needs a .safetensors file with the base weights")
        tensors = load_file(base, device="cpu" if device == "auto" else device)
        done = replay(path, tensors, **options)  # type: ignore[arg-type]
        save_file(tensors, temporary)
    if output.is_dir():
        shutil.rmtree(output)
    os.replace(temporary, output)
    return done
