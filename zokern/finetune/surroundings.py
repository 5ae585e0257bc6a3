"""What a run changes in its process and gives back: torch's threads, transformers' talk, warnings filters."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator

import torch

from zokern import ZokernWarning

_lock = threading.Lock()
_runs = 0
_kept = contextlib.ExitStack()


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Settings of the process are after the outermost block what they were before; blocks may overlap in threads."""
    global _runs
    with _lock:
        if _runs == 0:
            _keep(_kept)
        _runs += 1
    try:
        yield
    finally:
        with _lock:
            _runs -= 1
            if _runs == 0:
                _kept.close()


def _keep(stack: contextlib.ExitStack) -> None:
    stack.callback(torch.set_num_threads, torch.get_num_threads())
    stack.enter_context(warnings.catch_warnings())
    warnings.filterwarnings("ignore", "a loss was not finite", ZokernWarning)  # the display has their count
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)  # PEFT's prefixes
    warnings.filterwarnings("ignore", ".* was removed while it was written", ZokernWarning)  # Output puts it back
    with contextlib.suppress(ImportError):
        import transformers
        from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars

        talk = transformers.logging
        stack.callback(talk.set_verbosity, talk.get_verbosity())
        if are_progress_bars_disabled():
            stack.callback(disable_progress_bars)  # called last: transformers' switch is the hub's too
        if talk.is_progress_bar_enabled():
            stack.callback(talk.enable_progress_bar)
