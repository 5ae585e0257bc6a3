"""AMD's code of Triton's passes: what is counted of it, its budgets, and that it computes what the contract asks.

No such GPU has run it: these tests are what holds it. LIMITS is as in test_machine_code.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.machine_code import amd, counts, listing
from tests.benchmarks.test_machine_code import measure, triton

# kernel: issue slots per element for one seed, for each further seed; vector registers, of which 64 let a SIMD hold eight
# waves, 96 five and 128 four; scalars that come back from a vector register, per element.
LIMITS: dict[str, dict[str, tuple[float, float, int, float]]] = {
    "gfx942": {
        triton("axpy", "fp32"): (23.5, 25.5, 64, 0),
        triton("axpy", "fp16"): (24, 24, 64, 0),
        triton("axpy", "bf16"): (28, 24, 64, 0),
        triton("axpy", "bf16", rounding="stochastic"): (34, 24, 64, 0),
        triton("axpy", "bf16", "rademacher"): (20.5, 15.5, 64, 0),
        triton("axpy", "bf16", "low_rank"): (16.5, 5, 64, 0),
        triton("scaled_axpy", "bf16"): (36.5, 24, 72, 0),
        triton("hizoo_restore", "bf16", rounding="stochastic"): (62, 26.5, 104, 1),
        triton("helene", "bf16", rounding="stochastic"): (57, 26.5, 96, 3),
        triton("adam", "bf16", rounding="stochastic"): (65.5, 25, 96, 2.5),
    },
    "gfx950": {
        triton("axpy", "fp32"): (23.5, 25.5, 64, 0),
        triton("axpy", "fp16"): (23, 24, 64, 0),
        triton("axpy", "bf16"): (23, 24, 64, 0),
        triton("axpy", "bf16", rounding="stochastic"): (34, 24, 72, 0),
        triton("axpy", "bf16", "rademacher"): (15.5, 15.5, 64, 0),
        triton("axpy", "bf16", "low_rank"): (12, 5, 64, 0),
        triton("scaled_axpy", "bf16"): (31, 24, 72, 0),
        triton("hizoo_restore", "bf16", rounding="stochastic"): (62, 26.5, 104, 1),
        triton("helene", "bf16", rounding="stochastic"): (57.5, 26.5, 96, 3),
        triton("adam", "bf16", rounding="stochastic"): (66, 25, 96, 2.5),
    },
}
# Of the first-order rule all that is said above, and the rules with the most numbers.
COMPILED = (
    "triton axpy<(.*normal|bf16, (rademacher|low_rank), nearest)|scaled_axpy<bf16, normal, nearest|"
    "(hizoo_restore|helene|adam)<bf16, normal, stochastic"
)


@pytest.fixture(scope="module", params=LIMITS)
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    pytest.importorskip("triton")
    return measure("triton", tmp_path_factory.mktemp(request.param), request.param, only=COMPILED)


@pytest.mark.built
def test_kernels_are_within_their_limits(reports: dict[str, dict[str, Any]]) -> None:
    (arch,) = {report["arch"] for report in reports.values()}
    for name, (slots, extra, registers, scalars) in LIMITS[arch].items():
        report = reports[name]
        assert 5 < report["slots"] <= slots, name
        assert 4 < report["slots_per_extra_seed"] <= extra, name
        assert report["registers"] <= registers, name
        assert report["pipes"].get("spill", 0) <= scalars, name
        if "low_rank" in name:
            assert 1 < report["slots_per_extra_rank"] <= 2.5


@pytest.mark.built
def test_no_kernel_spills_or_waits_or_computes_other_bits(reports: dict[str, dict[str, Any]]) -> None:
    assert len(reports) > 10
    for name, report in reports.items():
        assert report["deviations"] == [], name
        nothing = ("spills", "stack_bytes", "barriers", "lds")
        assert {key: report[key] for key in nothing} == dict.fromkeys(nothing, 0), name
        assert set(report["accesses"]) == {16}, name
        assert report["elements"] == 8, name
        assert report["pipes_extra"].get("spill", 0) == 0, name
        assert {"trans", "lds", "barrier"}.isdisjoint(report["pipes"] | report["pipes_extra"]), name
        assert report["pipes"]["packed"] >= (1 if "rademacher" in name or "low_rank" in name else 7), name


# ------------------------------------------------------------------------------------------------------------ listings

NORMALS = "\tv_cvt_f32_u32_e32 v1, v1\n" * 12  # of eight elements
SUMS = "\tv_pk_fma_f32 v[2:3], v[2:3], v[4:5], s[4:5]\n" * 4
PRODUCTS = "\tv_mad_u64_u32 v[2:3], s[6:7], v1, s8, 0\n" * 8
SEED = f"\tglobal_load_dwordx2 v[8:9], v0, s[6:7]\n{NORMALS}{PRODUCTS}{SUMS}"
# A loop over tiles of eight bf16, which is entered in its middle, with a loop over further seeds in it: before and behind
# that a scalar is fetched from the register that it was spilled to. The loop behind is masked.
DENSE = f"""
kernel:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
\ts_branch .LBB0_3
.LBB0_1:
\tglobal_store_dwordx4 v0, v[2:5], s[2:3]
\ts_cbranch_scc1 .LBB0_5
.LBB0_3:
\tglobal_load_dwordx4 v[2:5], v0, s[2:3]
.Ltmp7:
\ts_waitcnt vmcnt(0)
{NORMALS}{SUMS}\ts_cbranch_scc1 .LBB0_1
\tv_readlane_b32 s4, v9, 3
.LBB0_2:                                ; the loop over seeds
{SEED}\ts_cbranch_scc1 .LBB0_2
\tv_readlane_b32 s4, v9, 4
\ts_branch .LBB0_1
.LBB0_5:
\tglobal_load_ushort v2, v0, s[2:3]
\tds_write_b32 v0, v2
\tglobal_store_short v0, v2, s[2:3]
\ts_cbranch_scc1 .LBB0_5
\ts_endpgm
\t.section\t.rodata
\t\t.amdhsa_float_round_mode_32 0
\t\t.amdhsa_float_round_mode_16_64 0
\t\t.amdhsa_float_denorm_mode_32 3
\t\t.amdhsa_float_denorm_mode_16_64 3
\t\t.amdhsa_ieee_mode 1
    .private_segment_fixed_size: 12
    .sgpr_count:     20
    .sgpr_spill_count: 1
    .vgpr_count:     63
    .vgpr_spill_count: 2
"""
IR = "%1 = tail call <2 x float> @llvm.fma.v2f32(<2 x float> %0)\n" * 8


def analyse(text: str, name: str = "toy", llir: str = IR) -> dict[str, Any]:
    return amd.analyse(name, "gfx942", text, llir, 2)


def test_counter_on_a_listing() -> None:
    """Load, wait, the first seed and its guard, store and the way back; nothing of what surrounds further seeds."""
    report = analyse(DENSE)
    assert report["pipes"] == {"cvt": 12 / 8, "packed": 4 / 8, "vmem": 2 / 8, "branch": 2 / 8, "wait": 1 / 8}
    assert report["slots"] == 21 / 8
    assert report["pipes_extra"] == {"cvt": 12 / 8, "product": 1, "packed": 4 / 8, "vmem": 1 / 8, "branch": 1 / 8}
    assert report["slots_per_extra_seed"] == 26 / 8
    assert (report["elements"], report["accesses"], report["vector_bytes"]) == (8, [16, 16], 16)
    assert (report["registers"], report["scalar_registers"], report["stack_bytes"]) == (63, 20, 12)
    assert (report["spills"], report["scalar_spills"]) == (2, 1)
    assert (report["lds"], report["barriers"], report["deviations"]) == (0, 0, [])


def test_elements_of_an_unrolled_loop_over_seeds_are_counted_by_their_noise() -> None:
    report = analyse(DENSE.replace(SEED, 2 * SEED))
    assert report["slots_per_extra_seed"] == 51 / 16
    assert report["slots"] == 21 / 8


def test_a_first_seed_in_the_loop_is_counted() -> None:
    report = analyse(DENSE.replace(f"vmcnt(0)\n{NORMALS}", "vmcnt(0)\n"))
    assert report["slots"] == 9 / 8 + 26 / 8


def test_signs_are_counted_by_their_sums() -> None:
    """Four packed sums are eight elements."""
    report = analyse(DENSE.replace(NORMALS, "\tv_lshlrev_b32_e32 v1, 31, v1\n"))
    assert (report["slots"], report["slots_per_extra_seed"]) == (10 / 8, 15 / 8)


def test_spills_barriers_lds_and_narrow_accesses_of_the_hot_loop_are_seen() -> None:
    wait = "\ts_waitcnt vmcnt(0)\n"
    assert analyse(DENSE.replace(wait, "\tv_readlane_b32 s4, v9, 3\n"))["pipes"]["spill"] == 1 / 8
    assert analyse(DENSE.replace(wait, "\tv_accvgpr_read_b32 v4, a3\n"))["pipes"]["spill"] == 1 / 8
    assert analyse(DENSE.replace(wait, "\ts_barrier\n"))["barriers"] == 1
    assert analyse(DENSE.replace(wait, "\tds_read_b32 v1, v2\n"))["lds"] == 1
    assert analyse(DENSE.replace("load_dwordx4", "load_dwordx2"))["accesses"] == [8, 16]
    narrow = analyse(DENSE.replace("store_dwordx4", "store_dwordx2"))
    assert (narrow["accesses"], narrow["vector_bytes"]) == ([16, 8], 8)
    assert analyse("kernel:\n\ts_endpgm\n" + DENSE.partition("\t.section")[2])["slots"] is None
    with pytest.raises(ValueError, match="does not say its vgpr_count"):
        analyse(DENSE.replace(".vgpr_count", ".count"))


@pytest.mark.parametrize(
    ("opcode", "pipe"),
    [("v_pk_fma_f32", "packed"), ("v_pk_mul_f32", "packed"), ("v_pk_add_u16", "valu"), ("v_fma_f32", "valu"),
     ("v_mul_lo_u32", "product"), ("v_mul_hi_u32", "product"), ("v_mad_u64_u32", "product"), ("v_mul_u32_u24", "valu"),
     ("v_mul_f32_e32", "valu"), ("v_mad_u32_u24", "valu"), ("v_cvt_pk_bf16_f32", "cvt"), ("v_rcp_f32_e32", "trans"),
     ("v_readlane_b32", "spill"), ("v_writelane_b32", "spill"), ("v_readfirstlane_b32", "valu"), ("s_nop", "wait"),
     ("s_barrier", "barrier"), ("s_add_i32", "salu"), ("s_load_dwordx2", "smem"), ("s_cbranch_scc1", "branch"),
     ("ds_read_b32", "lds"), ("global_load_dwordx4", "vmem"), ("scratch_load_dword", "vmem")],
)  # fmt: skip
def test_pipes(opcode: str, pipe: str) -> None:
    assert listing.Instruction(False, opcode, "").pipe == pipe


@pytest.mark.parametrize(
    ("opcode", "width", "stored"),
    [("global_load_dwordx4", 16, 0), ("global_store_dwordx4", 16, 16), ("global_load_ushort", 2, 0),
     ("global_load_short_d16_hi", 2, 0), ("global_store_short_d16_hi", 2, 2), ("buffer_load_dwordx2", 8, 0),
     ("global_store_dword", 4, 4), ("s_load_dwordx4", 0, 0), ("flat_load_ubyte", 1, 0)],
)  # fmt: skip
def test_widths(opcode: str, width: int, stored: int) -> None:
    instruction = listing.Instruction(False, opcode, "")
    assert (instruction.global_bytes, instruction.stored) == (width, stored)


def test_a_loop_that_is_entered_in_its_middle_is_one_loop() -> None:
    """Its header is where it is entered, wherever LLVM puts the blocks."""
    kernel = listing.read_amd(DENSE)
    tiles, seeds, masked = kernel.loops
    assert kernel.within(tiles) == [seeds]
    assert kernel.blocks[tiles.header].code[0].opcode == "global_load_dwordx4"
    assert not masked.blocks & tiles.blocks


# ------------------------------------------------------------------------------------------------------------ low rank

FACTOR = "\tglobal_load_dwordx4 v[8:11], v0, s[6:7]\n" * 2 + "\tv_pk_fma_f32 v[2:3], v[2:3], v[4:5], v[6:7]\n" * 4
SEEDS = f"""
kernel:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
.LBB0_1:
\tglobal_load_dwordx4 v[2:5], v0, s[2:3]
\ts_cbranch_scc1 .LBB0_4
\ts_mov_b32 s4, 0
.LBB0_2:
\tglobal_load_dword v20, v0, s[2:3]
{FACTOR}@FACTORS@{SUMS}\ts_cbranch_scc1 .LBB0_2
.LBB0_4:
\tglobal_store_dwordx4 v0, v[2:5], s[2:3]
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
{DENSE[DENSE.index("	.section") :]}"""
FACTORS = f"\ts_cbranch_scc1 .LBB0_7\n.LBB0_6:\n\ts_add_i32 s4, s4, 1\n{FACTOR}\ts_cbranch_scc1 .LBB0_6\n.LBB0_7:\n"
LOW_RANK = "triton toy<bf16, low_rank, nearest>"


def test_counter_of_low_rank_kernels() -> None:
    """With one factor; its number of U is no narrow access of the weights, and a guard against no seeds is not taken."""
    report = analyse(SEEDS.replace("@FACTORS@", ""), LOW_RANK)
    assert report["slots"] == 17 / 8  # load, guard, move; U, two of V, eight sums, way back; store, way back
    assert report["slots_per_extra_seed"] == 12 / 8
    assert (report["elements"], report["accesses"]) == (8, [16, 16])
    with pytest.raises(ValueError, match="has 0 loops over seeds in loops over whole tiles"):
        analyse(DENSE, LOW_RANK)


def test_a_further_factor_is_counted_in_the_kernel_of_any_rank() -> None:
    any_rank = listing.read_amd(SEEDS.replace("@FACTORS@", FACTORS))
    assert counts.further_factor("toy", any_rank) == {"packed": 4 / 8, "vmem": 2 / 8, "salu": 1 / 8, "branch": 1 / 8}
    with pytest.raises(ValueError, match="toy has no loop over factors"):
        counts.further_factor("toy", listing.read_amd(DENSE))


# ---------------------------------------------------------------------------------------------------------- deviations


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ("denorm_mode_32 3", "denorm_mode_32 0", "float_denorm_mode_32 is 0 and should be 3"),
        ("round_mode_32 0", "round_mode_32 3", "float_round_mode_32 is 3 and should be 0"),
        (".amdhsa_ieee_mode 1", ".amdhsa_other 1", "ieee_mode is not told and should be 1"),
        ("\ts_waitcnt vmcnt(0)", "\tv_fmac_f32_e32 v1, v2, v3", "16 fused multiply-adds were asked and 17 are done"),
        (f"{SUMS}\ts_cbranch_scc1 .LBB0_1", "\ts_cbranch_scc1 .LBB0_1", "16 fused multiply-adds were asked and 8 are done"),
        ("\ts_waitcnt vmcnt(0)", "\tv_mac_f32_e32 v1, v2, v3", "v_mac_f32_e32 rounds its product"),
        ("\ts_waitcnt vmcnt(0)", "\tv_fma_mixlo_f16 v1, v2, v3, 0", "v_fma_mixlo_f16 may round once where two roundings"
         " were asked"),
        *[("\ts_waitcnt vmcnt(0)", f"\t{op} v1, v2, v3", f"{op} is none that is known to compute what was asked")
          for op in ("v_fma_mix_f32", "v_pk_fma_f16", "v_dot2c_f32_f16", "v_mul_legacy_f32", "v_cvt_pkrtz_f16_f32",
                     "s_setreg_imm32_b32")],
        ("\ts_waitcnt vmcnt(0)", "\tv_rsq_f32_e32 v1, v2", "v_rsq_f32_e32 is not correctly rounded"),
        ("\ts_waitcnt vmcnt(0)", "\tv_mul_f32_e64 v1, v2, v3 clamp", "v_mul_f32_e64 v1, v2, v3 clamp changes its result"),
        ("\ts_waitcnt vmcnt(0)", "\tv_add_f32_e64 v1, v2, v3 mul:2", "v_add_f32_e64 v1, v2, v3 mul:2 changes its result"),
    ],
)  # fmt: skip
def test_deviations_are_told(old: str, new: str, wrong: str) -> None:
    assert DENSE.count(old) == 1
    assert analyse(DENSE.replace(old, new))["deviations"] == [wrong]


def test_what_is_no_deviation() -> None:
    """A difference of integers that stops at 0, and the declaration of a function that is called."""
    text = DENSE.replace("\ts_waitcnt vmcnt(0)", "\tv_sub_u32_e64 v1, v2, v3 clamp")
    assert analyse(text, llir=IR + "declare <2 x float> @llvm.fma.v2f32(<2 x float>)")["deviations"] == []
    assert amd.fused_in("%2 = call float @llvm.fma.f32(float %0)\n") == 1


# ------------------------------------------------------------------------------------------------------------- command


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--arch", "gfx90"], "'gfx90' is no architecture: give a compute capability such as 90, or gfx942 (MI300X)"),
        (["--only", "axpy<bf61"], "'axpy<bf61' is in no kernel's name; one is 'triton axpy<fp32, normal, nearest>'"),
        (["--only", "["], "'[' is no regular expression"),
        (["--arch", "gfx942", "--kernels", "cuda"], "CUDA's kernels are not compiled for gfx942, which are AMD's"),
    ],
)
def test_what_cannot_be_compiled_is_told(arguments: list[str], told: str) -> None:
    command = [sys.executable, "-m", "benchmarks.machine_code", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 2
    assert told in done.stderr
