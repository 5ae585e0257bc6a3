"""What an emulator (tests/ptx/emulator.py) asks of an architecture's interpreter, for AMD's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from .machine import Machine
from .mutants import instructions_by_block, mutants_of
from .parse import parse
from .translate import translate

__all__ = [
    "Machine",
    "instructions_by_block",
    "mutants_of",
    "opcodes",
    "params",
    "program",
    "text_of",
    "translate",
    "wrong_in",
]
program = translate


def text_of(forms: Mapping[str, Any]) -> str:
    """A kernel's text, out of what Triton's compiler made."""
    text: str = forms["amdgcn"]
    return text


def opcodes(text: str, runs: Counter[int]) -> Counter[str]:
    """How often each ran, of a kernel whose blocks ran so often: of blocks that ran oftener than the first, in loops."""
    found: Counter[str] = Counter()
    for n, block in enumerate(parse(text).blocks):
        for i in [*block.code, *([block.end] if block.end else [])] if runs[n] > runs[0] else []:
            found[i.opcode] += runs[n]
    return found


def params(kernel: Any) -> list[tuple[int, int]]:
    """Offset and size of each parameter."""
    return sorted(kernel.params)


def wrong_in(texts: Mapping[str, str]) -> list[str]:
    """What must not be in a text makes it unknown to parse.py and vector.py: other modes, results that one instruction
    computes and rounds to float16."""
    return []
