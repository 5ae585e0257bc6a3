"""The interpreter of AMD's machine code (tests/gcn): what it computes, what it refuses, the faults that it must find.

Results are compared with the instructions' definitions in whole numbers, or in float64 rounded once.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.gcn import arithmetic
from tests.gcn.machine import Machine
from tests.gcn.mutants import CHANGES, instructions_by_block, mutants_of
from tests.gcn.parse import BEGINS, MODES
from tests.gcn.translate import translate
from tests.ptx.faults import Report
from tests.ptx.groups import STEPS
from tests.ptx.memory import Allocation
from tests.ptx.parse import PtxError

u2, u4, u8, i4, f2, f4 = np.uint16, np.uint32, np.uint64, np.int32, np.float16, np.float32
M32, M64 = (1 << 32) - 1, (1 << 64) - 1
TOLD = MODES | BEGINS | {
    "kernarg_size": "8", "user_sgpr_count": "2", "user_sgpr_kernarg_preload_length": "0", "next_free_vgpr": "40",
}  # fmt: skip
ABOUT = """
amdhsa.kernels:
  - .args:
      - .offset:         0
        .size:           8
        .value_kind:     global_buffer
    .max_flat_workgroup_size: 256
    .name:           k
    .symbol:         k.kd
"""
# s[4:5]: the memory. v0: the thread in its block, v1: four times that, v[2:3]: the address of its word.
HEAD = """k:
	s_load_dwordx2 s[4:5], s[0:1], 0x0
	s_waitcnt lgkmcnt(0)
	v_lshlrev_b32_e32 v1, 2, v0
	v_mov_b32_e32 v2, v1
	v_mov_b32_e32 v3, 0
	v_lshl_add_u64 v[2:3], v[2:3], 0, s[4:5]
"""


def text_of(body: str, **told: str) -> str:
    lines = "\n".join(f"\t{line}" if not line.startswith(".L") else line for line in map(str.strip, body.splitlines()))
    about = "\n".join(f"\t\t.amdhsa_{name} {value}" for name, value in (TOLD | told).items())
    return f"{HEAD}{lines}\n\ts_endpgm\n\t.section\t.rodata\n{about}\n{ABOUT}"


def run(body: str, memory: np.ndarray, threads: int = 64, grid: int = 1, limit: int = STEPS, **how: bool) -> Report:
    address = memory.ctypes.data
    there = [Allocation("memory", address, memory.nbytes, **how)]
    return Machine(translate(text_of(body)), grid, threads, bytes(ctypes.c_uint64(address)), there, 1024).run(limit)


def result(body: str, *columns: Any, out: str = "v20") -> np.ndarray:
    """What is in a register after the body, with each column's numbers in v10, v11, .., one for a lane."""
    given = np.array([np.resize(np.asarray(c, u4), 64) for c in columns], u4).reshape(-1, 64)
    memory = np.concatenate([np.zeros((1, 64), u4), given]).reshape(-1)
    loads = [f"global_load_dword v{10 + n}, v[2:3], off offset:{256 * (n + 1)}" for n in range(len(columns))]
    report = run("\n".join([*loads, body, f"global_store_dword v[2:3], {out}, off"]), memory)
    assert not report.faults, report.told()
    return memory[:64]


def numbers(count: int = 64, seed: int = 1) -> list[int]:
    draw, edges = random.Random(seed), [0, 1, 2, 31, 32, 0x7FFFFFFF, 0x80000000, M32]
    return [draw.choice([draw.getrandbits(32), draw.getrandbits(5), draw.choice(edges)]) for _ in range(count)]


def signed(x: int, bits: int = 32) -> int:
    return x - (1 << bits) if x >> bits - 1 else x


def byte_of(a: int, b: int, pick: int) -> int:
    return (a << 32 | b) >> 8 * pick & 0xFF if pick < 8 else 0 if pick == 12 else 0xFF


INTEGERS: list[tuple[str, Callable[..., int]]] = [
    ("v_add_u32_e32 v20, v10, v11", lambda a, b, c: a + b),
    ("v_sub_u32_e32 v20, v10, v11", lambda a, b, c: a - b),
    ("v_subrev_u32_e32 v20, v10, v11", lambda a, b, c: b - a),
    ("v_sub_u32_e64 v20, v10, v11 clamp", lambda a, b, c: max(a - b, 0)),
    ("v_mul_lo_u32 v20, v10, v11", lambda a, b, c: a * b),
    ("v_mul_hi_u32 v20, v10, v11", lambda a, b, c: a * b >> 32),
    ("v_and_b32_e32 v20, 0xff00ff, v11", lambda a, b, c: b & 0xFF00FF),
    ("v_or_b32_e32 v20, 1.0, v11", lambda a, b, c: b | 0x3F800000),
    ("v_xor_b32_e32 v20, -4, v11", lambda a, b, c: b ^ M32 - 3),
    ("v_lshlrev_b32_e32 v20, v10, v11", lambda a, b, c: b << (a & 31)),
    ("v_lshrrev_b32_e32 v20, v10, v11", lambda a, b, c: b >> (a & 31)),
    ("v_ashrrev_i32_e32 v20, v10, v11", lambda a, b, c: signed(b) >> (a & 31)),
    ("v_min_u32_e32 v20, v10, v11", lambda a, b, c: min(a, b)),
    ("v_max_i32_e32 v20, v10, v11", lambda a, b, c: max(signed(a), signed(b))),
    ("v_min_i32_e32 v20, v10, v11", lambda a, b, c: min(signed(a), signed(b))),
    ("v_max_u32_e32 v20, v10, v11", lambda a, b, c: max(a, b)),
    ("v_not_b32_e32 v20, v10", lambda a, b, c: ~a),
    ("v_lshlrev_b64 v[22:23], v12, v[10:11]\nv_xor_b32_e32 v20, v22, v23",
     lambda a, b, c: (x := (b << 32 | a) << (c & 63)) ^ x >> 32),
    ("v_sub_co_u32_e32 v20, vcc, v10, v11\nv_subbrev_co_u32_e32 v20, vcc, v10, v12, vcc", lambda a, b, c: c - a - (a < b)),
    ("v_add3_u32 v20, v10, v11, v12", lambda a, b, c: a + b + c),
    ("v_and_or_b32 v20, v10, v11, v12", lambda a, b, c: a & b | c),
    ("v_or3_b32 v20, v10, v11, v12", lambda a, b, c: a | b | c),
    ("v_xad_u32 v20, v10, v11, v12", lambda a, b, c: (a ^ b) + c),
    ("v_lshl_or_b32 v20, v10, v11, v12", lambda a, b, c: a << (b & 31) | c),
    ("v_lshl_add_u32 v20, v10, v11, v12", lambda a, b, c: (a << (b & 31)) + c),
    ("v_add_lshl_u32 v20, v10, v11, v12", lambda a, b, c: (a + b & M32) << (c & 31)),
    ("v_bfe_u32 v20, v10, v11, v12", lambda a, b, c: a >> (b & 31) & (1 << (c & 31)) - 1),
    ("v_bfi_b32 v20, v10, v11, v12", lambda a, b, c: a & b | ~a & c),
    ("v_alignbit_b32 v20, v10, v11, v12", lambda a, b, c: (a << 32 | b) >> (c & 31)),
    ("v_bitop3_b32 v20, v10, v11, v12 bitop3:0x96", lambda a, b, c: a ^ b ^ c),
    ("v_bitop3_b32 v20, v10, v11, v12 bitop3:0xec", lambda a, b, c: a & c | b),
    ("v_add_u32_sdwa v20, v10, v11 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1 src1_sel:BYTE_2",
     lambda a, b, c: (a >> 16) + (b >> 16 & 0xFF)),
    ("v_pack_b32_f16 v20, v10, v11", lambda a, b, c: a & 0xFFFF | (b & 0xFFFF) << 16),
    ("v_mad_u64_u32 v[20:21], s[6:7], v10, v11, v[11:12]", lambda a, b, c: a * b + (c << 32 | b)),
    ("v_mad_u64_u32 v[22:23], s[6:7], v10, v11, v[11:12]\nv_mov_b32_e32 v20, v23",
     lambda a, b, c: a * b + (c << 32 | b) >> 32),
    ("v_mad_u64_u32 v[22:23], vcc, v10, v11, v[11:12]\nv_cndmask_b32_e32 v20, v10, v12, vcc",
     lambda a, b, c: c if a * b + (c << 32 | b) > M64 else a),
    ("v_lshl_add_u64 v[22:23], v[10:11], 3, v[11:12]\nv_mov_b32_e32 v20, v23",
     lambda a, b, c: ((b << 32 | a) << 3) + (c << 32 | b) >> 32),
    ("v_lshrrev_b64 v[20:21], v12, v[10:11]", lambda a, b, c: (b << 32 | a) >> (c & 63)),
    ("v_ashrrev_i64 v[22:23], v12, v[10:11]\nv_mov_b32_e32 v20, v23",
     lambda a, b, c: signed(b << 32 | a, 64) >> (c & 63) >> 32),
    ("v_add_co_u32_e32 v20, vcc, v10, v11\nv_addc_co_u32_e32 v20, vcc, v12, v12, vcc",
     lambda a, b, c: 2 * c + (a + b > M32)),
    ("v_sub_co_u32_e32 v20, vcc, v10, v11\nv_subb_co_u32_e32 v20, vcc, v12, v10, vcc",
     lambda a, b, c: c - a - (a < b)),
    ("v_subrev_co_u32_e32 v20, vcc, v10, v11\nv_cndmask_b32_e64 v20, 0, 1, vcc", lambda a, b, c: int(b < a)),
    ("v_cmp_lt_i32_e64 s[6:7], v10, v11\nv_cndmask_b32_e64 v20, v10, v12, s[6:7]",
     lambda a, b, c: c if signed(a) < signed(b) else a),
    ("v_cmp_gt_u32_e32 vcc, v10, v11\nv_cndmask_b32_e32 v20, v10, v12, vcc", lambda a, b, c: c if a > b else a),
    ("v_cmp_lt_i64_e32 vcc, v[10:11], v[11:12]\nv_cndmask_b32_e64 v20, 0, 1, vcc",
     lambda a, b, c: int(signed(b << 32 | a, 64) < signed(c << 32 | b, 64))),
    ("v_mov_b32_e32 v13, 0x040c0703\nv_perm_b32 v20, v10, v11, v13",
     lambda a, b, c: sum(byte_of(a, b, pick) << 8 * n for n, pick in enumerate((3, 7, 12, 4)))),
    ("v_cvt_f32_u32_e32 v20, v10\nv_cvt_u32_f32_e32 v20, v20", lambda a, b, c: min(int(f4(a)), M32)),
    ("v_pk_mov_b32 v[20:21], v[10:11], v[20:21] op_sel:[1,0]\nv_pk_mov_b32 v[20:21], v[10:11], v[20:21] op_sel:[0,0]\n"
     "v_xor_b32_e32 v20, v20, v21", lambda a, b, c: a ^ b),
    ("v_mov_b32_e32 v13, 0x18060d0c\nv_perm_b32 v20, v10, v11, v13",
     lambda a, b, c: sum(byte << 8 * n for n, byte in enumerate((0, 0xFF, byte_of(a, b, 6), 0xFF)))),
    ("v_cvt_f32_i32_e32 v20, v10", lambda a, b, c: int(f4(signed(a)).view(u4))),
    ("v_cvt_f32_u32_e32 v20, v10", lambda a, b, c: int(f4(a).view(u4))),
    ("v_bfe_i32 v20, v10, 4, 1", lambda a, b, c: -(a >> 4 & 1)),
]  # fmt: skip


@pytest.mark.parametrize(("body", "wanted"), INTEGERS, ids=[body.replace("\n", "; ") for body, _ in INTEGERS])
def test_integers(body: str, wanted: Callable[..., int]) -> None:
    a, b, c = (numbers(seed=seed) for seed in (1, 2, 3))
    assert result(body, a, b, c).tolist() == [wanted(*some) & M32 for some in zip(a, b, c, strict=True)]


SCALARS: list[tuple[str, int]] = [
    ("s_mov_b32 s8, 0xffffffff\ns_add_u32 s8, s8, s8\ns_addc_u32 s9, 5, 0", M32 - 1 | 6 << 32),
    ("s_mov_b32 s8, 3\ns_sub_u32 s8, s8, 4\ns_subb_u32 s9, 0, 0", M64),
    ("s_mov_b32 s8, 7\ns_sub_u32 s8, 3, s8\ns_subb_u32 s9, 1, 0", M32 - 3),
    ("s_movk_i32 s8, 0xfff0\ns_ashr_i32 s9, s8, 2", M32 - 15 | (M32 - 3) << 32),
    ("s_mov_b64 s[8:9], -2\ns_lshl_b64 s[8:9], s[8:9], 4", M64 - 31),
    ("s_mov_b64 s[8:9], -2\ns_lshr_b64 s[8:9], s[8:9], 60", 15),
    ("s_mov_b32 s8, 0x7fffffff\ns_add_i32 s8, s8, 1\ns_cselect_b32 s9, 7, 8", 1 << 31 | 7 << 32),
    ("s_mov_b32 s8, 0x80000000\ns_mul_hi_i32 s9, s8, s8\ns_mul_hi_u32 s8, s8, 6", 3 | 1 << 62),
    ("s_mov_b32 s8, 0x12345678\ns_bfe_u32 s9, s8, 0x80008\ns_and_b32 s8, s8, 0xff", 0x78 | 0x56 << 32),
    ("s_mov_b32 s8, 0x40\ns_bfe_i32 s9, s8, 0x10006\ns_bfe_i32 s8, s8, 0x10005", M32 << 32),
    ("s_mov_b32 s8, 5\ns_bitcmp1_b32 s8, 1\ns_cselect_b64 s[8:9], -1, 0", 0),
    ("s_mov_b32 s8, 5\ns_cmpk_lt_i32 s8, 0xfff0\ns_cselect_b32 s9, 1, 2", 5 | 2 << 32),
    ("s_mov_b32 s8, 5\ns_cmp_lt_i32 s8, -16\ns_cselect_b32 s9, 1, 2", 5 | 2 << 32),
    ("s_mov_b32 s8, 0xffffffff\ns_add_u32 s9, s8, 1\ns_addc_u32 s9, s8, 0\ns_addc_u32 s8, 5, 0", 6),
    ("s_mov_b32 s8, 0\ns_sub_u32 s9, s8, 1\ns_subb_u32 s9, s8, 0\ns_subb_u32 s8, 5, 0", 4 | M32 << 32),
    ("s_mov_b32 s8, 0x80000000\ns_sub_i32 s9, s8, 1\ns_cselect_b32 s8, 7, 8", 7 | 0x7FFFFFFF << 32),
    ("s_mov_b32 s8, -8\ns_max_i32 s9, s8, 3\ns_min_u32 s8, s8, 3", 3 | 3 << 32),
    ("s_mov_b32 s8, 4\ns_cmp_eq_u32 s8, 4\ns_mul_i32 s9, s8, 0\ns_cselect_b32 s8, 1, 2", 1),
    ("s_mov_b32 s8, 4\ns_cmp_eq_u32 s8, 4\ns_ashr_i32 s9, s8, 5\ns_cselect_b32 s8, 1, 2", 2),
    ("s_mov_b64 s[8:9], -2\ns_ashr_i64 s[8:9], s[8:9], 1", M64),
    ("s_mov_b64 s[8:9], -1\ns_not_b64 s[8:9], s[8:9]\ns_cselect_b32 s8, 1, 2", 2),
    ("s_mov_b32 s8, 5\ns_lshl2_add_u32 s9, s8, 1\ns_lshl3_add_u32 s8, s8, 1", 41 | 21 << 32),
    ("s_mov_b32 s8, 0x12345\ns_pack_ll_b32_b16 s9, s8, 7\ns_mulk_i32 s8, 0xffff", M32 + 1 - 0x12345 | 0x72345 << 32),
    ("s_mov_b32 s8, 0x7fffffff\ns_addk_i32 s8, 0x1\ns_cselect_b32 s9, 7, 8", 1 << 31 | 7 << 32),
    ("s_mov_b32 s8, 0xfff0\ns_cmpk_eq_u32 s8, 0xfff0\ns_cselect_b32 s9, 1, 2", 0xFFF0 | 1 << 32),
    ("s_mov_b32 s8, 0x12345678\ns_bfe_u32 s9, s8, 0x200000", 0x12345678 | 0x12345678 << 32),
    ("s_mov_b32 vcc_lo, 5\ns_mov_b32 vcc_hi, 6\ns_mov_b64 s[8:9], vcc", 5 | 6 << 32),
    (
        "s_mov_b64 s[8:9], exec\ns_and_saveexec_b64 s[10:11], 0\ns_cselect_b32 s12, 1, 2\ns_mov_b64 exec, s[10:11]\n"
        "s_mov_b32 s8, s12",
        2 | M32 << 32,
    ),
    ("s_mov_b64 s[8:9], 12\ns_andn2_b64 s[8:9], s[8:9], 4\ns_not_b64 s[8:9], s[8:9]", M64 - 8),
]


@pytest.mark.parametrize(("body", "wanted"), SCALARS, ids=[body.replace("\n", "; ") for body, _ in SCALARS])
def test_scalars(body: str, wanted: int) -> None:
    """In both halves of s[8:9]; results that take an operand's place, too."""
    for half in (0, 1):
        found = result(f"{body}\nv_mov_b32_e32 v20, s{8 + half}")
        assert set(found.tolist()) == {wanted >> 32 * half & M32}


def bits(values: Any) -> np.ndarray:
    return np.asarray(values, f4).view(u4)


FLOATS = [
    0.0,
    -0.0,
    1.0,
    -1.5,
    3.25e-39,
    -1e-45,
    65519.9,
    65520.0,
    1e30,
    -1e38,
    np.inf,
    -np.inf,
    2.0**-24,
    1 + 2.0**-12,
]


def drawn(seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return np.concatenate([draw.permutation(np.array(FLOATS, f4)), draw.standard_normal(50).astype(f4)])


def test_sums_and_products_round_once() -> None:
    a, b, c = (drawn(seed) for seed in (1, 2, 3))
    with np.errstate(all="ignore"):
        product = a.astype(np.longdouble) * b.astype(np.longdouble)
        exact = product + c.astype(np.longdouble)
        for body, wanted in {
            "v_mul_f32_e64 v20, v10, -v11": -(a * b),
            "v_sub_f32_e64 v20, |v10|, v11": np.abs(a) - b,
            "v_subrev_f32_e32 v20, v10, v11": b - a,
            "v_trunc_f32_e32 v20, v10": np.trunc(a),
            "v_mov_b32_e32 v20, v12\nv_fmac_f32_e32 v20, v10, v11": exact.astype(f4),
            "v_fmaak_f32 v20, v10, v11, 0x3fc00000": (product + np.longdouble(1.5)).astype(f4),
            "v_fmamk_f32 v20, v10, 0xbf000000, v12": (a.astype(np.longdouble) / -2 + c).astype(f4),
            "v_pk_fma_f32 v[20:21], v[10:11], v[11:12], v[12:13] op_sel_hi:[0,1,1]": exact.astype(f4),
            "v_pk_mul_f32 v[22:23], v[10:11], v[11:12] neg_hi:[0,1]\nv_mov_b32_e32 v20, v23": -(b * c),
            "v_pk_mul_f32 v[22:23], v[10:11], v[11:12] op_sel:[1,0] op_sel_hi:[0,0]\nv_mov_b32_e32 v20, v22": b * b,
            "v_pk_add_f32 v[22:23], v[10:11], 1.0 op_sel_hi:[1,0]\nv_mov_b32_e32 v20, v23": b + f4(1),
        }.items():
            found = result(body, bits(a), bits(b), bits(c), bits(c)).view(f4)
            same = (found == wanted.astype(f4)) | (np.isnan(found) & np.isnan(wanted))
            assert same.all(), (body, a[~same], b[~same], found[~same])


def test_conversions() -> None:
    a, b = drawn(4), drawn(5)
    with np.errstate(all="ignore"):
        half, other = a.astype(f2), b.astype(f2)
    assert (result("v_cvt_f16_f32_e32 v20, v10", bits(a)) == half.view(u2)).all()
    packed = half.view(u2).astype(u4) | other.view(u2).astype(u4) << u4(16)
    assert (result("v_cvt_pk_f16_f32 v20, v10, v11", bits(a), bits(b)) == packed).all()
    quiet = result("v_cvt_pk_bf16_f32 v20, v10, v11", [0x7F800001], [0xFFC12345])[0]
    assert quiet & 0x7FFF > 0x7F80
    assert quiet >> 16 & 0x7FFF > 0x7F80
    assert result("v_cvt_u32_f32_e32 v20, v10", bits([1.99, -3.5, 4e9, 1e20]))[:4].tolist() == [1, 0, 4000000000, M32]
    assert set(result("v_cvt_f32_f16_e32 v20, 1.0").tolist()) == {0x3F800000}
    assert set(result("v_pack_b32_f16 v20, 1.0, v10", packed).tolist()) == {
        int(x) << 16 | 0x3C00 for x in packed & u4(0xFFFF)
    }
    upper = "v_cvt_f32_f16_sdwa v20, v10 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1"
    assert (result(upper, packed) == bits(other)).all()
    mixed = "v_fma_mix_f32 v20, v10, v11, v11 op_sel:[1,0,0] op_sel_hi:[1,0,0]"
    with pytest.raises(PtxError, match="the upper half of v11"):
        result(mixed.replace("op_sel:[1,0,0]", "op_sel:[1,0,1]"), packed, bits(b))
    with np.errstate(all="ignore"):
        wanted = (other.astype(np.longdouble) * b + b).astype(f4)
    found = result(mixed, packed, bits(b)).view(f4)
    assert ((found == wanted) | (np.isnan(found) & np.isnan(wanted))).all()
    for minus, factor in (("v_fma_mix_f32 v20, -v10, 1.0, v11", -1), ("v_fma_mix_f32 v20, v10, 1.0, v11", 1)):
        found = result(f"{minus} op_sel_hi:[1,1,0]", packed, bits(b)).view(f4)
        with np.errstate(all="ignore"):
            wanted = factor * half.astype(f4) + b
        assert ((found == wanted) | (np.isnan(found) & np.isnan(wanted))).all()
    import torch

    told = torch.from_numpy(np.stack([a, b])).bfloat16().view(torch.int16).numpy().view(u2).astype(u4)
    assert (result("v_cvt_pk_bf16_f32 v20, v10, v11", bits(a), bits(b)) == told[0] | told[1] << u4(16)).all()


def test_least_and_greatest_know_nans_and_zeros() -> None:
    nan, signaling = 0x7FC00000, 0x7F800001
    a = [nan, 0x3F800000, 0x80000000, 0, signaling, 0x3F800000]
    b = [0x40000000, nan, 0, 0x80000000, 0x40000000, 0x40000000]
    for name, wanted in {
        "v_max_f32_e32": [0x40000000, 0x3F800000, 0, 0, None, 0x40000000],
        "v_min_f32_e32": [0x40000000, 0x3F800000, 0x80000000, 0x80000000, None, 0x3F800000],
    }.items():
        found = result(f"{name} v20, v10, v11", a, b)[:6].tolist()
        assert [None if x & 0x7FFFFFFF > 0x7F800000 else x for x in found] == wanted
    middle = result("v_med3_f32 v20, v10, 1.0, v11", a, b)[:6].view(f4).tolist()
    assert middle == [1.0, 1.0, 0.0, 0.0, 2.0, 1.0]
    assert set(result("v_med3_f32 v20, 2.0, 1.0, v10", [nan]).view(f4).tolist()) == {1.0}  # the least, not the middle


ORDER = {"lt": (1, 0, 0), "eq": (0, 1, 0), "le": (1, 1, 0), "gt": (0, 0, 1), "lg": (1, 0, 1), "ge": (0, 1, 1)}
NOT = {"nge": "ge", "nlg": "lg", "ngt": "gt", "nle": "le", "neq": "eq", "nlt": "lt"}


@pytest.mark.parametrize("name", [*ORDER, *NOT, "o", "u"])
def test_comparisons_of_floats(name: str) -> None:
    """Of a smaller, an equal and a greater one; and of NaNs, on either side and on both."""
    body = f"v_cmp_{name}_f32_e32 vcc, v10, v11\nv_cndmask_b32_e64 v20, 0, 1, vcc"
    nan = 0x7FC00000
    found = result(
        body, [0x3F800000, 0x40000000, 0x40400000, nan, 0, nan], [0x40000000, 0x40000000, 0x40000000, 0, nan, nan]
    )
    if name in ("o", "u"):
        wanted = [int(name == "o")] * 3 + [int(name == "u")] * 3
    else:
        wanted = [*ORDER[name], 0, 0, 0] if name in ORDER else [*(1 - x for x in ORDER[NOT[name]]), 1, 1, 1]
    assert found[:6].tolist() == wanted


def test_reciprocals_are_within_one_unit_and_not_always_the_nearest() -> None:
    x = np.random.default_rng(1).uniform(1, 1000, 64).astype(f4)
    found, exact = result("v_rcp_f32_e32 v20, v10", bits(x)).view(f4), 1 / x.astype(np.float64)
    off = np.abs(found - exact) / np.spacing(exact.astype(f4)).astype(np.float64)
    assert (off < 1).all()
    assert 8 < (off > 0.5).sum() < 56
    assert arithmetic.reciprocal(np.array([0.25, -2.0, np.inf], f4)).tolist() == [4.0, -0.5, 0.0]


def test_lanes_that_do_not_work_keep_what_they_have() -> None:
    body = """v_mov_b32_e32 v20, 7
    v_cmp_gt_u32_e32 vcc, 10, v0
    s_and_saveexec_b64 s[8:9], vcc
    v_mov_b32_e32 v20, v0
    v_cmp_gt_u32_e64 s[10:11], 64, v0
    v_readfirstlane_b32 s12, v0
    s_andn2_b64 exec, s[8:9], exec
    v_readfirstlane_b32 s13, v0
    s_or_b64 exec, exec, s[8:9]
    v_mov_b32_e32 v21, s10
    v_add_u32_e32 v22, s12, v0
    v_sub_u32_e32 v22, v22, v0
    v_mov_b32_e32 v23, s13"""
    assert result(body).tolist() == [*range(10), *[7] * 54]
    assert set(result(body, out="v21").tolist()) == {(1 << 10) - 1}
    assert set(result(body, out="v22").tolist()) == {0}
    assert set(result(body, out="v23").tolist()) == {10}


def test_single_lanes_are_read_and_written_whether_they_work_or_not() -> None:
    body = """v_mov_b32_e32 v20, v0
    s_mov_b64 s[8:9], 1
    s_and_saveexec_b64 s[10:11], s[8:9]
    v_readlane_b32 s12, v20, 5
    s_add_i32 s12, s12, 100
    v_writelane_b32 v20, s12, 63
    s_or_b64 exec, exec, s[10:11]"""
    assert result(body).tolist() == [*range(63), 105]


DPP: list[tuple[str, Callable[[int], int | None]]] = [
    ("row_shr:8", lambda n: n - 8 if n % 16 >= 8 else None),
    ("row_shl:1", lambda n: n + 1 if n % 16 < 15 else None),
    ("row_ror:4", lambda n: n // 16 * 16 + (n - 4) % 16),
    ("quad_perm:[1,0,3,2]", lambda n: n ^ 1),
    ("row_bcast:15", lambda n: n // 16 * 16 - 1 if n >= 16 else None),
    ("row_bcast:31", lambda n: 31 if n >= 32 else None),
]


@pytest.mark.parametrize(("control", "source"), DPP, ids=[control for control, _ in DPP])
def test_other_lanes(control: str, source: Callable[[int], int | None]) -> None:
    """From where no lane is comes 0 with bound_ctrl, nothing without; rows that are left out keep what they have."""
    sources, ends = [source(n) for n in range(64)], "row_mask:0xf bank_mask:0xf bound_ctrl:1"
    assert result(f"v_mov_b32_dpp v20, v0 {control} {ends}").tolist() == [x or 0 for x in sources]
    kept = f"v_mov_b32_e32 v20, 99\nv_mov_b32_dpp v20, v0 {control} {ends.removesuffix(' bound_ctrl:1')}"
    assert result(kept).tolist() == [99 if x is None else x for x in sources]
    some = f"v_mov_b32_e32 v20, 99\nv_mov_b32_dpp v20, v0 {control} {ends.replace('0xf', '0xa', 1)}"
    assert result(some).tolist() == [x or 0 if n // 16 % 2 else 99 for n, x in enumerate(sources)]


def test_lanes_that_do_not_work_give_nothing_to_others() -> None:
    body = """v_mov_b32_e32 v20, 99
    s_mov_b64 s[8:9], exec
    s_mov_b32 exec_lo, 0xfffffff0
    v_mov_b32_dpp v20, v0 row_shr:1 row_mask:0xf bank_mask:0xf bound_ctrl:1
    s_mov_b64 exec, s[8:9]"""
    assert result(body)[:8].tolist() == [99, 99, 99, 99, 0, 4, 5, 6]


@pytest.mark.parametrize("condition", ["vccz", "scc0", "execnz", "vccnz", "scc1", "execz"])
def test_branches(condition: str) -> None:
    """VCC is 0 and SCC 0, EXEC is not: the first three lead away."""
    before = "v_mov_b32_e32 v20, 5\ns_mov_b64 vcc, 0\ns_cmp_eq_u32 1, 2"
    found = result(f"{before}\ns_cbranch_{condition} .LBB0_1\nv_mov_b32_e32 v20, 6\n.LBB0_1:")
    assert set(found.tolist()) == {5 if condition in ("vccz", "scc0", "execnz") else 6}


def test_waves_part_and_meet_again() -> None:
    """Each of eight waves counts to its own number; a wave's place in the grid is in the register after its arguments."""
    body = """v_readfirstlane_b32 s8, v0
    s_lshr_b32 s8, s8, 6
    s_lshl_b32 s9, s2, 2
    s_add_i32 s8, s8, s9
    s_mov_b32 s10, 0
    .LBB0_1:
    s_add_i32 s10, s10, 3
    s_sub_i32 s8, s8, 1
    s_cmp_ge_i32 s8, 0
    s_cbranch_scc1 .LBB0_1
    v_mov_b32_e32 v20, s10
    s_lshl_b32 s9, s2, 10
    s_add_u32 s4, s4, s9
    s_addc_u32 s5, s5, 0
    global_store_dword v1, v20, s[4:5]"""
    memory = np.zeros(512, u4)
    report = run(body, memory, threads=256, grid=2)
    assert not report.faults
    assert memory.tolist() == [3 * (n + 1) for n in range(8) for _ in range(64)]
    with pytest.raises(PtxError, match="does not end"):
        run(".LBB0_1:\ns_branch .LBB0_1", memory, limit=100)


# -------------------------------------------------------------------------------------------------------------- memory
PUT, TAKE = "ds_write_b32 v1, v0\n", "v_xor_b32_e32 v5, 0xfc, v1\nds_read_b32 v6, v5\ns_waitcnt lgkmcnt(0)\n"
KEEP = "global_store_dword v[2:3], v6, off"
FAULTS: list[tuple[str, set[str]]] = [
    (f"{PUT}s_barrier\n{TAKE}{KEEP}", set()),
    (f"{PUT}{TAKE}{KEEP}", {"race"}),
    (f"{TAKE}{KEEP}", {"uninitialised"}),
    ("global_store_dword v[2:3], v0, off offset:4", {"out of bounds"}),
    ("v_lshl_add_u64 v[2:3], v[2:3], 0, 2\nglobal_store_dword v[2:3], v0, off", {"misaligned", "out of bounds"}),
    ("v_mov_b32_e32 v4, 0\nglobal_store_dword v4, v0, s[4:5]", {"race"}),
    ("s_load_dword s8, s[4:5], 0x100", {"out of bounds"}),
    (f"v_readfirstlane_b32 s8, v0\ns_cmp_lg_u32 s8, 0\ns_cbranch_scc1 .LBB0_1\ns_barrier\n.LBB0_1:\n{KEEP}", {"barrier"}),
]  # fmt: skip


@pytest.mark.parametrize(("body", "kinds"), FAULTS, ids=[" ".join(sorted(kinds)) or "none" for _, kinds in FAULTS])
def test_faults_are_found(body: str, kinds: set[str]) -> None:
    threads = 128 if kinds == {"barrier"} else 64
    assert run(body, np.zeros(threads, u4), threads=threads).kinds == kinds


def test_memory_that_is_only_read_is_not_written() -> None:
    memory = np.zeros(64, u4)
    assert run("global_store_dword v[2:3], v0, off", memory, writable=False).kinds == {"read-only"}
    assert not memory.any()


def test_narrow_and_wide_accesses() -> None:
    memory = np.arange(256, dtype=u4) * u4(0x01010101)
    before = memory.copy()
    body = """v_lshlrev_b32_e32 v4, 4, v0
    global_load_dwordx4 v[8:11], v4, s[4:5]
    global_load_ushort v12, v4, s[4:5] offset:6
    v_mov_b32_e32 v13, 0x1234
    v_xor_b32_e32 v12, v12, v8
    v_add_u32_e32 v10, 0x12340000, v10
    global_store_dwordx3 v4, v[11:13], s[4:5]
    global_store_short_d16_hi v4, v10, s[4:5] offset:14
    ds_write2_b32 v4, v9, v10 offset0:1 offset1:2
    ds_read2_b32 v[14:15], v4 offset0:2 offset1:1
    s_barrier
    ds_write2st64_b32 v1, v14, v15 offset1:1
    ds_read2st64_b32 v[16:17], v1 offset1:1
    v_sub_u32_e32 v16, v16, v17
    global_store_byte v4, v16, s[4:5] offset:12"""
    assert not run(body, memory, threads=64).faults
    rows = before.reshape(64, 4)
    wanted = rows.copy()
    wanted[:, 0] = rows[:, 3]
    wanted[:, 1] = (rows[:, 1] >> u4(16)) ^ rows[:, 0]
    wanted[:, 2] = u4(0x1234)
    upper = rows[:, 2] + u4(0x12340000) & u4(0xFFFF0000)
    wanted[:, 3] = upper | rows[:, 3] & u4(0xFF00) | (rows[:, 2] - rows[:, 1] & u4(0xFF))
    assert (memory.reshape(64, 4) == wanted).all()


def test_pairs_in_shared_memory_and_a_large_offset() -> None:
    """Offsets of ds_read2_b64 count pairs; a lane's offset beside a scalar address has no sign."""
    memory = np.zeros(128, u4)
    body = """v_lshlrev_b32_e32 v4, 4, v0
    v_add_u32_e32 v5, 100, v0
    v_mov_b32_e32 v6, 7
    v_add_u32_e32 v7, 200, v0
    v_mov_b32_e32 v8, 9
    ds_write2_b64 v4, v[5:6], v[7:8] offset1:1
    ds_read2_b64 v[10:13], v4 offset0:1
    v_add_u32_e32 v10, v10, v12
    v_add_u32_e32 v11, v11, v13
    s_sub_u32 s6, s4, 0x80000000
    s_subb_u32 s7, s5, 0
    v_lshlrev_b32_e32 v14, 3, v0
    v_or_b32_e32 v14, 0x80000000, v14
    global_store_dwordx2 v14, v[10:11], s[6:7]"""
    assert not run(body, memory).faults
    assert memory.reshape(64, 2).tolist() == [[300 + 2 * n, 16] for n in range(64)]


def test_atomic_sums() -> None:
    memory = np.zeros(64, u4)
    assert not run("v_mov_b32_e32 v4, 0\nglobal_atomic_add v4, v0, s[4:5]", memory).faults
    assert memory[0] == sum(range(64))


# ------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("v_fma_mixlo_f16 v4, v0, v0, v0", "instruction v_fma_mixlo_f16"),
        ("v_sqrt_f32_e32 v4, v0", "instruction v_sqrt_f32_e32"),
        ("v_add_f32_e64 v4, v0, v0 mul:2", "mul"),
        ("v_add_u32_e64 v4, v0, v0 clamp", "clamp"),
        ("v_mov_b32_dpp v4, v0 wave_shr:1 row_mask:0xf bank_mask:0xf bound_ctrl:1", "wave_shr:1"),
        ("v_pk_add_f32 v[4:5], v[0:1], 1.0", "the upper half of 1.0"),
        ("s_mov_b64 s[8:9], 0xfffffff0", "whether it is extended by its sign"),
        ("s_max_i32 s8, 1, 2\ns_cselect_b32 s8, 1, 2", "SCC is asked for"),
        ("v_mov_b32_e32 s4, v0", "is not 1 of the v registers"),
        ("v_perm_b32 v4, v0, v0, 9", "v_perm_b32 of a sign"),
        ("s_cbranch_cdbgsys .LBB0_1\n.LBB0_1:", "cdbgsys"),
        ("s_branch .LBB0_1", "no such label"),
        ("v_lshl_add_u64 v[4:5], v[2:3], 5, v[2:3]", "by more than 4"),
        (
            "v_add_u32_sdwa v4, v0, -1 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:DWORD src1_sel:BYTE_0",
            "a part of -1",
        ),
        ("v_fma_mix_f32 v4, 1.0, v0, v0 op_sel:[1,0,0] op_sel_hi:[1,0,0]", "the upper half of 1.0"),
        ("global_load_short_d16_hi v4, v1, s[4:5]", "global_load_short_d16_hi"),
        ("v_cmp_o_i32_e32 vcc, v0, v0", "v_cmp_o_i32"),
        ("v_cmp_ne_f32_e32 vcc, v0, v0", "v_cmp_ne_f32"),
        ("v_cmp_nge_u32_e32 vcc, v0, v0", "v_cmp_nge_u32"),
        ("s_mov_b32 s[8:9], 1", "is not 1 of the s registers"),
        ("s_mov_b64 s8, 1", "is not 2 of the s registers"),
        ("s_andn1_saveexec_b64 s[8:9], exec", "andn1"),
        (".long 0xbf800000", "in the code"),
        ("global_load_dword v4, v0, v1", "as a scalar q"),
        ("buffer_load_dword v4, v0, s[4:7], 0 offen", "instruction buffer_load_dword"),
    ],
)
def test_what_is_not_known_is_refused(body: str, said: str) -> None:
    with pytest.raises(PtxError, match=said):
        run(body, np.zeros(64, u4))


@pytest.mark.parametrize(
    "told",
    [
        {"float_denorm_mode_32": "0"},
        {"float_round_mode_16_64": "3"},
        {"ieee_mode": "0"},
        {"enable_private_segment": "1"},
    ],
    ids=lambda told: next(iter(told)),
)
def test_kernels_in_another_mode_are_refused(told: dict[str, str]) -> None:
    with pytest.raises(PtxError, match=rf"\.amdhsa_{next(iter(told))} is "):
        translate(text_of("s_nop 0", **told))


def test_the_first_block_loads_what_newer_firmware_has_loaded() -> None:
    """Behind it such firmware begins, with the arguments in these registers."""

    def told(first: str) -> Report:
        text = text_of("", user_sgpr_count="4", user_sgpr_kernarg_preload_length="2")
        text = text.replace(HEAD, f"k:\n\t{first}\n\ts_branch .LBB0_0\n.LBB0_0:\n")
        return Machine(translate(text), 1, 64, bytes(ctypes.c_uint64(0x123456789A)), []).run()

    assert not told("s_load_dwordx2 s[2:3], s[0:1], 0x0").faults
    assert told("s_load_dword s2, s[0:1], 0x0").kinds == {"preload"}


def test_mutants_change_instructions_that_some_case_runs() -> None:
    text = text_of(
        "v_fmaak_f32 v20, v10, v11, 0x3fc00000\ns_branch .LBB0_2\n.LBB0_1:\nv_xor_b32_e32 v5, v5, v0\n.LBB0_2:"
    )
    first, second, last = instructions_by_block(text)
    assert len(first) == 8
    assert last == {"s_endpgm (line 13)"}
    (fma,) = (i for i in first if i.startswith("v_fmaak"))
    found = list(mutants_of("k", text, {fma}))
    assert {m.kind for m in found} == {"fma without its sum", "fma without its product", "last bit of a constant"}
    assert "\tv_mov_b32_e32 v20, 0x3fc00000\n" in next(m for m in found if "product" in m.kind).apply(text)
    assert [m.becomes for m in mutants_of("k", text, second)] == ["\tv_or_b32_e32 v5, v5, v0\n"]
    assert len({pattern for _, pattern, _ in CHANGES}) > 30
