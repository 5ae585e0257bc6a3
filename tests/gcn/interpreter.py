"""What an emulator (tests/ptx/emulator.py) asks of an architecture's interpreter, for AMD's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .machine import Machine
from .mutants import instructions_by_block, mutants_of
from .translate import translate

__all__ = ["Machine", "instructions_by_block", "mutants_of", "params", "program", "text_of", "translate", "wrong_in"]
program = translate


def text_of(forms: Mapping[str, Any]) -> str:
    """A kernel's text, out of what Triton's compiler made."""
    text: str = forms["amdgcn"]
    return text


def params(kernel: Any) -> list[tuple[int, int]]:
    """Offset and size of each parameter."""
    return sorted(kernel.params)


def wrong_in(texts: Mapping[str, str]) -> list[str]:
    """What must not be in a text makes it unknown to parse.py and vector.py: other modes, results that one instruction
    computes and rounds to float16."""
    return []
