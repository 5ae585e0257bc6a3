"""What an emulator asks of the interpreter of its architecture: of PTX here, of AMD's machine code in tests/gcn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from . import cache, lint
from .blocks import blocks_of
from .machine import Machine
from .mutants import instructions_by_block, mutants_of
from .parse import parse, split
from .translate import Program, translate

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


def text_of(forms: Mapping[str, Any]) -> str:
    """A kernel's text, out of what Triton's compiler made."""
    return next(iter(split(forms["ptx"]).values()))


def program(text: str) -> Program:
    """As `translate` makes it, from the cache where it has been there before."""
    return translate(text, cache.folder() / "programs")


def opcodes(text: str, runs: Counter[int]) -> Counter[str]:
    """How often each ran, of a kernel whose blocks ran so often."""
    found: Counter[str] = Counter()
    for block in blocks_of(parse(text)):
        for i in block.code:
            found[".".join(i.parts)] += runs[block.index]
    return found


def params(kernel: Any) -> list[tuple[int, int]]:
    """Offset and size of each parameter."""
    return sorted(kernel.params.values())


def wrong_in(texts: Mapping[str, str]) -> list[str]:
    """What must not be in the texts of kernels, by their names."""
    return lint.in_ptx(texts)
