"""The GPU kernels without a GPU (tests/ptx): `make test-built` has a quick selection of cases, `make test-kernels` all. In
processes of their own, because emulation changes a process for good."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tests.ptx import __main__ as command
from tests.ptx import build, cache, compare, lint, mutants, runner, selection, triton_host
from tests.ptx.cases import NUM_LIMITS
from tests.ptx.runner import Worker
from tests.ptx.target import Target, architecture

ROOT = Path(__file__).resolve().parents[2]
REASONS = {"cuda": build.unavailable_reason(), "triton": triton_host.unavailable_reason()}


def emulated(backend: str) -> None:
    if REASONS[backend] is not None:
        pytest.skip(f"{backend}: {REASONS[backend]}")


def python(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # conftest.py's, for this process
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**inherited, **env}, capture_output=True, text=True, timeout=900
    )


# --------------------------------------------------------------------------------------------------------- the kernels
@pytest.mark.built
@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("cuda", []),
        ("triton", ["--arch", "90"]),
        ("triton", ["--arch", "100", "--only", "axpy"]),
        ("triton", ["--arch", "gfx942"]),
        ("triton", ["--arch", "gfx950", "--only", "axpy"]),
    ],
    ids=["cuda", "triton-sm_90", "triton-sm_100", "triton-gfx942", "triton-gfx950"],
)
def test_kernels_have_the_bits_of_the_cpu_and_make_no_faulty_access(
    backend: str, options: list[str], tmp_path: Path
) -> None:
    """CUDA's for the architectures whose PTX is in the objects. sm_100 has packed operations, gfx950 more of
    them than gfx942."""
    emulated(backend)
    out = tmp_path / "out"
    done = python("-m", "tests.ptx", "--quick", "--backend", backend, *options, "--jobs", "1", "--output", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads(out.read_text())
    wanted = [str(case) for case in selection.quick(backend) if "--only" not in options or options[-1] in str(case)]
    # And, where nothing is left out, a checksum, a kernel that was changed on purpose, and a look at all of CUDA's PTX.
    more = 0 if "--only" in options else 3 if backend == "cuda" else 2
    assert [r["arch"] for r in records] == (build.carried() if backend == "cuda" else [architecture(options[1])])
    for record in records:
        assert record["cases"] == len(wanted) + more
        assert record["kernels"] >= (40 if backend == "cuda" else len(wanted))
        assert record["wrong"] == {}


@pytest.mark.built
@pytest.mark.parametrize("words", ["fp32 rare stages=4", "sign fp32 K=0"])
def test_triton_has_no_sum_of_a_product_that_a_compiler_may_round_once(words: str) -> None:
    """On Blackwell LLVM pairs products and sums of float32 by itself, and ptxas takes such a pair for one operation: the
    start of V in a chain, and what a rule adds to weights where there is no direction."""
    emulated("triton")
    cases = [c for c in map(str, selection.everything("triton")) if set(words.split()) <= set(c.split())]
    assert len(cases) > 2
    only = ("--arch", "100", "--no-steps", "--only", words, "--jobs", "1")
    done = python("-m", "tests.ptx", "--backend", "triton", *only)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(cases)} cases, 0 wrong" in done.stdout


@pytest.mark.built
@pytest.mark.parametrize(
    "words", ["adam fp16 normal nearest K=1", "axpy fp16 nearest K=0", "sign fp16 nearest stages="]
)
def test_amd_rounds_to_float16_by_an_instruction_of_its_own(words: str) -> None:
    """LLVM makes one of a float32 fma, or a product, and its conversion: v_fma_mixlo_f16, which the interpreter refuses."""
    emulated("triton")
    only = ("--arch", "gfx942", "--no-steps", "--only", words, "--jobs", "1", "--seconds", "20")
    done = python("-m", "tests.ptx", "--backend", "triton", *only)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 wrong" in done.stdout


@pytest.mark.built
def test_the_tests_of_this_suite_run_emulated() -> None:
    """Those that are for each backend, on CUDA's and Triton's kernels: none is skipped, and kernels run."""
    emulated("cuda")
    emulated("triton")
    wanted = "test_bits_of_several_signs and momentum and (cuda or triton)"
    done = python(
        "-m", "pytest", "-p", "tests.ptx.plugin", "-p", "no:cacheprovider", "tests/backends/test_rules.py", "-k", wanted
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "emulated: 2 launches of 2 kernels" in done.stdout


def test_the_selections_have_every_rule_and_number_of_directions() -> None:
    from zokern.contract.rules import RULES
    from zokern.passes.spec import MAX_CHAIN_SEEDS

    assert tuple(RULES) == selection.RULES
    assert {name for name, rule in RULES.items() if "V" in rule.coefs} == selection.WITH_V
    assert {name for name, rule in RULES.items() if rule.written == 2} == selection.WITH_TWO_STATES
    assert MAX_CHAIN_SEEDS == selection.STAGED
    for backend in ("cuda", "triton"):
        quick, every = list(selection.quick(backend)), list(selection.everything(backend))
        assert {c.rule for c in quick} == {c.rule for c in every} == set(RULES)
        assert {129, 131, 200} <= {c.k for c in quick}
        for rule in RULES:
            assert {127, 128, 129, 131, 200} <= {c.k for c in every if c.rule == rule and c.layout in ("tiny", "pairs")}
            assert {c.limits for c in every if c.rule == rule} == {None, *range(NUM_LIMITS)}


# ------------------------------------------------------------------------------------------------------- what is built
NINJA = """build CMakeFiles/kernels.dir/csrc/cuda/a.cu.o: CUDA_COMPILER__kernels /somewhere/csrc/cuda/a.cu || order
  DEP_FILE = CMakeFiles/kernels.dir/csrc/cuda/a.cu.o.d
  FLAGS = -O3 "--generate-code=arch=compute_90,code=[compute_90]" "--generate-code=arch=compute_80,code=[sm_80]"

build CMakeFiles/_C.dir/csrc/b.cpp.o: CXX_COMPILER___C /somewhere/csrc/b.cpp || order
  FLAGS = -O3

build elsewhere/_C.so: CXX_MODULE_LIBRARY_LINKER___C_Release CMakeFiles/kernels.dir/csrc/cuda/a.cu.o $
 CMakeFiles/_C.dir/csrc/b.cpp.o | /usr/lib/librt.a || order
  LINK_FLAGS = -shared
"""


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A project whose module is made of a.cu, which includes a.cuh, and b.cpp; objects are newer than sources."""
    texts = {
        "csrc/cuda/a.cu": '#include <cuda.h>\n#include "a.cuh"\n',
        "csrc/cuda/a.cuh": "",
        "csrc/b.cpp": "",
        "csrc/c.h": "",
    }
    folder = build.folder(tmp_path).relative_to(tmp_path)
    texts |= {f"{folder}/CMakeFiles/kernels.dir/csrc/cuda/a.cu.o": "", f"{folder}/CMakeFiles/_C.dir/csrc/b.cpp.o": ""}
    texts |= {f"{folder}/build.ninja": NINJA}
    for n, (name, text) in enumerate(texts.items()):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        os.utime(path, (1000 + n, 1000 + n))
    build.sources_of.cache_clear()
    return tmp_path


def test_objects_are_those_that_the_module_is_linked_from(built: Path) -> None:
    a, b = build.objects(built)
    assert a.source == built / "csrc/cuda/a.cu"
    assert a.path.exists()
    assert b.path.exists()
    assert (a.is_cuda, b.is_cuda) == (True, False)
    assert a.flags[0] == "-O3"
    assert build.carried(built) == [90]
    assert build.sources_of(a.source) == {built / "csrc/cuda/a.cu", built / "csrc/cuda/a.cuh"}


def test_objects_that_are_not_those_of_the_sources_are_not_used(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "tool", lambda name: "/bin/true")
    assert build.unavailable_reason(built) is None
    os.utime(built / "csrc/c.h", (9000, 9000))  # nothing includes it
    assert build.unavailable_reason(built) is None
    os.utime(built / "csrc/cuda/a.cuh", (9000, 9000))
    said = build.unavailable_reason(built)
    assert said == "the object of csrc/cuda/a.cu is older than csrc/cuda/a.cuh; run make setup"
    build.objects(built)[0].path.unlink()
    assert "the object of csrc/cuda/a.cu is not in build/cmake-" in str(build.unavailable_reason(built))
    assert str(build.unavailable_reason(built)).endswith("run make setup")


def test_a_build_without_cuda_has_its_reason(built: Path) -> None:
    ninja = build.folder(built) / "build.ninja"
    ninja.write_text(NINJA.replace("CMakeFiles/kernels.dir/csrc/cuda/a.cu.o $\n ", ""))
    assert "built without CUDA kernels; ZOKERN_CUDA=on make setup" in str(build.unavailable_reason(built))
    ninja.unlink()
    assert "the kernels are built by `make setup` where nvcc is found" in str(build.unavailable_reason(built))


def test_a_missing_tool_has_its_reason(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "tool", lambda name: None)
    assert build.unavailable_reason(built) == "cuobjdump is neither in Triton's wheel nor on PATH"


def test_names_of_kernels_do_not_depend_on_the_build() -> None:
    tagged = "_ZN2zk4cuda52_GLOBAL__N__639645d4_8_chain_cu_e298eb4012chain_kernelIfEEvNS_5ChainE"
    other = "_ZN2zk4cuda54_GLOBAL__N__1b2c3d4e_8_chain_cu_0123456712chain_kernelIfEEvNS_5ChainE"
    assert build.plain_name(tagged) == build.plain_name(other) == "_ZN2zk4cuda12chain_kernelIfEEvNS_5ChainE"


def test_addresses_taken_for_shared_memory_and_sums_of_packed_products_are_found_in_text() -> None:
    assert lint.in_ptx({"right": "ld.shared.u32 %r1, [%r2];", "wrong": "cvta.to.shared.u64 %rd1, %rd2;"}) == [
        "wrong: 1 addresses are taken for shared memory's"
    ]
    product = "mul.rn.f32x2 %rd3,%rd1,%rd2; fma.rn.f32x2 %rd4,%rd3,%rd3,%rd3; add.rn.f32x2 %rd5,%rd4,%rd1;"
    wrong = product.replace("add.rn.f32x2 %rd5,%rd4,%rd1", "add.rn.f32x2 %rd5, %rd1, %rd3")
    assert lint.in_ptx({"right": product, "wrong": wrong}) == [
        "wrong: 1 packed sums of a product, which ptxas may contract"
    ]
    assert len(lint.in_ptx({"wrong": wrong.replace("add.rn", "sub.rn")})) == 1
    block = "{ .reg .b64 a, b; mov.b64 a, {%r1, %r2}; OP.rn.f32x2 a, a, a; mov.b64 {%r3, %r4}, a; } "
    apart = "mov.b64 %rd7, {%r3, %r4}; add.rn.f32x2 %rd8, %rd7, %rd6; { mov.b64 a, {%r1, %r2}; add.rn.f32x2 b, a, a; }"
    assert lint.packed_sums_of_products(block.replace("OP", "mul") + apart) == 1
    assert lint.packed_sums_of_products(block.replace("OP", "fma") + apart) == 0
    loop = wrong.replace("add.rn", "$L: fma.rn.f32x2 %rd3,%rd1,%rd2,%rd3; @%p1 bra $L; add.rn")
    assert lint.in_ptx({"right": loop}) == []
    right = (
        "//---- .text.right ----\n .L_x_1:\n LDS R1, [R2] ;\n LDS.128 R4, [R2+0x4] ;\n.L_x_2:\n LDS R3, [R2+0x4] ;\n"
    )
    wrong = (
        "//---- .text.wrong ----\n IMAD R2, R9, 0x8, R8 ;\n LDS R1, [R2+0x10] ;\n FADD R5, R6 ;\n LDS R3, [R2+0x14] ;\n"
    )
    assert lint.in_sass(right + wrong) == ["wrong: the words of a seed are read from shared memory"]


# ----------------------------------------------------------------------------------------------------------- the cache
def test_the_cache_is_where_it_is_named_and_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.ENVIRONMENT, str(tmp_path / "a" / "b"))
    assert cache.folder() == tmp_path / "a" / "b"
    assert cache.folder().is_dir()
    monkeypatch.setattr(os, "getuid", lambda: 123456)
    with pytest.raises(PermissionError, match=r"belongs to another user; name a folder of yours in \$ZOKERN_PTX_CACHE"):
        cache.folder()


def test_files_of_the_cache_are_there_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "programs" / "x"

    def fail() -> None:
        with cache.writing(file) as half:
            half.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(file.parent.iterdir()) == []
    with cache.writing(file) as one, cache.writing(file) as other:  # two processes at once
        one.write_text("whole")
        other.write_text("whole")
        assert not file.exists()
    assert file.read_text() == "whole"
    assert list(file.parent.iterdir()) == [file]


# --------------------------------------------------------------------------------------------------------- the command
def worker(target: Target, *events: dict[str, Any] | str, status: int = 0) -> Worker:
    """One that says this."""
    lines = [event if isinstance(event, str) else json.dumps(event) for event in events]
    return Worker(target, [sys.executable, "-c", f"print({chr(10).join(lines)!r}); raise SystemExit({status})"])


END = {"left": 0, "sizes": {"k": [3, 1]}, "covered": {"k": [0]}, "kernels": 2, "unset": []}


def case(name: str, *wrong: str) -> dict[str, Any]:
    return {"case": name, "seconds": 0.25, "wrong": list(wrong)}


def test_what_workers_say_is_added_up(capsys: pytest.CaptureFixture[str]) -> None:
    target, other = Target("cuda", 90), Target("triton", 90)
    one = worker(target, {"total": 2}, case("a"), case("b", "3 elements differ"), END)
    two = worker(target, {"total": 2}, "a warning", case("c"), END | {"left": 1, "covered": {"k": [1]}})
    nothing = worker(other, {"total": 0}, END | {"sizes": {}, "covered": {}, "unset": ["k2: %r1 may be unset"]})
    runner.run([one, two, nothing], 2, None)
    assert (target.cases, target.left, target.seconds, target.kernels) == (3, 1, 0.75, 2)
    assert target.wrong == {"b": ["3 elements differ"]}
    assert target.coverage() == 1.0
    assert other.wrong == {"registers of k2: %r1 may be unset": []}
    said = capsys.readouterr().out
    assert "WRONG  cuda sm_90  b\n        3 elements differ" in said
    assert "WRONG  triton sm_90  registers of k2: %r1 may be unset" in said


@pytest.mark.parametrize(
    ("events", "status", "what"),
    [
        (["Segmentation fault in [cuda]"], -11 % 256, "status 245 after 0 of None cases"),
        ([{"total": 3}, case("a"), "Segmentation fault in [cuda]"], 1, "status 1 after 1 of 3 cases"),
        ([{"total": 3}, case("a"), "Segmentation fault in [cuda]", END], 0, "status 0 after 1 of 3 cases"),
    ],
)
def test_a_worker_that_does_not_do_its_share_is_wrong(
    events: list[Any], status: int, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = Target("cuda", 90)
    runner.run([worker(target, *events, status=status)], 1, None)
    assert target.wrong == {f"a worker ended with {what}": ["Segmentation fault in [cuda]"]}
    assert "Segmentation fault in [cuda]" in capsys.readouterr().out


def test_workers_share_the_time_that_is_left() -> None:
    """Three workers, one after another, have a third of it each at first; what one leaves goes to the others."""
    target = Target("cuda", 90)
    tell = "import sys, json; print(json.dumps({'total': 0})); print(json.dumps(dict(json.loads(sys.argv[1]), left=0)))"
    code = f"{tell}; print(sys.argv[3])"
    workers = [Worker(target, [sys.executable, "-c", code, json.dumps(END)]) for _ in range(3)]
    runner.run(workers, 1, time.monotonic() + 600)
    shares = [float(w.text[0]) for w in workers]
    assert 190 < shares[0] <= 200
    assert 200 < shares[1] < 300
    assert 400 < shares[2] <= 600


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(command.main)
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "TERM": "dumb"})


def test_the_command_teaches_and_refuses_what_it_does_not_know() -> None:
    shown = python("-m", "tests.ptx", "--help", COLUMNS="200").stdout
    for word in ("--quick", "--only", "--arch", "--output", "Exit status", "python -m tests.ptx --backend cuda"):
        assert word in shown
    for option, value in (("--backend", "rocm"), ("--peer", "gpu"), ("--jobs", "0"), ("--arch", "gfx90a")):
        refused = invoke(option, value)
        assert refused.exit_code == 2
        assert f"{option} is" in refused.stderr


def test_amd_has_no_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is told who asked for all that there is; who asks for CUDA on such an architecture is."""
    for module in (build, triton_host):
        monkeypatch.setattr(module, "unavailable_reason", lambda: None)
    monkeypatch.setattr(command, "unknown_architecture", lambda target: None)
    targets, reasons = command.available(["cuda", "triton"], [90, "gfx942"], False)
    assert ([t.name for t in targets], reasons) == (["cuda sm_90", "triton sm_90", "triton gfx942"], {})
    targets, reasons = command.available(["cuda"], ["gfx942"], True)
    assert targets == []
    assert reasons == {"cuda gfx942": "CUDA's kernels are for NVIDIA's GPUs; Triton's serve AMD's"}


def test_what_cannot_run_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "unavailable_reason", lambda: "there is no [nvcc]")
    done = invoke("--quick", "--backend", "cuda")
    assert done.exit_code == 2
    assert "cuda not run: there is no [nvcc]" in done.stdout
    assert "0 cases, 0 wrong" in done.stdout


@pytest.mark.parametrize(("events", "status"), [([case("a")], 0), ([case("a", "3 elements differ")], 1), ([], 1)])
def test_the_exit_status_says_whether_all_is_right(
    events: list[Any], status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And no case is no success."""
    monkeypatch.setattr(triton_host, "unavailable_reason", lambda: None)
    monkeypatch.setattr(
        command, "workers", lambda targets, *_: [worker(targets[0], {"total": len(events)}, *events, END)]
    )
    done = invoke("--quick", "--backend", "triton", "--arch", "gfx942", "--output", str(tmp_path / "out"))
    assert done.exit_code == status, done.stdout
    assert ("no case ran" in done.stdout) == (not events)
    (record,) = json.loads((tmp_path / "out").read_text())
    assert (record["cases"], len(record["wrong"])) == (len(events), int(bool(events) and status))
    assert record["blocks that no case runs"] == {"k": [1]}


# ------------------------------------------------------------------------------------------------------------- mutants
TEXT = """.visible .entry k(.param .u64 k_0) {
.reg .pred %p<9>; .reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .f32 %f<9>;
setp.lt.u32 %p1, %r1, 5;
@%p1 bra $A;
{ fma.rn.f32 %f1, %f2, %f3, %f4; mov.b64 %rd1, {%f1, %f2}; }
$A: ld.param.u64 %rd2, [k_0+8];
ret;
}
"""


def test_mutants_are_of_instructions_that_some_case_runs() -> None:
    blocks = mutants.instructions_by_block(TEXT)
    assert blocks[1] == {"fma.rn.f32 %f1, %f2, %f3, %f4", "mov.b64 %rd1, {%f1, %f2}"}
    every = list(mutants.mutants_of("k", TEXT, set().union(*blocks)))
    made = {(m.kind, m.becomes) for m in every}
    assert ("< to <=", "setp.le.u32 %p1, %r1, 5;") in made
    assert ("one more", "setp.lt.u32 %p1, %r1, 6;") in made
    assert ("other branch", "@!%p1 bra $A;") in made
    assert ("fma without its sum", "mul.rn.f32 %f1, %f2, %f3;") in made
    assert ("fma without its product", "mov.f32 %f1, %f4;") in made
    assert ("halves of a pair", "mov.b64 %rd1, {%f2, %f1};") in made
    assert not [m for m in every if ".param" in m.was]
    assert {m.was for m in mutants.mutants_of("k", TEXT, blocks[0])} == {"setp.lt.u32 %p1, %r1, 5;", "@%p1 bra $A;"}
    one = next(m for m in every if m.kind == "fma without its sum")
    assert one.apply(TEXT) == TEXT.replace("fma.rn.f32 %f1, %f2, %f3, %f4;", "mul.rn.f32 %f1, %f2, %f3;")
    drawn = mutants.draw(every, 3, seed=1)
    assert len({m.kind for m in drawn}) == 3
    assert len(mutants.draw(every, 100, seed=1)) == len(every)


@pytest.mark.parametrize(("said", "found", "why"), [
    ([["3 bits differ"]], True, ["3 bits differ"]),  # of the right kernel, before any change
    ([[]], False, ["kernel has nothing to be changed"]),
    ([[], []], True, ["fma.rn.f32 without its product was not noticed"]),
    ([[], ["a fault, but no bit"]], True, ["fma.rn.f32 without its product was not noticed"]),
    ([[], ["3 bits differ"]], True, []),
])  # fmt: skip
def test_the_check_of_the_checks_says_why_it_fails(said: list, found: bool, why: list[str], monkeypatch) -> None:
    """`a changed kernel is noticed`, with what the comparisons say in turn; the kernel is as it was afterwards."""

    class Mutant:
        kind = "fma.rn.f32, fma without its product"

        def apply(self, text: str) -> str:
            return "changed"

        def __str__(self) -> str:
            return "fma.rn.f32 without its product"

    answers = iter(said)
    launch = SimpleNamespace(kernel="kernel", report=SimpleNamespace(blocks=["entry"]))
    interpreter = SimpleNamespace(
        instructions_by_block=lambda text: {"entry": [0]},
        mutants_of=lambda *given: [Mutant()] if found else [],
        translate=lambda text: text,
    )
    emulator: Any = SimpleNamespace(
        launches=[launch], sources={"kernel": "text"}, programs={"kernel": "right"}, interpreter=interpreter
    )
    monkeypatch.setattr(compare, "compare", lambda *given: next(answers))
    case: Any = None
    assert compare.notices(case, "cuda", None, None, emulator) == why
    assert emulator.programs == {"kernel": "right"}
    assert next(answers, "all were asked") == "all were asked"
