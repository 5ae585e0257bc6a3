"""Kernels with one instruction changed, as a slip of a programmer or a compiler would change it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .blocks import blocks_of
from .parse import parse

Change = tuple[str, str, str | Callable[[re.Match[str]], str]]  # kind, pattern, what comes in its place

CHANGES: list[Change] = [
    ("< to <=", r"\bsetp\.lt\.", "setp.le."),
    (">= to >", r"\bsetp\.ge\.", "setp.gt."),
    ("> to >=", r"\bsetp\.gt\.", "setp.ge."),
    ("== to !=", r"\bsetp\.eq\.", "setp.ne."),
    ("== to >=", r"\bsetp\.eq\.s32", "setp.ge.s32"),
    ("+ to -", r"\badd\.s32\b", "sub.s32"),
    ("float + to -", r"\badd\.rn\.f32 ", "sub.rn.f32 "),
    ("xor to or", r"\bxor\.b(32|64)\b", r"or.b\1"),
    ("and to or", r"\band\.b(32|64)\b", r"or.b\1"),
    ("fma without its sum", r"\bfma\.rn\.f32 (\S+), (\S+), (\S+), (\S+);", r"mul.rn.f32 \1, \2, \3;"),
    ("fma without its product", r"\bfma\.rn\.f32 (\S+), (\S+), (\S+), (\S+);", r"mov.f32 \1, \4;"),
    ("packed fma without its sum", r"\bfma\.rn\.f32x2 (\S+), (\S+), (\S+), (\S+);", r"mul.rn.f32x2 \1, \2, \3;"),
    ("packed fma without its product", r"\bfma\.rn\.f32x2 (\S+), (\S+), (\S+), (\S+);", r"mov.b64 \1, \4;"),
    ("halves of a pair", r"\bmov\.b64 \{([^,]+), ([^}]+)\}", r"mov.b64 {\2, \1}"),
    ("halves of a pair", r"\bmov\.b64 (%\w+), \{([^,]+), ([^}]+)\}", r"mov.b64 \1, {\3, \2}"),
    ("min to max", r"\bmin\.", "max."),
    ("max to min", r"\bmax\.", "min."),
    ("no min or max", r"\b(?:min|max)\.(f32|s64|u32|s32) (\S+), (\S+), (\S+);", r"mov.\1 \2, \3;"),
    ("shift of a sign", r"\bshr\.u32\b", "shr.s32"),
    ("shift to the left", r"\bshr\.u(32|64)\b", r"shl.b\1"),
    ("no barrier", r"\bbar\.sync[^;]*;", ""),
    ("unsigned to float", r"\bcvt\.rn\.f32\.s32\b", "cvt.rn.f32.u32"),
    ("signed to float", r"\bcvt\.rn\.f32\.u32\b", "cvt.rn.f32.s32"),
    ("4 bytes further", r"\+(\d+)\]", lambda m: f"+{int(m[1]) + 4}]"),
    ("other branch", r"^(@)(%p)", r"\1!\2"),
    ("other branch", r"^(@)!(%p)", r"\1\2"),
    ("select the other", r"\bselp\.(\w+) (\S+), (\S+), (\S+), ", r"selp.\1 \2, \4, \3, "),
    ("one more", r"(?<!ld)(?<!st) (?!.*\[)(.*), (\d+);", lambda m: f" {m[1]}, {int(m[2]) + 1};"),
    ("last bit of a constant", r"0f([0-9A-F]{8})", lambda m: f"0f{int(m[1], 16) ^ 1:08X}"),
    ("no negation", r"\bneg\.f32\b", "mov.f32"),
    ("signed product", r"\bmul\.wide\.u32\b", "mul.wide.s32"),
    ("bytes of a permutation", r"\bprmt\.b32 (\S+), (\S+), (\S+), (\S+);", r"prmt.b32 \1, \3, \2, \4;"),
    ("another sign", r"\bcopysign\.f32 (\S+), (\S+), (\S+);", r"mov.b32 \1, \3;"),
    ("nearest of two", r"\bcvt\.rn\.(b?f16x2)\.f32 (\S+), (\S+), (\S+);", r"cvt.rn.\1.f32 \2, \4, \3;"),
]


_STATEMENT = re.compile(r"(?:[^;{}]|\{[^;{}]*\})+;")
_LABELS = re.compile(r"\s*(?:[\w$]+:\s*)*")


@dataclass(frozen=True)
class Mutant:
    kernel: str
    kind: str
    start: int  # in the kernel's text
    end: int
    was: str
    becomes: str

    def apply(self, text: str) -> str:
        return text[: self.start] + self.becomes + text[self.end :]

    def __str__(self) -> str:
        return f"{self.was}   ->   {self.becomes or 'nothing'}"


def mutants_of(name: str, text: str, executed: set[str]) -> Iterator[Mutant]:
    """All that a kernel has, in instructions that some case runs."""
    for m in _STATEMENT.finditer(text):
        start = m.start() + len(_LABELS.match(m[0])[0])  # type: ignore[index]
        was = " ".join(text[start : m.end()].split())
        if was.rstrip(";") not in executed:
            continue
        for kind, pattern, new in CHANGES:
            becomes = re.sub(pattern, new, was, count=1)
            if becomes != was and not (".param" in was and kind == "4 bytes further"):
                yield Mutant(name, kind, start, m.end(), was, becomes)


def draw(every: list[Mutant], count: int, seed: int) -> list[Mutant]:
    """As many of each kind as there are, in turn, from all kernels: rare kinds say as much as common ones."""
    choose = random.Random(seed)
    kinds: dict[str, list[Mutant]] = {}
    for mutant in every:
        kinds.setdefault(mutant.kind, []).append(mutant)
    for some in kinds.values():
        choose.shuffle(some)
    found: list[Mutant] = []
    while len(found) < min(count, len(every)):
        for some in kinds.values():
            if some and len(found) < count:
                found.append(some.pop())
    return found


def instructions_by_block(text: str) -> list[set[str]]:
    """The instructions of each block, with what ends it."""
    kernel = parse(text)
    blocks = blocks_of(kernel)
    stops = [*(b.first for b in blocks[1:]), len(kernel.code)]
    return [{i.text for i in kernel.code[b.first : stop]} for b, stop in zip(blocks, stops, strict=True)]
