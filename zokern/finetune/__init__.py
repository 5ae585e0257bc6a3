"""`zokern finetune`: a Hugging Face text model tuned with forward passes only, from the command line or from Python.

`finetune(Options(...))` is the whole of it. Importing this package is cheap: torch and transformers are loaded by the
run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zokern.finetune.options import FinetuneError, Options

if TYPE_CHECKING:
    from zokern.finetune.run import Summary

__all__ = ["FinetuneError", "Options", "finetune"]


def finetune(options: Options) -> Summary:
    """Run one fine-tuning with `options` and return its summary. Raises FinetuneError where the user can mend it."""
    from zokern.finetune.run import run

    return run(options)
