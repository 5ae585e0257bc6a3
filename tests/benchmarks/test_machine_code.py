"""The kernels' cost in machine code, which needs compilers but no GPU, and the counter itself.

A pass is bound by an H200's memory while an element takes about 30 issue slots, by a B200's while it takes 20; LIMITS and
BLACKWELL say what each kernel may take on sm_90 and on sm_100, where float32 operations go in packed pairs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.machine_code import compilers, counts, listing
from tests.ptx import build, lint

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "benchmarks.machine_code"]

CUDA = "zk::cuda::rule_kernel<{}, {}, zk::gpu::{}, (zk::Distribution){}, (zk::Rounding){}, (zk::cuda::Seeds){}>"
BF16, FP16, FP32 = "__nv_bfloat16", "__half", "float"
NORMAL, RADEMACHER, NEAREST, STOCHASTIC, ANY = 0, 1, 0, 1, 2
RULES = {"ScaledAxpy": True, "HiZOO<false>": True, "HiZOO<true>": True, "Helene": False, "Momentum": False,
         "Adam": False, "AdaMeZO": False, "Sign": False}  # and whether a state may be bf16  # fmt: skip


def one_seed(rule: str, dtype: str, distribution: int = NORMAL, rounding: int = NEAREST, state: str = FP32) -> str:
    return CUDA.format(dtype, state, rule, distribution, rounding, 0)


def any_seeds(rule: str, dtype: str, distribution: int = ANY, rounding: int = ANY, state: str = FP32) -> str:
    return CUDA.format(dtype, state, rule, distribution, rounding, 1)


def chain(rule: str, dtype: str, state: str = FP32) -> str:
    return f"zk::cuda::chain_kernel<{dtype}, {state}, zk::gpu::{rule}>"


def low_rank(rule: str, dtype: str, rounding: int = ANY, state: str = FP32) -> str:
    return f"zk::cuda::low_rank_kernel<{dtype}, {state}, zk::gpu::{rule}, (zk::Rounding){rounding}>"


def low_rank_chain(rule: str, dtype: str, state: str = FP32) -> str:
    return f"zk::cuda::low_rank_chain_kernel<{dtype}, {state}, zk::gpu::{rule}>"


def triton(rule: str, dtype: str, distribution: str = "normal", rounding: str = "nearest") -> str:
    return f"triton {rule}<{dtype}, {distribution}, {rounding}>"


# kernel: issue slots per element for one seed, for each further seed (None: a kernel for one seed), registers.
# A pass that moves more bytes has more time: HiZOO's over bf16 weights, with h read and written, has 93 slots.
LIMITS: dict[str, tuple[float, float | None, int]] = {
    triton("axpy", "bf16"): (31, 29, 40),
    triton("axpy", "fp16"): (31, 29, 40),
    triton("axpy", "fp32"): (31, 29, 40),
    triton("axpy", "bf16", rounding="stochastic"): (40, 29, 56),
    triton("axpy", "bf16", "rademacher"): (16, 14.5, 40),
    triton("scaled_axpy", "bf16"): (41, 29, 64),
    triton("hizoo", "bf16"): (46.5, 32, 72),
    triton("hizoo", "bf16", rounding="stochastic"): (56, 32, 96),
    triton("hizoo", "fp32"): (46.5, 32, 72),
    triton("hizoo_restore", "bf16"): (57, 33, 96),
    triton("helene", "bf16"): (48, 33, 96),
    triton("momentum", "bf16"): (34, 31, 64),
    triton("adam", "bf16"): (56, 30, 64),
    triton("adamezo", "bf16"): (45.5, 33.5, 64),
    triton("sign", "bf16"): (36, 31, 64),
    one_seed("Axpy", BF16): (26.5, None, 40),
    one_seed("Axpy", FP16): (27, None, 40),
    one_seed("Axpy", FP32): (27, None, 40),
    one_seed("Axpy", BF16, rounding=STOCHASTIC): (34, None, 40),
    one_seed("Axpy", BF16, RADEMACHER): (12.5, None, 40),
    any_seeds("Axpy", BF16, NORMAL, NEAREST): (28, 24, 64),
    any_seeds("Axpy", FP16, NORMAL, NEAREST): (28, 24, 64),
    any_seeds("Axpy", FP32, NORMAL, NEAREST): (28, 24, 64),
    any_seeds("Axpy", BF16, NORMAL, STOCHASTIC): (36, 24, 80),
    any_seeds("Axpy", BF16, RADEMACHER, NEAREST): (14, 10, 64),
    one_seed("ScaledAxpy", BF16): (38, None, 40),
    one_seed("ScaledAxpy", BF16, state=BF16): (40, None, 40),
    one_seed("ScaledAxpy", BF16, rounding=STOCHASTIC): (44.5, None, 48),
    any_seeds("ScaledAxpy", BF16): (42, 26, 64),
    one_seed("HiZOO<false>", BF16): (42, None, 40),
    one_seed("HiZOO<false>", FP32): (42, None, 40),
    one_seed("HiZOO<false>", BF16, rounding=STOCHASTIC): (50, None, 64),
    any_seeds("HiZOO<false>", BF16): (50, 28, 64),
    one_seed("HiZOO<true>", BF16): (53.5, None, 40),
    any_seeds("HiZOO<true>", BF16): (61.5, 29, 64),
    one_seed("Helene", BF16): (44, None, 64),
    one_seed("Momentum", BF16): (31.5, None, 40),
    one_seed("Adam", BF16): (53, None, 64),
    one_seed("AdaMeZO", BF16): (41.5, None, 40),
    any_seeds("AdaMeZO", BF16): (47, 29, 64),
    one_seed("Sign", BF16): (33.5, None, 40),
    # Chains: a stage, and each further seed of it.
    chain("Axpy", BF16): (31, 25.5, 64),
    chain("Axpy", FP16): (31, 25.5, 64),
    chain("Axpy", FP32): (30, 26, 64),
    chain("HiZOO<false>", BF16): (51, 27.5, 80),
    chain("HiZOO<true>", BF16): (63, 28.5, 80),
    chain("HiZOO<true>", BF16, BF16): (72, 28.5, 128),
    chain("Helene", BF16): (53, 28.5, 128),
    chain("Momentum", BF16): (36.5, 27.5, 80),
    chain("Adam", BF16): (60, 27.5, 128),
    chain("AdaMeZO", BF16): (50.5, 28.5, 80),
    chain("Sign", BF16): (39, 27, 80),
}
BLACKWELL: dict[str, tuple[float, float | None, int]] = {
    one_seed("Axpy", BF16): (19, None, 40),
    one_seed("Axpy", FP16): (19, None, 40),
    one_seed("Axpy", FP32): (18.5, None, 40),
    one_seed("Axpy", BF16, rounding=STOCHASTIC): (26, None, 48),
    any_seeds("Axpy", BF16, NORMAL, NEAREST): (20, 17, 64),
    any_seeds("Axpy", FP32, NORMAL, NEAREST): (20, 17.5, 80),
    one_seed("ScaledAxpy", BF16): (26.5, None, 40),
    one_seed("HiZOO<false>", BF16): (30.5, None, 40),
    one_seed("HiZOO<false>", FP32): (29, None, 40),
    one_seed("HiZOO<true>", BF16): (37, None, 40),
}
# A stage of a chain that rounds stochastically, and the tile around all stages.
STOCHASTIC_STAGES = {chain("Axpy", BF16): (39.5, 4), chain("HiZOO<false>", BF16): (60, 5), chain("Adam", BF16): (69, 6)}

# Directions of low rank are read: issue slots per element for one seed of rank 1, for each further seed, for each further
# factor of a seed; registers.
LOW_RANK: dict[str, tuple[float, float, float, int]] = {
    low_rank("Axpy", BF16, NEAREST): (10.5, 5.5, 2.5, 64),
    low_rank("Axpy", FP16, NEAREST): (10.5, 5.5, 2.5, 64),
    low_rank("Axpy", FP32, NEAREST): (9.5, 5.5, 2.5, 64),
    low_rank("Axpy", BF16, STOCHASTIC): (20, 5.5, 2.5, 64),
    low_rank("ScaledAxpy", BF16): (22.5, 6, 2.5, 80),
    low_rank("HiZOO<false>", BF16): (30.5, 7.5, 2.5, 80),
    low_rank("HiZOO<true>", BF16): (42.5, 9, 2.5, 80),
    low_rank("HiZOO<true>", BF16, state=BF16): (54, 9, 2.5, 128),
    low_rank("Helene", BF16): (31.5, 9, 2.5, 80),
    low_rank("Momentum", BF16): (16, 7.5, 2.5, 80),
    low_rank("Adam", BF16): (39, 7.5, 2.5, 80),
    low_rank("AdaMeZO", BF16): (28, 9, 2.5, 80),
    low_rank("Sign", BF16): (18.5, 7.5, 2.5, 80),
    triton("axpy", "bf16", "low_rank"): (13.5, 5, 3, 64),
    triton("hizoo_restore", "bf16", "low_rank"): (46, 8.5, 3, 128),
    triton("helene", "bf16", "low_rank"): (34, 8.5, 3, 128),
    # Of a chain a stage.
    low_rank_chain("Axpy", BF16): (14, 6, 2.5, 80),
    low_rank_chain("Axpy", FP32): (12, 6, 2.5, 80),
    low_rank_chain("HiZOO<true>", BF16): (46, 9, 2.5, 128),
    low_rank_chain("Adam", BF16): (42, 7.5, 2.5, 128),
    low_rank_chain("Helene", BF16): (35, 9, 2.5, 128),
}

# Triton's that are compiled here: the dense ones, and those of low rank that have limits.
COMPILED = "normal|rademacher|triton (axpy|hizoo_restore|helene)<bf16, low_rank, nearest"

needs_tools = pytest.mark.skipif(
    not all(compilers.find_tool(tool) for tool in ("cuobjdump", "nvdisasm")),
    reason="cuobjdump and nvdisasm are neither in Triton's wheel nor on PATH",
)


def compiled(test: Any) -> Any:
    """A test of compiled kernels: make test-built, not make test."""
    return pytest.mark.built(needs_tools(test))


def measure(
    kind: str, folder: Path, arch: int | str = 90, sources: tuple[str, ...] = (), only: str = ""
) -> dict[str, dict[str, Any]]:
    """All reports of one kind, by kernel; in a process of its own because Triton must not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    out = folder / "report.json"
    command = [*COMMAND, "--arch", str(arch), "--kernels", kind, "--only", only, "--json", str(out)]
    if sources:
        command += ["--source", *(str(ROOT / "csrc" / "cuda" / name) for name in sources)]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return {report["name"]: report for report in json.loads(out.read_text())}


def cuda(folder: Path, arch: int, sources: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """The reports of CUDA kernels: of what the build has made for an architecture, else compiled."""
    if build.unavailable_reason() is None:
        of = [o for o in build.objects() if o.is_cuda and o.source.name != "launch.cu"]
        found = [build.cubins(o, folder).get(f"sm_{arch}") for o in of if not sources or o.source.name in sources]
        if found and all(found):
            reports = [report for cubin in found for report in compilers.analyse_cubin(cubin, arch)]
            return {report["name"]: report for report in reports}
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    if f"compute_{arch}" not in subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout:
        pytest.skip(f"this nvcc knows no sm_{arch}")
    return measure("cuda", folder, arch, sources)


@pytest.fixture(scope="module")
def triton_reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    pytest.importorskip("triton")
    return measure("triton", tmp_path_factory.mktemp("triton"), only=COMPILED)


@pytest.fixture(scope="module")
def cuda_reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return cuda(tmp_path_factory.mktemp("cuda"), 90)


@pytest.fixture(scope="module")
def blackwell_reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return cuda(tmp_path_factory.mktemp("blackwell"), 100, ("axpy.cu", "hizoo.cu"))


@compiled
@pytest.mark.parametrize("name", LIMITS)
def test_kernel_is_within_its_limits(name: str, request: pytest.FixtureRequest) -> None:
    report = request.getfixturevalue("triton_reports" if name.startswith("triton") else "cuda_reports")[name]
    within_limits(report, *LIMITS[name])


@compiled
@pytest.mark.parametrize("name", BLACKWELL)
def test_kernel_is_within_its_limits_on_blackwell(name: str, blackwell_reports: dict[str, dict[str, Any]]) -> None:
    within_limits(blackwell_reports[name], *BLACKWELL[name])
    assert blackwell_reports[name]["pipes"]["fp32x2"] > 2 * blackwell_reports[name]["pipes"].get("fp32", 0)


@compiled
def test_no_kernel_spills_on_blackwell(blackwell_reports: dict[str, dict[str, Any]]) -> None:
    without_spills_or_waits(blackwell_reports)


def within_limits(report: dict[str, Any], slots: float, extra: float | None, registers: int) -> None:
    assert 5 < report["slots"] <= slots
    if extra is None:
        assert report["slots_per_extra_seed"] is None
    else:
        assert 5 < report["slots_per_extra_seed"] <= extra
    assert report["registers"] <= registers
    assert report["elements"] % 8 == 0
    assert set(report["accesses"]) == {16}
    assert report["barriers"] == 0
    assert report["spills"] == 0
    assert report["stack_bytes"] == 0


def without_spills_or_waits(reports: dict[str, dict[str, Any]]) -> None:
    for report in reports.values():
        assert (report["spills"], report["stack_bytes"], report["barriers"]) == (0, 0, 0), report
        assert set(report["accesses"]) == {16}, report
        assert report["elements"] % 8 == 0


@compiled
def test_no_triton_kernel_spills_or_waits(triton_reports: dict[str, dict[str, Any]]) -> None:
    assert len(triton_reports) == 10 + 3 * len(RULES) + 3
    without_spills_or_waits(triton_reports)


@compiled
def test_no_cuda_kernel_spills_or_waits(cuda_reports: dict[str, dict[str, Any]]) -> None:
    """The rules' kernels are for each dtype and rounding, and one of each dtype is for all that is less common."""
    passes = {name: report for name, report in cuda_reports.items() if "::rule_kernel<" in name}
    assert len(passes) == 2 * 10 + 8 * (len(RULES) + sum(RULES.values()))
    without_spills_or_waits(passes)


@compiled
def test_no_chain_spills_or_waits(cuda_reports: dict[str, dict[str, Any]]) -> None:
    """One for each rule but the perturbation of HiZOO, dtype and state, decided at run time otherwise."""
    chains = {name: report for name, report in cuda_reports.items() if "::chain_kernel<" in name}
    assert len(chains) == 3 * (1 + len(RULES) - 1 + sum(RULES.values()) - 1)
    without_spills_or_waits(chains)
    for name, (stage, once) in STOCHASTIC_STAGES.items():
        assert chains[name]["slots"] < sum(chains[name]["pipes_stochastic"].values()) <= stage
        assert 1 < sum(chains[name]["pipes_once"].values()) <= once


@compiled
@pytest.mark.parametrize("name", LOW_RANK)
def test_low_rank_kernel_is_within_its_limits(name: str, request: pytest.FixtureRequest) -> None:
    report = request.getfixturevalue("triton_reports" if name.startswith("triton") else "cuda_reports")[name]
    slots, extra, factor, registers = LOW_RANK[name]
    assert 5 < report["slots"] <= slots
    assert 3 < report["slots_per_extra_seed"] <= extra
    assert 1 < report["slots_per_extra_rank"] <= factor
    assert report["registers"] <= registers


@compiled
def test_no_low_rank_kernel_spills_or_waits(cuda_reports: dict[str, dict[str, Any]]) -> None:
    """The rule without sums has a kernel for each rounding, the others decide it at run time."""
    low = {name: report for name, report in cuda_reports.items() if "::low_rank" in name}
    passes, chains = 5 + 3 * (len(RULES) + sum(RULES.values())), 3 * (1 + len(RULES) - 1 + sum(RULES.values()) - 1)
    assert len(low) == passes + chains
    without_spills_or_waits(low)


@compiled
def test_no_kernel_of_the_build_reads_seeds_from_shared_memory_that_lie_elsewhere() -> None:
    """nvcc 13.0 has done so, for those beyond the ones that a block stages: of the PTX in the objects, and of the machine
    code of the architectures that have none."""
    if (reason := build.unavailable_reason()) is not None:
        pytest.skip(reason)
    wrong, seen = [], set()
    for arch in build.carried():
        texts = build.ptx_of(arch)
        assert len(texts) > 100
        wrong += lint.in_ptx(texts)
        seen.add(f"sm_{arch}")
    for o in build.objects():
        for arch, text in lint.listings(o, seen).items() if o.is_cuda else ():
            wrong += [f"{arch}: {what}" for what in lint.in_sass(text)]
    assert wrong == []


# ----------------------------------------------------------------------------------------------------- the counter

# Two loops over tiles of eight bf16: the first is hot, holds a loop over seeds behind a guard and a rare fix-up; the
# second is masked. Addresses do not matter to the counter.
LISTING = """
//--------------------- .nv.info    --------------------------
//--------------------- .text.toy    --------------------------
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P0 BRA `(.L_x_4) ;
.L_x_0:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   IMAD.WIDE.U32 R8, R8, R9, RZ ;
        /*0040*/                   FFMA R4, R5, R6, R4 ;
        /*0050*/               @P1 BRA `(.L_x_2) ;
        /*0060*/                   MOV R7, UR4 ;
.L_x_1:
        /*0070*/                   FFMA R4, R5, R6, R4 ;
        /*0080*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*0090*/               @P2 BRA `(.L_x_1) ;
.L_x_2:
        /*00a0*/              @!P3 BRA `(.L_x_3) ;
        /*00b0*/                   SEL R4, R4, R5, P3 ;
        /*00c0*/                   SEL R4, R4, R5, P3 ;
.L_x_3:
        /*00d0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00e0*/               @P0 BRA `(.L_x_0) ;
.L_x_4:
        /*00f0*/               @P5 LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0100*/                   FFMA R4, R5, R6, R4 ;
        /*0110*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0120*/               @P5 STG.E.U16 desc[UR4][R2.64], R4 ;
        /*0130*/               @P0 BRA `(.L_x_4) ;
        /*0140*/                   EXIT ;
.L_x_5:
        /*0150*/                   BRA `(.L_x_5);
        /*0160*/                   NOP ;
"""


def analyse(text: str) -> Any:
    (name, kernel), *rest = listing.read_sass(text).items()
    assert name == "toy"
    assert not rest
    return counts.analyse(name, 90, kernel, 2, 32, 0)


def analyse_chain(text: str, arch: int = 90) -> Any:
    return counts.analyse("::chain_kernel<toy>", arch, listing.read_sass(text)["toy"], 2, 40, 0)


def test_counter_on_a_listing() -> None:
    """Load, product, FFMA, guard, branch round the fix-up, store, branch back: 7 slots for 8 elements."""
    report = analyse(LISTING)
    assert report["elements"] == 8
    assert report["slots"] == 7 / 8
    assert report["slots_per_extra_seed"] == 3  # one FFMA is one element of one sign here
    assert report["accesses"] == [16, 16]
    assert report["barriers"] == 0
    assert report["spills"] == 0
    assert report["pipes"] == {"branch": 3 / 8, "memory": 2 / 8, "imad.wide": 1 / 8, "fp32": 1 / 8}
    assert report["pipes_extra"] == {"fp32": 1, "uniform": 1, "branch": 1}


LOW_RANK_LISTING = """
//--------------------- .nv.info    --------------------------
//--------------------- .text.toy    --------------------------
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/               @P1 BRA `(.L_x_6) ;
.L_x_1:
        /*0030*/              @!P2 BRA `(.L_x_3) ;
        /*0040*/                   LDG.E.128 R8, desc[UR4][R6.64] ;
        /*0050*/                   FMUL R4, R5, R6 ;
        /*0060*/              @!P3 BRA `(.L_x_5) ;
.L_x_2:
        /*0070*/                   LDG.E.128 R8, desc[UR4][R6.64] ;
        /*0080*/                   FFMA R4, R5, R6, R4 ;
        /*0090*/                   FFMA R4, R5, R6, R4 ;
        /*00a0*/               @P4 BRA `(.L_x_2) ;
        /*00b0*/                   BRA `(.L_x_5) ;
.L_x_3:
        /*00c0*/                   LDG.E R8, desc[UR4][R6.64] ;
.L_x_4:
        /*00d0*/                   FFMA R4, R5, R6, R4 ;
        /*00e0*/               @P4 BRA `(.L_x_4) ;
.L_x_5:
        /*00f0*/                   FFMA R4, R5, R6, R4 ;
        /*0100*/               @P5 BRA `(.L_x_1) ;
.L_x_6:
        /*0110*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0120*/               @P0 BRA `(.L_x_0) ;
        /*0130*/                   EXIT ;
"""


def test_counter_of_low_rank_kernels() -> None:
    """Around the loop over seeds 4 slots for 8 elements; in it the way of whole blocks with one factor, 6; a further factor
    4."""
    kernel = listing.read_sass(LOW_RANK_LISTING)["toy"]
    report = counts.analyse("::low_rank_kernel<toy>", 90, kernel, 2, 32, 0)
    told = (report["slots"], report["slots_per_extra_seed"], report["slots_per_extra_rank"])
    assert told == (10 / 8, 6 / 8, 4 / 8)
    assert (report["elements"], report["accesses"]) == (8, [16, 16])
    flat = listing.read_sass(LISTING)["toy"]
    with pytest.raises(ValueError, match="has 0 loops over whole tiles with a nested loop in it"):
        counts.analyse("::low_rank_kernel<flat>", 90, flat, 2, 32, 0)


def test_counter_adds_the_inner_loop_where_the_first_seed_is_in_it() -> None:
    text = LISTING.replace("/*0040*/                   FFMA", "/*0040*/                   IADD3")
    assert analyse(text)["slots"] == 7 / 8 + 3


def test_counter_goes_through_an_inner_loop_that_no_way_leads_past() -> None:
    """Without the guard, as where a kernel has a loop of its own for "no seeds": two slots less, the seed's three more."""
    text = LISTING.replace("               @P1 BRA `(.L_x_2) ;", "                   MOV R9, R9 ;").replace(
        "/*0040*/                   FFMA", "/*0040*/                   IADD3"
    )
    report = analyse(text)
    assert report["slots"] == 8 / 8 + 3  # a MOV for the branch, and the MOV that it jumped over
    assert report["slots_per_extra_seed"] == 3


def test_counter_follows_a_block_that_lies_behind_its_loop() -> None:
    """The product is done far away, with a branch there and one back."""
    product = "        /*0030*/                   IMAD.WIDE.U32 R8, R8, R9, RZ ;\n"
    away = LISTING.replace(product, "        /*0030*/                   BRA `(.L_x_6) ;\n.L_x_7:\n")
    text = away.replace(".L_x_5:\n", f".L_x_6:\n{product}        /*0148*/                   BRA `(.L_x_7) ;\n.L_x_5:\n")
    report = analyse(text)
    assert report["pipes"] == {"branch": 5 / 8, "memory": 2 / 8, "imad.wide": 1 / 8, "fp32": 1 / 8}
    assert report["slots_per_extra_seed"] == 3


def test_counts_per_element_by_pipe_sum_up_to_the_slots() -> None:
    assert analyse(LISTING)["pipes"] == {"branch": 3 / 8, "memory": 2 / 8, "imad.wide": 1 / 8, "fp32": 1 / 8}
    report = analyse(LISTING.replace("/*0040*/                   FFMA", "/*0040*/                   IADD3"))
    assert report["pipes"] == {
        "branch": 3 / 8 + 1, "memory": 2 / 8, "imad.wide": 1 / 8, "int": 1 / 8, "fp32": 1, "uniform": 1
    }  # fmt: skip
    assert sum(report["pipes"].values()) == report["slots"]


# A loop over tiles of eight bf16 with one over stages in it: load; a stage with its guard for the fork's store, a
# perturbation (a seed's loop with one sum) or the rule (two sums), stochastic rounding or not; store. Three conversions
# make two normals.
CHAIN = """
//--------------------- .text.toy    --------------------------
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/              @!P1 BRA `(.L_x_2) ;
        /*0030*/                   STG.E.128 desc[UR4][R2.64], R4 ;
.L_x_2:
        /*0040*/              @!P2 BRA `(.L_x_5) ;
.L_x_3:
        PERTURBATION
        /*0060*/               @P0 BRA `(.L_x_3) ;
        /*0070*/                   BRA `(.L_x_7) ;
.L_x_5:
        /*0080*/               @P4 BRA `(.L_x_7) ;
.L_x_6:
        RULE
        /*00a0*/               @P0 BRA `(.L_x_6) ;
        /*00b0*/                   FADD R4, R5, R6 ;
.L_x_7:
        /*00c0*/              @!P3 BRA `(.L_x_8) ;
        /*00d0*/                   IMAD.WIDE.U32 R8, R8, R9, RZ ;
        /*00e0*/                   IADD3 R8, R8, R9, RZ ;
.L_x_8:
        /*00f0*/               @P1 BRA `(.L_x_1) ;
        /*0100*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0110*/               @P0 BRA `(.L_x_0) ;
        /*0120*/                   EXIT ;
"""
NORMALS = "/*0050*/                   I2FP.F32.S32 R8, R9 ;\n" * 12
SUM = "/*0051*/                   FFMA R4, R5, R6, R4 ;\n" * 8


def test_counter_on_a_chain() -> None:
    report = analyse_chain(CHAIN.replace("PERTURBATION", NORMALS + SUM).replace("RULE", NORMALS + SUM + SUM))
    # Guards of fork, perturbation, no seeds, rounding; the seed with its branch; the sum; the branch back.
    assert report["slots"] * 8 == 4 + (12 + 16 + 1) + 1 + 1
    assert report["pipes"] == {"branch": 6 / 8, "convert": 12 / 8, "fp32": 17 / 8}
    assert report["slots_per_extra_seed"] * 8 == 12 + 16 + 1
    assert report["pipes_extra"] == {"fp32": 2.0, "convert": 1.5, "branch": 1 / 8}
    assert report["pipes_once"] == {"memory": 2 / 8, "branch": 1 / 8}
    assert report["pipes_stochastic"] == report["pipes"] | {"imad.wide": 1 / 8, "int": 1 / 8}
    assert report["accesses"] == [16, 16]
    assert report["elements"] == 8
    with pytest.raises(ValueError, match="toy> has 0 loops over tiles with a loop over stages"):
        analyse_chain(LISTING)


@pytest.mark.parametrize(
    ("opcode", "pipe"),
    [("I2F", "xu"), ("I2F.U32", "xu"), ("I2FP.F32.S32", "convert"), ("F2FP.BF16.F32.PACK_AB", "convert"),
     ("FFMA", "fp32"), ("FMUL.FTZ", "fp32"), ("FFMA2", "fp32x2"), ("FMUL2.FTZ", "fp32x2"), ("FADD2", "fp32x2"),
     ("HFMA2", "other"),
     ("IMAD.WIDE.U32", "imad.wide"), ("IMAD.MOV.U32", "imad"), ("UIADD3", "uniform"), ("LOP3.LUT", "int")],
)  # fmt: skip
def test_pipes(opcode: str, pipe: str) -> None:
    assert listing.Instruction(False, opcode, "").pipe == pipe


def test_a_packed_pair_is_one_slot_and_two_results() -> None:
    """The loop over seeds makes two elements by one instruction: half the slots for each."""
    report = analyse(LISTING.replace("/*0070*/                   FFMA", "/*0070*/                   FFMA2"))
    assert report["slots_per_extra_seed"] == 3 / 2
    assert report["pipes_extra"] == {"fp32x2": 1 / 2, "uniform": 1 / 2, "branch": 1 / 2}
    assert report["slots"] == 7 / 8
    peeled = LISTING.replace("                   FFMA R4, R5, R6, R4", "                   FFMA2 R4, R5, R6, R4")
    assert analyse(peeled)["pipes"] == {"branch": 3 / 8, "memory": 2 / 8, "imad.wide": 1 / 8, "fp32x2": 1 / 8}


# Three sums one by one on one side of a branch, four in two packed instructions on the other.
SIDES = """
//--------------------- .text.toy    --------------------------
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/               @P1 BRA `(.L_x_1) ;
        /*0030*/                   FFMA R4, R5, R6, R4 ;
        /*0040*/                   FFMA R4, R5, R6, R4 ;
        /*0050*/                   FFMA R4, R5, R6, R4 ;
        /*0060*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0070*/                   FFMA2 R4, R4.F32x2.HI_LO, R6.F32, R4.F32x2.HI_LO ;
        /*0080*/                   FFMA2 R4, R4.F32x2.HI_LO, R6.F32, R4.F32x2.HI_LO ;
.L_x_2:
        /*0090*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00a0*/               @P0 BRA `(.L_x_0) ;
        /*00b0*/                   EXIT ;
"""


def test_the_way_with_the_most_sums_counts_packed_ones_twice() -> None:
    assert analyse(SIDES)["pipes"] == {"memory": 2 / 8, "branch": 2 / 8, "fp32x2": 2 / 8}
    assert analyse(SIDES.replace("FFMA2", "FFMA"))["pipes"] == {"memory": 2 / 8, "branch": 3 / 8, "fp32": 3 / 8}


def test_the_rule_of_a_chain_is_found_among_packed_sums() -> None:
    """Its own rule has two sums an element, in packed instructions; the perturbation one, one by one."""
    text = CHAIN.replace("PERTURBATION", NORMALS + SUM).replace("RULE", NORMALS + SUM.replace("FFMA", "FFMA2"))
    report = analyse_chain(text, 100)
    assert report["pipes_extra"] == {"convert": 12 / 8, "fp32x2": 8 / 8, "branch": 1 / 8}
    assert report["pipes"]["fp32x2"] == 8 / 8


def test_counter_leaves_a_loop_by_a_call_that_does_not_return() -> None:
    text = LISTING.replace("@P2 BRA `(.L_x_1) ;", "@P2 CALL.REL.NOINC `(.L_x_2) ;\n /*0098*/ BRA `(.L_x_1) ;")
    assert text != LISTING
    report = analyse(text)
    assert (report["slots"], report["slots_per_extra_seed"]) == (7 / 8, 4)


def test_counter_sees_barriers_narrow_accesses_and_spills() -> None:
    assert analyse(LISTING.replace("MOV R7, UR4", "NOP").replace("IMAD.WIDE.U32", "BAR.SYNC.X"))["barriers"] == 1
    assert analyse(LISTING.replace("G.E.128", "G.E.64"))["accesses"] == [8, 8]
    assert analyse(LISTING.replace("S2R R0", "STL R0"))["spills"] == 1


def test_counter_without_a_loop() -> None:
    report = analyse("//---- .text.toy   ----\n        /*0000*/                   EXIT ;\n")
    assert report["slots"] is None
    assert report["elements"] == 0


TOY = """
template <class T> __global__ void scale(const uint4* in, uint4* out, int n) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 256) { uint4 v = in[i]; v.x ^= 1u; out[i] = v; }
}
template __global__ void scale<unsigned short>(const uint4*, uint4*, int);
"""


@needs_tools
def test_counter_on_compiled_cuda(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    source = tmp_path / "toy.cu"
    source.write_text(TOY)
    (report,) = compilers.compile_cuda(source, 90, stored=2)
    assert report["name"] == "scale<unsigned short>"
    assert set(report["accesses"]) == {16}
    assert report["pipes"]["memory"] == 2 / 8  # as many loads as stores
    assert 0.5 < report["slots"] < 3
    assert report["slots_per_extra_seed"] is None


def test_refuses_to_count_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [*COMMAND, "--kernels", "triton"]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr
