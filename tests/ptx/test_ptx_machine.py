"""The PTX interpreter (tests/ptx): what it computes, the faults that it must find, and what it must refuse."""

from __future__ import annotations

import ctypes
import mmap
import random
from typing import Any

import numpy as np
import pytest

from tests.ptx import memory as ptx_memory
from tests.ptx.faults import Report
from tests.ptx.groups import STEPS
from tests.ptx.machine import Machine
from tests.ptx.memory import Allocation
from tests.ptx.parse import PtxError, split
from tests.ptx.translate import translate

u4, u8, f4 = np.uint32, np.uint64, np.float32
HEAD = """.version 9.0
.target sm_90
.address_size 64
.visible .entry k(.param .u64 k_0) {
.reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<99>; .reg .b64 %rd<99>; .reg .f32 %f<99>;
.shared .align 16 .b8 room[1024];
ld.param.u64 %rd1, [k_0];
mov.u32 %r1, %tid.x;
mul.wide.u32 %rd2, %r1, 4;
add.s64 %rd3, %rd1, %rd2;
mov.u32 %r2, room;
shl.b32 %r3, %r1, 2;
add.s32 %r4, %r2, %r3;
"""


def run(body: str, memory: np.ndarray, threads: int = 64, grid: int = 1, limit: int = STEPS, **how: bool) -> Report:
    """A kernel that has the memory's address in %rd1, that of its thread's word in %rd3, and in %r4 that of its word in
    shared memory."""
    (text,) = split(HEAD + body + "\nret;\n}\n").values()
    address = memory.ctypes.data
    there = [Allocation("memory", address, memory.nbytes, **how)]
    return Machine(translate(text), grid, threads, bytes(ctypes.c_uint64(address)), there).run(limit)


def words(n: int = 64) -> np.ndarray:
    return np.zeros(n, u4)


# -------------------------------------------------------------------------------------------------------------- faults
PUT = "st.shared.u32 [%r4], %r1;\n"
TAKE = "xor.b32 %r5, %r1, 63; shl.b32 %r6, %r5, 2; add.s32 %r7, %r2, %r6; ld.shared.u32 %r8, [%r7];\n"
KEEP = "st.global.u32 [%rd3], %r8;"
FAULTS: list[tuple[str, set[str]]] = [
    (PUT + "bar.sync 0;\n" + TAKE + KEEP, set()),
    (PUT + TAKE + KEEP, {"race"}),
    (TAKE + KEEP, {"uninitialised"}),
    ("st.global.u32 [%rd3+4], %r1;", {"out of bounds"}),
    ("ld.global.u32 %r8, [%rd3+-4]; st.global.u32 [%rd3], %r8;", {"out of bounds", "race"}),
    ("st.global.u32 [%rd1], %r1;", {"race"}),
    ("st.global.u32 [%rd1], 7;", set()),  # one value from all
    ("ld.global.u32 %r8, [%rd1+252]; st.global.u32 [%rd3], %r8;", {"race"}),
    ("ld.global.u32 %r8, [%rd1+252]; bar.sync 0; st.global.u32 [%rd3], %r8;", set()),
    ("st.global.v2.u32 [%rd3], {%r1, %r1};", {"misaligned", "out of bounds"}),
    ("st.shared.u32 [%r4+1000], %r1;", {"out of bounds"}),
    ("st.shared.u32 [%rd3], %r1;", {"wrong state space"}),
    ("setp.lt.u32 %p1, %r1, 32; @%p1 bra $A; bar.sync 0; bra.uni $B; $A: bar.sync 0; $B: ret;", {"barrier"}),
    ("setp.lt.u32 %p1, %r1, 32; @%p1 ret; bar.sync 0;", {"barrier"}),
    ("setp.lt.u32 %p1, %r1, 9; @%p1 st.global.u32 [%rd3+220], %r1;", set()),
    ("setp.lt.u32 %p1, %r1, 10; @%p1 st.global.u32 [%rd3+220], %r1;", {"out of bounds"}),
    ("setp.lt.u32 %p1, %r1, 9; @%p1 bra $A; shfl.sync.bfly.b32 %r8, %r1, 1, 31, -1; $A: ret;", {"warp"}),
    ("mov.u32 %r8, 0; cvt.u64.u32 %rd4, %r8; ld.global.u32 %r9, [%rd4]; st.global.u32 [%rd3], %r9;", {"out of bounds"}),
    ("mov.u64 %rd4, k_0; st.param.u64 [%rd4], %rd1;", {"read-only"}),
]  # fmt: skip


@pytest.mark.parametrize(("body", "kinds"), FAULTS, ids=[body[:60] for body, _ in FAULTS])
def test_faults_are_found_and_nothing_else(body: str, kinds: set[str]) -> None:
    report = run(body, words())
    assert report.kinds == kinds, report.told()


def test_memory_that_was_not_written_or_must_not_be() -> None:
    copy = "ld.global.u32 %r8, [%rd3]; st.global.u32 [%rd3], %r8;"
    assert run(copy, words(), initialised=False).kinds == {"uninitialised"}
    assert run(copy, words(), writable=False).kinds == {"read-only"}
    assert run(copy, words()).kinds == set()


def test_a_wrong_access_changes_nothing_elsewhere() -> None:
    memory = np.arange(80, dtype=u4)
    part = memory[8:72]
    run("mov.u32 %r8, 9; st.global.u32 [%rd3+16], %r8; st.global.u32 [%rd3+-16], %r8;", part)
    assert memory[:8].tolist() == list(range(8))
    assert memory[72:].tolist() == list(range(72, 80))
    assert (part == 9).all()


def test_blocks_race_with_each_other_whatever_barriers_they_have() -> None:
    body = "setp.eq.u32 %p1, %r1, 0; bar.sync 0; @%p1 st.global.u32 [%rd1], %r9; bar.sync 0;"
    body = "mov.u32 %r9, %ctaid.x;" + body
    assert run(body, words(), grid=1).kinds == set()
    assert run(body, words(), grid=2).kinds == {"race"}


@pytest.mark.parametrize("place", [1 << 22, 1 << 25, 3 << 24])
def test_tensors_at_low_addresses(place: int) -> None:
    """A process may have its heap there: it must not meet the addresses of shared memory or parameters."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    fixed = 0x100000  # MAP_FIXED_NOREPLACE: nothing that is there is replaced
    found = libc.mmap(
        place, 4096, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | fixed, -1, 0
    )
    if found != place:
        pytest.skip(f"this process has something else at {place:#x}")
    memory = np.frombuffer((ctypes.c_uint8 * 256).from_address(place), u4)
    assert run(PUT + "bar.sync 0;\n" + TAKE + KEEP, memory).kinds == set()
    assert memory.tolist() == [63 - n for n in range(64)]
    libc.munmap(ctypes.c_void_p(place), ctypes.c_size_t(4096))


def test_memory_where_the_interpreter_has_its_own_is_refused() -> None:
    there = [Allocation("weights", ptx_memory.SHARED + 64, 256)]
    program = translate(next(iter(split(HEAD + "ret;\n}\n").values())))
    with pytest.raises(PtxError, match="weights lies at 0x100040, where the interpreter keeps its own memory"):
        Machine(program, 1, 64, bytes(8), there)


def test_memory_that_overlaps_is_refused() -> None:
    there = [Allocation("a", 1 << 30, 256), Allocation("b", (1 << 30) + 255, 256)]
    program = translate(next(iter(split(HEAD + "ret;\n}\n").values())))
    with pytest.raises(PtxError, match="a and b overlap"):
        Machine(program, 1, 64, bytes(8), there)


# ------------------------------------------------------------------------------------------------------------- control
LOOP = """mov.u32 %r8, 0; mov.u32 %r9, %r1;
$L: setp.eq.s32 %p1, %r9, 0; @%p1 bra $E;
and.b32 %r10, %r9, 1; setp.ne.s32 %p2, %r10, 0; @!%p2 bra $S; add.s32 %r8, %r8, %r9; bra.uni $N;
$S: xor.b32 %r8, %r8, %r9;
$N: sub.s32 %r9, %r9, 1; bra.uni $L;
$E: st.global.u32 [%rd3], %r8;"""


def test_threads_that_took_different_ways_meet_again() -> None:
    memory, wanted = words(), []
    report = run(LOOP, memory)
    for n in range(64):
        r = 0
        for i in range(n, 0, -1):
            r = r + i if i & 1 else r ^ i
        wanted.append(r)
    assert memory.tolist() == wanted
    assert not report.faults


def test_a_loop_without_an_end_is_left() -> None:
    with pytest.raises(PtxError, match="k does not end"):
        run("$L: add.s32 %r1, %r1, 1; bra.uni $L;", words(), limit=1000)


def test_registers_that_may_be_unset_are_named() -> None:
    body = "setp.lt.u32 %p1, %r1, 9; @%p1 mov.u32 %r8, 1; st.global.u32 [%rd3], %r8;"
    (text,) = split(HEAD + body + "ret;\n}\n").values()
    assert translate(text).unset == ["%r8"]


@pytest.mark.parametrize(
    ("body", "unset"),
    [
        ("mov.b64 %rd4, {%r1, %r9}; mov.b64 {%r8, _}, %rd4;", []),
        ("mov.b64 %rd4, {%r1, %r9}; mov.b64 {_, %r8}, %rd4;", ["%r9"]),
        ("mov.b64 %rd4, {%r1, %r9}; mul.rn.f32x2 %rd5, %rd4, %rd4; mov.b64 {%r8, _}, %rd5;", []),
        ("mov.b64 %rd4, {%r9, %r1}; mul.rn.f32x2 %rd5, %rd4, %rd4; mov.b64 {%r8, _}, %rd5;", ["%r9"]),
        ("mov.b64 %rd4, {%r1, %r9}; mov.b64 {%r8, %r10}, %rd4;", []),  # %r10 is not used
        ("mov.b64 %rd4, {%r1, %r9}; shr.u64 %rd4, %rd4, 32; cvt.u32.u64 %r8, %rd4;", ["%r9"]),
        ("@%p1 mov.b64 %rd4, {%r1, %r1}; mov.b64 {%r8, _}, %rd4;", ["%p1", "%rd4"]),
    ],
)
def test_half_of_a_pair_may_be_unset_where_nobody_uses_it(body: str, unset: list[str]) -> None:
    memory = words()
    (text,) = split(HEAD + body + KEEP + "ret;\n}\n").values()
    assert translate(text).unset == unset
    run(body + KEEP, memory)  # with garbage in it
    if not unset and "mul" not in body:
        assert memory.tolist() == list(range(64))


# ------------------------------------------------------------------------------------------------------------ integers
INTEGERS = """ld.global.u32 %r8, [%rd3]; mul.lo.s32 %r9, %r8, 747796405; mul.hi.u32 %r10, %r8, -766435501;
mul.wide.s32 %rd4, %r8, -12345; shr.u64 %rd5, %rd4, 32; cvt.u32.u64 %r11, %rd5; xor.b32 %r12, %r9, %r10;
xor.b32 %r12, %r12, %r11; prmt.b32 %r13, %r8, %r9, 0x7632; xor.b32 %r12, %r12, %r13; and.b32 %r14, %r8, 63;
shl.b32 %r15, %r9, %r14; xor.b32 %r12, %r12, %r15; shr.s32 %r16, %r8, %r14; xor.b32 %r12, %r12, %r16;
mov.b32 %r17, 0x0201; dp2a.lo.u32.u32 %r18, %r8, %r17, %r9; xor.b32 %r12, %r12, %r18;
bfi.b32 %r19, %r8, %r9, 5, 9; xor.b32 %r12, %r12, %r19; shr.u32 %r21, %r9, %r14; add.s32 %r12, %r12, %r21;
prmt.b32 %r20, %r8, %r9, 0xba98; xor.b32 %r12, %r12, %r20; st.global.u32 [%rd3], %r12;"""


def integers(x: int) -> int:
    """INTEGERS on Python's numbers."""
    m = 0xFFFFFFFF
    s = x - (x >> 31 << 32)
    a = x * 747796405 & m
    r = a ^ (x * 0xD2511F53 >> 32) ^ ((s * -12345 >> 32) & m)
    r ^= (x >> 16) | (a & 0xFFFF0000)
    by = x & 63
    r ^= (a << by & m) if by < 32 else 0
    r ^= (s >> min(by, 31)) & m
    r ^= (a + (x & 0xFFFF) * 1 + (x >> 16) * 2) & m
    r ^= (a & ~(0x1FF << 5) | (x & 0x1FF) << 5) & m
    r = r + (a >> by if by < 32 else 0) & m
    signs = [(v >> (8 * i + 7)) & 1 for v, i in ((x, 0), (x, 1), (x, 2), (x, 3), (a, 0), (a, 1), (a, 2), (a, 3))]
    return r ^ sum(255 << 8 * i for i, pick in enumerate((0, 1, 2, 3)) if signs[pick])


def test_integers() -> None:
    memory = np.random.default_rng(3).integers(0, 2**32, 256, dtype=u4)
    wanted = [integers(int(x)) for x in memory]
    run(INTEGERS, memory, threads=256)
    assert memory.tolist() == wanted


def test_a_shared_value_and_a_value_of_each_thread_have_the_same_bits() -> None:
    """Numbers that all threads share are NumPy scalars: %r8 becomes one for a single thread's address only."""
    memory = np.full(64, 0x9E3779B9, u4)
    each = memory.copy()
    run(INTEGERS, each, threads=64)
    run(INTEGERS.replace("ld.global.u32 %r8, [%rd3]", "mov.u32 %r8, 0x9E3779B9"), memory, threads=64)
    assert memory.tolist() == each.tolist() == [integers(0x9E3779B9)] * 64


# -------------------------------------------------------------------------------------------------- pairs of float32
PAIRS = """mul.wide.u32 %rd4, %r1, 24; add.s64 %rd5, %rd1, %rd4;
ld.global.u64 %rd6, [%rd5]; ld.global.u64 %rd7, [%rd5+8]; ld.global.u64 %rd8, [%rd5+16];
"""
LAST = "st.global.u64 [%rd5], %rd9;"


@pytest.mark.parametrize("operation", ["add", "sub", "mul", "fma"])
def test_packed_instructions_equal_two_single_ones(operation: str) -> None:
    """add, sub, mul and fma of f32x2 against the single instructions, in the low and in the high half."""
    draw = np.random.default_rng(5)
    memory = draw.integers(0, 2**32, 6 * 64, dtype=u4)
    memory[::7] = draw.choice(u4([0, 0x80000000, 1, 0x807FFFFF, 0x7F800000, 0xFF800000, 0x7FC00001]), len(memory[::7]))
    packed, single = memory.copy(), memory.copy()
    third = operation == "fma"
    run(f"{PAIRS} {operation}.rn.f32x2 %rd9, %rd6, %rd7{', %rd8' * third}; {LAST}", packed)
    halves = "".join(f"mov.b64 {{%f{n}, %f{n + 1}}}, %rd{n // 2 + 6};" for n in (0, 2, 4))
    halves += f"{operation}.rn.f32 %f6, %f0, %f2{', %f4' * third}; {operation}.rn.f32 %f7, %f1, %f3{', %f5' * third};"
    report = run(f"{PAIRS} {halves} mov.b64 %rd9, {{%f6, %f7}}; {LAST}", single)
    assert not report.faults
    assert packed.tolist() == single.tolist()
    assert packed.tolist() != memory.tolist()


def test_64_bits_are_joined_and_split_with_the_first_in_the_low_half() -> None:
    memory = words(128)
    body = """mul.wide.u32 %rd4, %r1, 8; add.s64 %rd5, %rd1, %rd4; or.b32 %r8, %r1, 0x100;
    mov.b64 %rd6, {%r1, %r8}; mov.b64 {%r9, %r10}, %rd6; mov.b64 {_, %f1}, %rd6; mov.b64 %rd7, {%r10, %f1};
    setp.lt.u32 %p1, %r1, 9; @%p1 mov.b64 {%r9, %r10}, %rd7;
    mov.b64 %rd8, {%r9, %r10}; st.global.u64 [%rd5], %rd8;"""
    run(body, memory)
    wanted = [(n | 0x100, n | 0x100) if n < 9 else (n, n | 0x100) for n in range(64)]
    assert memory.reshape(-1, 2).tolist() == [list(w) for w in wanted]
    memory = words(128)
    run("mul.wide.u32 %rd4, %r1, 8; add.s64 %rd5, %rd1, %rd4; mov.b64 %rd6, {0f3F800000, 0fC0000000};"
        "st.global.u64 [%rd5], %rd6;", memory)  # fmt: skip
    assert memory.view(f4).reshape(-1, 2).tolist() == [[1.0, -2.0]] * 64


def test_a_guarded_packed_instruction_leaves_the_other_threads_alone() -> None:
    memory = np.full(128, 1.5, f4)
    body = """mul.wide.u32 %rd4, %r1, 8; add.s64 %rd5, %rd1, %rd4; ld.global.u64 %rd6, [%rd5];
    setp.lt.u32 %p1, %r1, 5; mov.b64 %rd7, %rd6; @!%p1 fma.rn.f32x2 %rd7, %rd6, %rd6, %rd6; st.global.u64 [%rd5], %rd7;"""
    run(body, memory.view(u4))
    assert memory.tolist() == [1.5] * 10 + [3.75] * 118


# ------------------------------------------------------------------------------------------------------------- unknown
@pytest.mark.parametrize(
    "instruction",
    [
        "fma.rz.f32 %f1, %f2, %f3, %f4",
        "fma.rn.ftz.f32 %f1, %f2, %f3, %f4",
        "mul.f32 %f1, %f2, %f3",  # ptxas may fuse it with a sum
        "add.f32 %f1, %f2, %f3",
        "sqrt.rn.f32 %f1, %f2",
        "ex2.approx.f32 %f1, %f2",
        "max.NaN.f32 %f1, %f2, %f3",
        "sub.rz.f32x2 %rd1, %rd2, %rd3",
        "fma.rn.ftz.f32x2 %rd1, %rd2, %rd3, %rd4",
        "fma.rz.f32x2 %rd1, %rd2, %rd3, %rd4",
        "mul.f32x2 %rd1, %rd2, %rd3",
        "fma.rn.f32x2 %rd1, %r2, %rd3, %rd4",
        "max.f32x2 %rd1, %rd2, %rd3",
        "mov.b64 {%h1, %r2}, %rd1",
        "mov.b64 %rd1, {%h1, %r2}",
        "add.f16 %h1, %h2, %h3",
        "add.f64 %rd1, %rd2, %rd3",
        "add.cc.s32 %r1, %r2, %r3",
        "cvt.rzi.s32.f32 %r1, %f1",
        "cvt.sat.u8.s32 %r1, %r2",
        "cvt.rn.relu.bf16x2.f32 %r1, %f1, %f2",
        "div.s32 %r1, %r2, %r3",
        "bar.sync 1",
        "bar.sync 0, 32",
        "shfl.sync.up.b32 %r8, %r1, 1, 0, -1",
        "atom.global.cas.b32 %r1, [%rd1], %r2, %r3",
        "atom.global.add.u32 %r1, [%rd1], %r2; st.global.u32 [%rd3], %r1",
        "ld.global.u32 %r1, [nowhere]",
        "mov.u32 %r1, %clock",
        "nonsense.b32 %r1, %r2",
        "bra $NOWHERE",
    ],
)
def test_what_is_not_known_is_refused(instruction: str) -> None:
    with pytest.raises(PtxError):
        run(instruction + ";", words())


def test_arguments_and_threads_that_do_not_fit_are_refused() -> None:
    (text,) = split(HEAD.replace("{\n", ".maxntid 32, 1, 1\n{\n", 1) + "ret;\n}\n").values()
    program = translate(text)
    with pytest.raises(PtxError, match="k takes 8 bytes, not 4"):
        Machine(program, 1, 32, bytes(4), [])
    with pytest.raises(PtxError, match="64 threads, but k was compiled for 32"):
        Machine(program, 1, 64, bytes(8), [])


# --------------------------------------------------------------------------------------------------------------- cache
def test_a_translation_is_found_again_and_works(tmp_path: Any) -> None:
    (text,) = split(HEAD + LOOP + "\nret;\n}\n").values()
    first, again = (translate(text, tmp_path) for _ in range(2))
    assert len(list(tmp_path.iterdir())) == 1
    results = []
    for program in (first, again, translate(text)):
        memory = words()
        there = [Allocation("memory", memory.ctypes.data, memory.nbytes)]
        Machine(program, 1, 64, bytes(ctypes.c_uint64(memory.ctypes.data)), there).run()
        results.append(memory.tolist())
    assert results[0] == results[1] == results[2] != [0] * 64
    translate(text.replace("sub.s32", "add.s32"), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_random_programs_do_not_depend_on_how_threads_are_grouped() -> None:
    """Integer programs with branches: all threads together, and each in a launch of its own."""
    draw = random.Random(7)
    for _ in range(10):
        lines = []
        for n in range(12):
            a, b, c = (draw.randrange(8, 14) for _ in range(3))
            op = draw.choice(["add.s32", "xor.b32", "mul.lo.s32", "and.b32", "or.b32", "sub.s32"])
            lines.append(f"{op} %r{a}, %r{b}, %r{c};")
            if n % 4 == 3:
                lines.append(f"and.b32 %r20, %r{a}, 1; setp.eq.s32 %p1, %r20, 0; @%p1 bra $L{n};")
                lines.append(f"add.s32 %r{b}, %r{c}, {n}; $L{n}:")
        start = "".join(f"mad.lo.s32 %r{n}, %r21, {7 * n}, {n};" for n in range(8, 14))
        end = "xor.b32 %r8, %r8, %r9; add.s32 %r8, %r8, %r10; st.global.u32 [%rd3], %r8;"
        together, apart = words(), []
        run("mov.u32 %r21, %r1;" + start + "".join(lines) + end, together)
        for thread in range(64):
            alone = words(1)
            run(f"mov.u32 %r21, {thread};" + start + "".join(lines) + end, alone, threads=1)
            apart.append(int(alone[0]))
        assert together.tolist() == apart
