"""Kernels with one instruction changed, as a slip of a programmer or a compiler would change it: tests/ptx/mutants.py, in
AMD's machine code."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.ptx.mutants import Change, Mutant

from .parse import INSTRUCTION, parse

CHANGES: list[Change] = [
    ("< to <=", r"^(s_cmp|v_cmp)_lt_", r"\1_le_"),
    (">= to >", r"^(s_cmp|v_cmp)_ge_", r"\1_gt_"),
    ("> to >=", r"^(s_cmp|v_cmp)_gt_", r"\1_ge_"),
    ("<= to <", r"^(s_cmp|v_cmp)_le_", r"\1_lt_"),
    ("== to !=", r"^s_cmp_eq_", "s_cmp_lg_"),
    ("!= to ==", r"^s_cmp_lg_", "s_cmp_eq_"),
    ("+ to -", r"^s_add_i32 ", "s_sub_i32 "),
    ("+ to -", r"^v_add_u32_e32 ", "v_sub_u32_e32 "),
    ("float + to -", r"^v_add_f32_e32 ", "v_sub_f32_e32 "),
    ("xor to or", r"^v_xor_b32", "v_or_b32"),
    ("and to or", r"^v_and_b32", "v_or_b32"),
    ("and to or", r"^s_and_b32", "s_or_b32"),
    ("fma without its sum", r"^v_fmaak_f32 (\S+), (\S+), (\S+), \S+$", r"v_mul_f32_e32 \1, \2, \3"),
    ("fma without its product", r"^v_fma(?:ak)?_f32 (\S+), (\S+), (\S+), (\S+)$", r"v_mov_b32_e32 \1, \4"),
    ("fma without its product", r"^v_fmac_f32_e32 (\S+), (\S+), (\S+)$", r"v_mov_b32_e32 \1, \1"),
    ("packed fma without its sum", r"^v_pk_fma_f32 (\S+), (\S+), (\S+), \S+$", r"v_pk_mul_f32 \1, \2, \3"),
    ("packed fma without its product", r"^v_pk_fma_f32 (\S+), (\S+), (\S+), (v\S+)$", r"v_mov_b64_e32 \1, \4"),
    ("halves of a pair", r"op_sel_hi:\[1,1,0\]", "op_sel:[0,0,1] op_sel_hi:[1,1,0]"),
    ("halves of a pair", r"op_sel_hi:\[1,0,1\]", "op_sel:[0,1,0] op_sel_hi:[1,0,1]"),
    ("fma without its product", r"^v_fmamk_f32 (\S+), \S+, \S+, (\S+)$", r"v_mov_b32_e32 \1, \2"),
    ("half a product", r"^v_mad_u64_u32 v\[(\d+):\d+\], \S+, (\S+), (\S+), \S+$", r"v_mul_lo_u32 v\1, \2, \3"),
    ("no carry", r"^s_addc_u32", "s_add_u32"),
    ("or to and", r"^v_or_b32", "v_and_b32"),
    ("NaN to number", r"^v_cmp_o_f32", "v_cmp_u_f32"),
    ("another lane", r"^(v_(?:read|write)lane_b32 \S+, \S+), (\d+)$", lambda m: f"{m[1]}, {int(m[2]) ^ 1}"),
    ("another half", r"src0_sel:WORD_1", "src0_sel:WORD_0"),
    ("another place", r"^(ds_(?:read|write)\w+ .*) offset:(\d+)", lambda m: f"{m[1]} offset:{int(m[2]) + 4}"),
    ("min to max", r"^v_min_", "v_max_"),
    ("max to min", r"^v_max_", "v_min_"),
    ("shift of a sign", r"^v_lshrrev_b32_e32", "v_ashrrev_i32_e32"),
    ("shift to the left", r"^v_lshrrev_b32_e32", "v_lshlrev_b32_e32"),
    ("no barrier", r"^s_barrier$", "s_nop 0"),
    ("unsigned to float", r"^v_cvt_f32_i32", "v_cvt_f32_u32"),
    ("signed to float", r"^v_cvt_f32_u32", "v_cvt_f32_i32"),
    ("4 bytes further", r"^(global_(?:load|store)\w+ .*) offset:(\d+)", lambda m: f"{m[1]} offset:{int(m[2]) + 4}"),
    ("other branch", r"^s_cbranch_scc0", "s_cbranch_scc1"),
    ("other branch", r"^s_cbranch_scc1", "s_cbranch_scc0"),
    ("other branch", r"^s_cbranch_vccz", "s_cbranch_vccnz"),
    ("all lanes", r"^s_and_saveexec_b64 (\S+), \S+$", r"s_mov_b64 \1, exec"),
    ("select the other", r"^v_cndmask_b32_e32 (\S+), (v\S+), (v\S+), ", r"v_cndmask_b32_e32 \1, \3, \2, "),
    ("last bit of a constant", r"0x([0-9a-f]{8})\b", lambda m: f"0x{int(m[1], 16) ^ 1:08x}"),
    ("one more", r"^(s_(?:add|sub|lshl|lshr|and)_\w+ \S+, \S+), (\d+)$", lambda m: f"{m[1]}, {int(m[2]) + 1}"),
    ("no negation", r" neg_lo:\[0,1\] neg_hi:\[0,1\]", ""),
    ("truth table", r"bitop3:0x([0-9a-f]+)", lambda m: f"bitop3:{int(m[1], 16) ^ 1:#x}"),
    ("bytes of a permutation", r"^v_perm_b32 (\S+), (\S+), (\S+), (\S+)$", r"v_perm_b32 \1, \3, \2, \4"),
    ("nearest of two", r"^v_cvt_pk_(\w+)_f32 (\S+), (\S+), (\S+)$", r"v_cvt_pk_\1_f32 \2, \4, \3"),
    ("another lane", r"row_shr:8", "row_shr:7"),
]  # fmt: skip


def mutants_of(name: str, text: str, executed: set[str]) -> Iterator[Mutant]:
    """All that a kernel has, in instructions that some case runs."""
    at = 0
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        found = INSTRUCTION.match(line.rstrip("\n"))
        was = f"{found['opcode']} {found['rest'] or ''}".strip() if found else ""
        told = f"{was} (line {number})"
        if told in executed:
            for kind, pattern, new in CHANGES:
                becomes = re.sub(pattern, new, was, count=1)
                if becomes != was:
                    yield Mutant(name, kind, at, at + len(line), told, f"\t{becomes}\n")
        at += len(line)


def instructions_by_block(text: str) -> list[set[str]]:
    """The instructions of each block, with what ends it."""
    return [{i.text for i in [*block.code, *([block.end] if block.end else [])]} for block in parse(text).blocks]
