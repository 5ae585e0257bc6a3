"""What the operating system refuses, as a sentence with the option that it is about."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from zokern.finetune.options import FinetuneError


def reason(error: BaseException) -> str | None:
    """Why a file could not be read or written; None for an exception that is about something else.

    safetensors and tokenizers, which are written in Rust, raise exceptions of their own with the system's text in them:
    "... (os error 28)", or, safetensors before 0.6, "IoError(Os { code: 28, ..., message: "No space left on device" })".
    """
    if isinstance(error, OSError):
        named = f"{error.filename}: " if error.filename is not None else ""
        return f"{named}{error.strerror or str(error) or type(error).__name__}"
    text = str(error)
    if told := re.search(r'Os \{ code: \d+, .*message: "(.*?)" \}', text):
        return told[1]
    return text.split("\n")[0] if "(os error" in text else None


@contextlib.contextmanager
def telling(what: str, remedy: str) -> Iterator[None]:
    """Failures of the operating system in the block become a FinetuneError: what (why); remedy."""
    try:
        yield
    except FinetuneError:
        raise
    except Exception as error:
        if (why := reason(error)) is None:
            raise
        raise FinetuneError(f"{what} ({why}); {remedy}") from error
