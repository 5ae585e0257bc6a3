"""`zokern bench`: what its cases really do, what bytes and shares they report, its files, pictures and command line.

Tiny sizes; nothing here looks at how long anything took, except that a time is a time.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.command_lines import parse
from zokern import noise
from zokern.bench import (
    kernels,
    limits,
    model,
    models,
    plots,
    prediction,
    record,
    scaling,
    step,
    step_cases,
    tables,
    timing,
)  # fmt: skip
from zokern.bench.cases import BENCHMARKS, SIZES, Case, is_ours
from zokern.bench.peers import Compiled, Foreach, HeleneSettings, Peer, Published, Sweep, draw, in_place, peers
from zokern.bench.plots import PlotError
from zokern.bench.shapes import MIN_ELEMENTS, opt_like
from zokern.bench.workload import COEFS, EPS, SCALARS, Workload, choose_backends
from zokern.cli import app
from zokern.contract.reference_rules import apply
from zokern.sweep import Passes

CPU, N = torch.device("cpu"), MIN_ELEMENTS
CASES = {c.title: c for b in BENCHMARKS.values() for dtype in SIZES for c in b.cases(dtype)}


def settings(output: Path, **changes: Any) -> kernels.Settings:
    given = {"device": CPU, "dtypes": ("float32",), "elements": N, "rounds": 1, "compiled": False, "output": output}
    return kernels.Settings(**{**given, **changes})


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"COLUMNS": "200"})


# -------------------------------------------------------------------------------------------------- what a case does


@pytest.mark.parametrize("elements", [N, 100_003, 1 << 25, 1 << 30])
def test_shapes_sum_to_the_elements_asked_for(elements: int) -> None:
    shapes = opt_like(elements)
    sizes = [math.prod(shape) for shape in [*(s for block in shapes.blocks for s in block), *shapes.rest]]
    assert sum(sizes) == elements
    assert min(sizes) > 0
    assert len(shapes.blocks) % 4 == 0
    assert {len(block) for block in shapes.blocks} == {16}
    assert sum(math.prod(s) for block in shapes.blocks for s in block) <= 0.9 * elements


def test_too_few_elements_are_refused() -> None:
    with pytest.raises(ValueError, match="elements is 8191"):
        opt_like(8191)


@pytest.mark.parametrize("title", CASES)
def test_our_call_is_one_launch_over_every_element(title: str) -> None:
    work = Workload(CASES[title], N, CPU)
    before = [m.param.clone() for m in work.members]
    states = [{name: t.clone() for name, t in m.states.items()} for m in work.members]
    work.ours("cpu")()
    counters = work.passes["cpu"].counters
    assert (counters.launches, counters.passes) == (1, 1)
    assert counters.elements_moved == (2 + work.case.fork) * work.active
    changed = {"scaled_axpy": (), "axpy": (), "hizoo": ("h",), "hizoo_restore": ("h",), "helene": ("m", "h")}
    for i, m in enumerate(work.members):
        if work.case.rule in ("axpy", "scaled_axpy", "hizoo_restore") and m.param.numel() > 8:
            assert not torch.equal(m.param, before[i])
        for name, old in states[i].items():
            if work.case.state_dtype == "float32" and m.param.numel() > 8:
                assert torch.equal(m.states[name], old) == (name not in changed[work.case.rule])


@pytest.mark.parametrize("title", ["axpy, K = 4, float32", "HiZOO restore and update, h float32, bfloat16",
                                   "axpy, stochastic rounding, bfloat16", "axpy, Rademacher, float32",
                                   "HELENE update, float32"])  # fmt: skip
def test_our_call_is_the_pass_that_the_case_names(title: str) -> None:
    """Bits of the last tensor but one against the reference."""
    case, seeds = CASES[title], list(range(CASES[title].seeds))
    work = Workload(case, N, CPU)
    member = work.members[-2]
    bits = {"float32": torch.float32, "bfloat16": torch.uint16}[case.dtype]
    old = member.param.flatten().view(bits).numpy().copy()
    states = {name: t.flatten().numpy().copy() for name, t in member.states.items()}
    work.ours("cpu")()
    new, changed = apply(
        case.rule, old, states, dtype=case.dtype, tensor_id=member.tensor_id, seeds=seeds,
        coefs={name: [value / len(seeds)] * len(seeds) for name, value in COEFS[case.rule].items()},
        scalars={name: SCALARS[name] for name in SCALARS}, distribution=case.distribution, rounding=case.rounding,
        rounding_seed=7,
    )  # fmt: skip
    assert torch.equal(member.param.flatten().view(bits), torch.from_numpy(new))
    for name, value in changed.items():
        assert torch.equal(member.states[name].flatten(), torch.from_numpy(value))


def test_left_out_blocks_are_neither_timed_nor_counted() -> None:
    whole, part = (Workload(CASES[f"axpy, {n}% of the blocks left out, bfloat16"], N, CPU) for n in (0, 75))
    block = sum(math.prod(shape) for shape in opt_like(N).blocks[0])
    assert (part.blocks, part.blocks_active) == (4, 1)
    assert whole.active == N
    assert part.active == N - 3 * block
    assert part.nbytes == 4 * part.active
    assert part.copy()().nbytes == part.nbytes // 8 * 4  # as much again is read


def test_one_pass_a_seed_makes_the_same_number_of_moves_as_seeds() -> None:
    work = Workload(CASES["axpy, K = 4, float32"], N, CPU)
    work.one_by_one("cpu")()
    assert work.passes["cpu"].counters.launches == 4


@pytest.mark.parametrize("title", ["update and next perturbation, bfloat16", "update and next perturbation, float32",
                                   "replay of 8 updates, bfloat16", "replay of 8 updates, float32"])  # fmt: skip
def test_a_sweep_of_passes_has_the_bits_of_a_sweep_each(title: str) -> None:
    torch.manual_seed(0)
    one = Workload(CASES[title], N, CPU)
    torch.manual_seed(0)
    each = Workload(CASES[title], N, CPU)
    before = [m.param.clone() for m in one.members]
    one.ours("cpu")()
    each.one_by_one("cpu")()
    for a, b, old in zip(one.members, each.members, before, strict=True):
        assert torch.equal(a.param, b.param)
        assert not torch.equal(a.param, old)
    assert len(one.probes) == (len(one.members) if one.case.fork else 0)
    assert all(torch.equal(a, b) for a, b in zip(one.probes, each.probes, strict=True))
    assert each.passes["cpu"].counters.passes == one.case.stages
    assert (one.case.rounding == "stochastic") == (one.case.dtype == "bfloat16")


class Recorder(Published):
    """Notes which sweeps it is asked for, with their seeds."""

    def __init__(self) -> None:
        self.sweeps: list[tuple[str, int]] = []

    def run(self, sweep: Sweep) -> None:
        name = sweep.distribution if sweep.rule == "axpy" else sweep.rule
        self.sweeps.append((name, torch.initial_seed()))


@pytest.mark.parametrize(("title", "sweeps"), [
    ("axpy, K = 4, float32", [("normal", k) for k in range(4)]), ("axpy, Rademacher, bfloat16", [("rademacher", 0)]),
    ("HiZOO perturb, h float32, float32", [("scaled_axpy", 0)]), ("HiZOO update, h float32, float32", [("hizoo", 0)]),
    ("HiZOO restore and update, h float32, float32", [("scaled_axpy", 0), ("hizoo", 0)]),
    ("HELENE update, float32", [("helene", 0)]),
    ("update and next perturbation, float32", [("normal", 0), ("normal", 1)]),
    ("replay of 8 updates, bfloat16", [("normal", k) for k in range(8)]),
])  # fmt: skip
def test_a_peer_does_a_sweep_for_each_thing_that_our_pass_does(
    title: str, sweeps: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, ours = Recorder(), []
    monkeypatch.setattr(Passes, "run", lambda self, sweep, spec, numbers, **more: ours.append([(spec, numbers)]))
    monkeypatch.setattr(Passes, "chain", lambda self, sweep, stages, rule, **more: ours.append(stages))
    calls = Workload(CASES[title], N, CPU).candidates(["cpu"], [recorder])
    calls["published"]()
    assert recorder.sweeps == sweeps
    calls["zokern cpu"]()
    (stages,) = ours
    assert len(stages) == CASES[title].stages
    seeds = [seed for _, numbers in stages for seed in numbers.seeds.tolist()]
    assert seeds == list(range(CASES[title].seeds * CASES[title].stages))
    assert ("zokern cpu, a pass a seed" in calls) == (CASES[title].seeds > 1)
    assert ("zokern cpu, a sweep a pass" in calls) == (CASES[title].stages > 1)
    assert [label for label in calls if is_ours(label)] == ["zokern cpu"]


def test_the_interpreter_is_no_backend_to_time() -> None:
    assert choose_backends(CPU) == (["cpu"], {})


# ------------------------------------------------------------------------------------------------- bytes and the model


@pytest.mark.parametrize(("title", "nbytes"), [
    ("axpy, K = 1, float32", 8), ("axpy, K = 16, bfloat16", 4), ("HiZOO perturb, h float32, float32", 12),
    ("HiZOO perturb, h bfloat16, bfloat16", 6), ("HiZOO update, h float32, bfloat16", 12),
    ("HiZOO restore and update, h bfloat16, float32", 12), ("HELENE update, float32", 24), ("HELENE update, bfloat16", 20),
    ("update and next perturbation, bfloat16", 6), ("update and next perturbation, float32", 12),
    ("replay of 8 updates, bfloat16", 4),
])  # fmt: skip
def test_bytes_that_a_pass_must_move(title: str, nbytes: int) -> None:
    assert limits.bytes_per_element(CASES[title]) == nbytes


@pytest.mark.parametrize(("title", "operations"), [
    ("axpy, K = 1, float32", 26.5), ("axpy, K = 4, bfloat16", 1 + 4 * 25.5), ("axpy, Rademacher, float32", 4.46875),
    ("axpy, stochastic rounding, bfloat16", 37.0), ("HiZOO update, h float32, float32", 41.5),
    ("HELENE update, float32", 42.5), ("update and next perturbation, float32", 53.0),
    ("update and next perturbation, bfloat16", 53.0 + 10.5), ("replay of 8 updates, bfloat16", 8 * (26.5 + 10.5)),
])  # fmt: skip
def test_operations_of_an_element(title: str, operations: float) -> None:
    assert limits.operations_per_element(CASES[title]) == operations


def test_operations_of_the_noise_are_those_of_the_source() -> None:
    """normal_pair's, from csrc/noise.h: fused multiply-adds, conversions, and what the count gives for the rest."""
    source = (Path(__file__).parents[2] / "csrc" / "noise.h").read_text()
    body = re.sub(r"//.*", "", source[source.index("void normal_pair") : source.index("// A tile is")])
    fused, conversions = body.count("L::fma("), body.count("L::to_float(")
    others = len(re.findall(r" \* | \+ | - | >> |insert_mantissa\(", body))
    others += 2 * body.count("L::times(")  # a product each for two normals
    assert fused + conversions + others == 34 == 2 * (limits.NORMAL - limits.PHILOX / 8)


class FakeGpu:
    """What torch says of a GPU."""

    type, multi_processor_count = "cuda", 132


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> prediction.Basis:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: FakeGpu)
    basis = prediction.basis(torch.device("cuda"))
    assert isinstance(basis, prediction.Basis)
    return basis


def test_every_case_has_a_kernel_that_was_counted_or_none_for_a_reason(h200: prediction.Basis) -> None:
    """CUDA: all but what a kernel for several things decides at run time; Triton: with float32 states, and no chains."""
    for case in CASES.values():
        told = prediction.of(case, "cuda", h200)
        assert 0 < told["predicted_share"] <= 1, case
        assert told["slots"] > 9 * case.stages * case.seeds
        counted = case.stages == 1 and case.state_dtype == "float32"
        counted &= not (case.dtype == "float16" and case.rule != "axpy")
        assert ("predicted_share" in prediction.of(case, "triton", h200)) == counted, case


def test_the_predicted_share_is_the_models(h200: prediction.Basis) -> None:
    one = next(
        row for row in h200.rows
        if (row["backend"], row["arch"], row["rule"], row["dtype"], row["distribution"], row["rounding"], row["seeds"])
        == ("cuda", 90, "axpy", "bfloat16", "normal", "nearest", "one")
    )  # fmt: skip
    told = prediction.of(CASES["axpy, K = 1, bfloat16"], "cuda", h200)
    assert told["predicted_share"] == model.predicted_share(one, 4, "H200")
    assert told["slots"] == pytest.approx(one["slots"], abs=1e-2)


def test_further_seeds_and_stages_add_what_was_counted_of_each(h200: prediction.Basis) -> None:
    def rows(**wanted: Any) -> dict[str, Any]:
        wanted |= {"backend": "cuda", "arch": 90, "rule": "axpy", "dtype": "bfloat16"}
        dense = [row for row in h200.rows if row["distribution"] != "low_rank"]
        (found,) = [row for row in dense if all(row[key] == value for key, value in wanted.items())]
        return found

    several = rows(kernel="pass", distribution="normal", rounding="nearest", seeds="any")
    slots = several["slots"] + 15 * several["slots_per_extra_seed"]
    told = prediction.of(CASES["axpy, K = 16, bfloat16"], "cuda", h200)
    assert told["slots"] == pytest.approx(slots, abs=0.05)
    assert told["predicted_share"] < 0.1  # bound by instructions: 0.09 of the time is memory's
    chain = rows(kernel="chain")
    assert chain["slots"] < chain["slots_stochastic"]
    told = prediction.of(CASES["replay of 8 updates, bfloat16"], "cuda", h200)
    assert told["slots"] == pytest.approx(chain["slots_once"] + 8 * chain["slots_stochastic"], abs=0.05)
    told = prediction.of(CASES["update and next perturbation, bfloat16"], "cuda", h200)
    slots = chain["slots_once"] + chain["slots"] + chain["slots_stochastic"]
    assert told["slots"] == pytest.approx(slots, abs=0.05)


def test_kernels_that_decide_at_run_time_stand_for_the_way_that_was_counted() -> None:
    row = {"arch": 90, "backend": "cuda", "kernel": "pass", "rule": "hizoo", "dtype": "bfloat16", "state": "float32",
           "seeds": "any", "distribution": "any", "rounding": "any"}  # fmt: skip
    nearest = Case("", "hizoo", "bfloat16", seeds=2)
    assert prediction.row_of(nearest, "cuda", [row], 90) is row
    for other in (
        {"rounding": "stochastic"},
        {"distribution": "rademacher"},
        {"state_dtype": "bfloat16"},
        {"seeds": 1},
    ):
        assert prediction.row_of(replace(nearest, **other), "cuda", [row], 90) is None
    assert prediction.row_of(nearest, "triton", [row], 90) is None
    assert prediction.row_of(nearest, "cuda", [row], 80) is None


def test_why_nothing_is_predicted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, h200: prediction.Basis) -> None:
    gpu = torch.device("cuda")
    assert prediction.basis(CPU) == "the model is of GPUs"
    assert "machine_code.json: it is in a checkout" in str(prediction.basis(gpu, tmp_path / "machine_code.json"))
    monkeypatch.setattr(FakeGpu, "multi_processor_count", 114)
    assert "has 114 multiprocessors and the one in zokern/bench/model.py 132" in str(prediction.basis(gpu))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    assert "no figures of this GPU: device is 'NVIDIA L4'" in str(prediction.basis(gpu))
    case = CASES["axpy, K = 1, bfloat16"]
    assert prediction.of(case, "cuda", "no reason") == {"not_predicted": "no reason"}
    assert prediction.of(case, "cuda", replace(h200, rows=[])) == {
        "not_predicted": "machine_code.json has no such kernel of cuda for sm_90"
    }
    facts = h200.facts()
    assert facts["device"] == "H200"
    assert facts["issue_per_second"] == 132 * 1.98e9 * 128
    assert set(facts["compilers"]) == {"nvcc", "triton"}


# ------------------------------------------------------------------------------------------------------------- peers

HELENE = HeleneSettings(alpha=0.95, beta1=0.9, beta2=0.99, b=0.3, gamma=2.0, floor=0.9, delta=1e-3)


def lists(dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """w, h, m: two tensors each."""
    generator = torch.Generator().manual_seed(3)
    make = [[torch.rand(shape, generator=generator) + 0.5 for shape in ((40, 8), (33,))] for _ in range(3)]
    return [[t.to(dtype) for t in tensors] for tensors in make]


class InPlace(Compiled):
    """What `compiled` compiles, without torch.compile: it draws from a generator of its own."""

    def __init__(self, group: int = 0) -> None:
        super().__init__(group)
        self._call = in_place


def drawn(w: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(t.shape, dtype=t.dtype).double() for t in w]


@pytest.mark.parametrize("peer", [Published(), Foreach(), InPlace(), InPlace(group=1)])
def test_peers_compute_the_methods_equations(peer: Peer) -> None:
    (w, h, m), c, lr, a, ak = lists(torch.float32), 0.7, 0.1, 0.01, 0.2
    with torch.random.fork_rng():
        z = drawn(w, 5)
        was = [t.double() for t in w]
        peer.axpy(w, 5, (-2.0, 1e-2))
        for new, old, x in zip(w, was, z, strict=True):
            torch.testing.assert_close(new.double(), old - 2e-2 * x, rtol=1e-5, atol=1e-6)
        was, root = [t.double() for t in w], [t.double().sqrt() for t in h]
        peer.scaled_axpy(w, h, 5, (1.0, 1e-2))
        for new, old, x, r in zip(w, was, z, root, strict=True):
            torch.testing.assert_close(new.double(), old + 1e-2 * x / r, rtol=1e-5, atol=1e-6)
        was, curvature = [t.double() for t in w], [t.double() for t in h]
        peer.hizoo(w, h, 5, c, lr, ak, a)
        for i, x in enumerate(z):
            expected = (1 - a) * curvature[i] + ak * curvature[i] * x * x
            torch.testing.assert_close(h[i].double(), expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(w[i].double(), was[i] - lr * c * x / expected.sqrt(), rtol=1e-5, atol=1e-6)
        was, states = [t.double() for t in w], [(x.double(), y.double()) for x, y in zip(m, h, strict=True)]
        peer.helene(w, m, h, 5, c, lr, HELENE)
        for i, x in enumerate(z):
            momentum, hessian = 0.9 * states[i][0] + 0.95 * c * x, 0.99 * states[i][1] + 0.3 * x * x
            torch.testing.assert_close(m[i].double(), momentum, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(h[i].double(), hessian, rtol=1e-5, atol=1e-6)
            below = 2.0 * hessian.clamp(min=0.9) + 1e-3
            torch.testing.assert_close(w[i].double(), was[i] - lr * momentum / below, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("peer", [Published(), Foreach(), InPlace()])
def test_peers_keep_dtypes_restore_by_the_seed_and_draw_signs(peer: Peer) -> None:
    w, h, _ = lists(torch.bfloat16)
    wide = [t.float() for t in h]
    with torch.random.fork_rng():
        peer.hizoo(w, wide, 1, 0.5, 1e-3, 0.1, 0.1)
        assert {t.dtype for t in w} == {torch.bfloat16}
        assert {t.dtype for t in wide} == {torch.float32}
        zeros = [torch.zeros(64), torch.zeros(3, 5)]
        peer.axpy(zeros, 9, (1.0, 0.5), "rademacher")
        assert all(t.abs().eq(0.5).all() for t in zeros)
        assert zeros[0].unique().numel() == 2
        peer.axpy(zeros, 9, (-1.0, 0.5), "rademacher")
        assert not any(t.any() for t in zeros)


@pytest.mark.slow
def test_the_compiled_peer_compiles_and_restores_by_the_seed() -> None:
    w = [torch.zeros(64, 32), torch.zeros(40)]
    compiled = Compiled(group=1)
    with torch.random.fork_rng():
        compiled.axpy(w, 3, (1.0, 0.1))
        assert 0.09 < w[0].std() < 0.11
        compiled.axpy(w, 3, (-1.0, 0.1))
    assert max(float(t.abs().max()) for t in w) < 1e-6
    assert [p.name for p in peers(compiled=True)] == ["published", "foreach", "compiled"]


def test_published_peer_moves_as_often_as_counted() -> None:
    """37 element moves of MeZO's step: a sweep is 8 (draw 1, two products 2 each, a sum 3), three of them make 24."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Moves(TorchDispatchMode):
        moved = 0

        def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = f(*args, **(kwargs or {}))
            name = f.overloadpacket.__name__
            reads = sum(isinstance(t, torch.Tensor) and t.numel() > 1 for t in args) if name in ("mul", "add") else 0
            if name in ("mul", "add", "normal", "normal_"):
                Moves.moved += reads + 1
            return out

    w = [torch.zeros(100)]
    with torch.random.fork_rng(), Moves():
        Published().axpy(w, 0, (1.0, EPS))
    assert Moves.moved == 8


# ------------------------------------------------------------------------------------------------- runs and their files

WAY = {"median", "min", "max", "rounds", "ns_per_element", "gb_per_s", "share_of_copy", "speedup_over"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Every benchmark at the least size."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("bench")
    for name in BENCHMARKS:
        kernels.run(name, settings(output, dtypes=("float32", "bfloat16")))
    return output, json.loads((output / "kernels-hizoo-cpu.json").read_text())


def test_a_record_tells_the_machine_the_settings_and_consistent_figures(run: tuple[Path, dict[str, Any]]) -> None:
    _, stored = run
    assert {"benchmark", "date", "commit", "machine", "settings", "complete", "results"} == stored.keys()
    assert {"processor", "threads", "torch", "python", "zokern"} <= stored["machine"].keys()
    assert stored["settings"]["prediction"] == {"unknown": "the model is of GPUs"}
    assert stored["complete"]
    assert len(stored["results"]) == 12
    for title, result in stored["results"].items():
        assert result["bytes"] == result["bytes_per_element"] * result["elements"] == N * result["bytes_per_element"]
        assert list(result["ways"]) == ["zokern cpu", "copy", "published", "foreach"]
        assert Case(**result["case"]).title == title
        for label, way in result["ways"].items():
            assert way.keys() - {"not_predicted"} == WAY
            assert 0 < way["min"] <= way["median"] <= way["max"]
            assert way["gb_per_s"] == pytest.approx(result["bytes"] / way["median"] / 1e9)
            assert way["ns_per_element"] == pytest.approx(way["median"] / N * 1e9)
            copy = result["ways"]["copy"]
            assert way["share_of_copy"] == pytest.approx(way["gb_per_s"] / copy["gb_per_s"])
            other = result["ways"]["foreach"]["median"] / way["median"]
            assert way["speedup_over"]["foreach"] == pytest.approx(other), label


def test_a_killed_run_leaves_what_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies at once when the third case begins, as under kill -9."""
    code = (
        "import os, sys, torch; from pathlib import Path; from zokern.bench import kernels\n"
        "torch.set_num_threads(1); real, count = kernels.measure, []\n"
        "def measure(*a):\n    count.append(1)\n    return real(*a) if len(count) < 3 else os._exit(9)\n"
        "kernels.measure = measure\n"
        f"s = kernels.Settings(torch.device('cpu'), ('float32',), {N}, 1, False, Path(sys.argv[1]))\n"
        "kernels.run('layers', s)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 9
    stored = json.loads((tmp_path / "kernels-layers-cpu.json").read_text())
    assert len(stored["results"]) == 2
    assert stored["complete"] is False


def test_a_write_that_fails_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    record.store("x", CPU, {}, {"a": 1}, path)
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        record.store("x", CPU, {}, {"a": 2}, path)
    assert json.loads(path.read_text())["results"] == {"a": 1}


def test_the_driver_is_told_or_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    monkeypatch.setattr(record.shutil, "which", lambda name, path=None: str(smi) if smi.exists() else None)
    assert record.driver() == "unknown: there is no nvidia-smi"
    smi.write_text("#!/bin/sh\necho 580.95\necho 580.95\n")
    smi.chmod(0o755)
    assert record.driver() == "580.95"
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert record.driver() == "unknown: nvidia-smi ended with 9"


def test_nothing_is_begun_after_the_deadline(tmp_path: Path) -> None:
    assert kernels.run("axpy", settings(tmp_path, deadline=0.0)) is None
    assert list(tmp_path.iterdir()) == []


def test_dtypes_that_leave_no_case_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give a 16-bit dtype"):
        kernels.run("stochastic", settings(tmp_path))


def test_each_candidate_is_called_once_a_round_and_for_a_warm_up() -> None:
    calls: list[str] = []
    times = timing.time_in_rounds({n: lambda n=n: calls.append(n) for n in "ab"}, CPU, 3, "", device_only=True)
    assert "".join(calls) == "abababab"
    assert {t["rounds"] for t in times.values()} == {3}


# ---------------------------------------------------------------------------------------------------- tables, pictures


def test_pictures_are_made_from_stored_files_alone(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = sorted(run[0].glob("*.json"))
    assert len(files) == len(BENCHMARKS)
    result = invoke("plot", *files, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{path.stem}.png" for path in files} | {"kernels-roofline-cpu.png"}
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
        assert 5_000 < path.stat().st_size < 150_000


def test_bars_show_the_stored_shares(run: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("matplotlib")
    figures: list[Any] = []
    monkeypatch.setattr(plots, "save", lambda figure, record, path: figures.append(figure) or path)
    plots.bars(run[1], tmp_path / "x.png")
    widths = sorted(patch.get_width() for patch in figures[0].axes[0].patches)
    shares = [
        100 * way["share_of_copy"] for r in run[1]["results"].values() for label, way in r["ways"].items()
        if label != "copy"
    ]  # fmt: skip
    assert widths == pytest.approx(sorted(shares))


GPU = {"gpu": "NVIDIA H200", "driver": "580.1", "cuda": "13.0", "torch": "2.13.0"}


def as_if_on_a_gpu(stored: dict[str, Any]) -> dict[str, Any]:
    """The record with made-up slots and predictions, for the pictures' and tables' other branch."""
    copy = json.loads(json.dumps(stored))
    copy["machine"], copy["settings"]["prediction"] = GPU, {"issue_per_second": 3.3e13}
    for result in copy["results"].values():
        for label, way in result["ways"].items():
            if label.startswith("zokern"):
                way |= {"slots": 40.0, "predicted_share": 0.97}
    return copy


def test_predictions_and_the_issue_roof_are_drawn(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "kernels-hizoo-cuda.json"
    path.write_text(json.dumps(as_if_on_a_gpu(run[1])))
    names = {path.name for path in plots.draw([path], tmp_path)}
    assert names == {"kernels-hizoo-cuda.png", "kernels-roofline-cuda.png"}
    assert "predicted" in [column.header for column in tables.kernels(as_if_on_a_gpu(run[1])).columns]
    assert "NVIDIA H200, driver 580.1" in plots.caption(as_if_on_a_gpu(run[1]))


@pytest.mark.parametrize("kind", ["step", "scaling"])
def test_pictures_of_whole_steps(kind: str, tmp_path: Path) -> None:
    """Of runs in which one case was not timed."""
    pytest.importorskip("matplotlib")
    path = tmp_path / f"{kind}-cpu.json"
    if kind == "step":
        weights = 4 * models.parameters("tiny-opt")
        wanted = ("tiny-opt",), ("mezo", "hizoo"), ("stream",), ((2, 8),), "float32"
        step.Run(step_cases.Settings(*wanted, device="cpu", rounds=1, memory_limit=2 * weights), path).run()
    else:
        scaling.Run(
            scaling.Settings(
                (100_000, 10**6), ("float32",), ("mezo",), ("auto",), device="cpu", rounds=1, memory_limit=10**6
            ),
            path,
        ).run()
    stored = json.loads(path.read_text())
    results = stored["results"]
    states = {r["status"] for r in (results if kind == "scaling" else results.values())}
    assert states == {"timed", "does not fit"}
    assert plots.kind(stored) == kind
    (drawn,) = plots.draw([path], tmp_path)
    assert 5_000 < drawn.stat().st_size < 150_000
    for result in results if kind == "scaling" else results.values():
        result["status"] = "left out"
    path.write_text(json.dumps(stored))
    with pytest.raises(PlotError, match="nothing in it was timed"):
        plots.draw([path], tmp_path)


@pytest.mark.parametrize(("text", "message"), [
    ("{", "is not JSON"), ("[]", "is not a record of zokern bench"),
    ('{"benchmark": "x", "machine": {}, "settings": {}, "results": {}}', "has no results"),
    ('{"benchmark": "drift", "machine": {}, "settings": {}, "results": {"a": {"b": 1}}}',
     "no picture for the benchmark 'drift'"),
])  # fmt: skip
def test_files_without_a_picture_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(PlotError, match=message):
        plots.draw([path], tmp_path)
    assert invoke("plot", path, "-o", tmp_path).exit_code == 1
    with pytest.raises(PlotError, match="No such file"):
        plots.load(tmp_path / "none.json")


def test_pages_say_what_is_stored(run: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/kernels/page.py on this run's files: figures as stored, a warning where rounds differ, no GPU run."""
    module: Any = importlib.import_module("benchmarks.kernels.page")
    monkeypatch.setattr(module, "RESULTS", run[0])
    assert module.kernels_gpu() == "**Not yet run on a GPU.**"
    way = run[1]["results"]["HiZOO perturb, h float32, bfloat16"]["ways"]["zokern cpu"]
    assert f"| {way['ns_per_element']:.3g} | {way['gb_per_s']:.3g} |" in module.kernels_cpu()
    stored = json.loads((run[0] / "kernels-axpy-cpu.json").read_text())["results"]["axpy, K = 16, bfloat16"]
    assert f"{stored['ways']['zokern cpu']['ns_per_element']:.2g} ns" in module.kernel_headlines()
    assert "not quiet" not in module._run_of(run[1])  # of one round each
    way["max"] = 3 * way["min"]
    assert "times of one way differ by up to 3.0 x" in module._run_of(run[1])
    way["max"] = way["min"]


def test_a_page_warns_of_ways_that_it_tells_of() -> None:
    """On a GPU, peers whose ratios are left out may wait for Python: that is no noise of the machine."""
    module: Any = importlib.import_module("benchmarks.kernels.page")

    def warned(label: str, seeds: int, machine: dict[str, Any]) -> bool:
        quiet, noisy = {"min": 1.0, "max": 1.1}, {"min": 1.0, "max": 4.0}
        over = {"speedup_over": {"copy": 1.0, "published": 2.0, "foreach": 3.0}}
        ways = {"zokern x": {**quiet, **over}, "copy": quiet, "published": quiet, "foreach": quiet}
        ways[label] = {**ways[label], **noisy}
        case = {"rule": "axpy", "distribution": "normal", "seeds": seeds, "stages": 1}
        about = {"settings": {"elements": 1, "rounds": 2}, "complete": True, "machine": machine}
        return "not quiet" in module._run_of({**about, "results": {"case": {"case": case, "ways": ways}}})

    gpu = {"gpu": "a GPU", "driver": "1", "cuda": "1", "torch": "1"}
    cpu = {"processor": "a CPU", "threads": 1, "torch": "1"}
    assert not warned("published", 4, gpu)
    assert warned("published", 1, gpu)
    assert warned("foreach", 4, gpu)
    assert warned("published", 4, cpu)
    assert all(warned(label, 4, machine) for label in ("zokern x", "copy") for machine in (gpu, cpu))


def test_ratios_to_peers_that_outrun_a_gpus_queue_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What two runs of one commit agreed on stays; on a CPU everything does."""
    module: Any = importlib.import_module("benchmarks.kernels.page")
    way = {"speedup_over": {"copy": 1.0, "published": 2.0, "foreach": 3.0, "compiled": 4.0}}
    case = {"rule": "axpy", "distribution": "normal", "seeds": 1, "stages": 1}

    def kept(on_gpu: bool = True, **change: object) -> set[str]:
        return set(module.over_peers({"case": case | change}, way, on_gpu))

    assert kept() == {"published", "foreach", "compiled"}
    assert kept(seeds=4) == kept(rule="hizoo") == kept(distribution="rademacher") == kept(stages=2) == {"foreach"}
    assert kept(seeds=16) == kept(stages=8) == set()
    assert kept(on_gpu=False, seeds=16) == {"published", "foreach", "compiled"}


# -------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(("arguments", "words"), [
    ((), ["kernels", "plot", "list", "% of copy", "published", "predicted"]),
    (("kernels",), ["--elements", "--quick", "--compiled", "--time-limit", "33,554,432"]),
    (("plot",), ["JSON..."]),
])  # fmt: skip
def test_help_teaches(arguments: tuple[str, ...], words: list[str]) -> None:
    result = invoke(*arguments, "--help")
    assert result.exit_code == 0
    for word in words:
        assert word in result.output


def test_make_bench_is_understood_by_the_command_line() -> None:
    """What `make bench` would run: each benchmark once, into the stored results, and then the pages."""
    root = Path(__file__).parents[2]
    told = subprocess.run(["make", "-n", "bench"], cwd=root, capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in told.splitlines()]
    ran = [parse(line[1:]) for line in lines if len(line) > 2 and line[0].endswith("/zokern") and line[1] == "bench"]
    assert [name for name, _ in ran] == ["kernels", "step", "scaling"]
    for _, given in ran:
        assert (given["output"], given["time_limit"]) == (Path("benchmarks/results"), 900)
    assert [line[1:] for line in lines if line and line[0].endswith("/python")][-1] == ["-m", "benchmarks.pages"]
    assert importlib.util.find_spec("benchmarks.pages") is not None


def test_list_names_every_case() -> None:
    output = invoke("list").output
    for case in CASES.values():
        assert case.label in output


def test_command_times_stores_and_tells(tmp_path: Path) -> None:
    result = invoke("kernels", "rademacher", "--elements", N, "--rounds", 2, "--dtype", "bfloat16", "--no-plot",
                    "--device", "cpu", "-o", tmp_path)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "axpy, Rademacher, bfloat16" in result.output
    assert "no predicted share: the model is of GPUs" in result.output
    stored = json.loads((tmp_path / "kernels-rademacher-cpu.json").read_text())
    assert (stored["settings"]["rounds"], stored["settings"]["elements"]) == (2, N)
    assert [path.name for path in tmp_path.iterdir()] == ["kernels-rademacher-cpu.json"]


def test_without_a_command_all_kernels_run_with_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kernels, "ELEMENTS", {"cpu": N})
    monkeypatch.setattr(kernels, "ROUNDS", {"cpu": 1})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert invoke().exit_code == 0
    names = {path.name for path in (tmp_path / "bench-out").iterdir()}
    made = {f"kernels-{name}-cpu.{ending}" for name in BENCHMARKS for ending in ("json", "png")}
    assert names == made | {"kernels-roofline-cpu.png"}


@pytest.mark.parametrize(("arguments", "message"), [
    (("nonsense",), "'nonsense' is not one of axpy"),
    (("--dtype", "int8"), "'int8' is not one of float32"),
    (("--elements", 100), "100 is too few"),
    (("--rounds", 0), "0 is too few"),
    (("--time-limit", 0), "more than 0 seconds"),
    (("--device", "tpu"), "'tpu' is not a device"),
    (("--device", "mps"), "zokern has no kernels for mps"),
    (("--device", "cuda:99"), "cuda:99 is not there"),
    (("stochastic", "--dtype", "float32"), "give a 16-bit dtype"),
    (("--output", __file__), "is a file; give a directory"),
])  # fmt: skip
def test_bad_values_are_refused_by_name(arguments: tuple[object, ...], message: str, tmp_path: Path) -> None:
    given = arguments if "--output" in arguments else (*arguments, "--output", tmp_path)
    result = invoke("kernels", *given)
    assert result.exit_code == 2
    text = " ".join(result.output.replace("│", " ").split())
    assert message in text
    option = next((a for a in reversed(arguments) if str(a).startswith("--")), "NAMES")
    assert str(option) in text
    assert list(tmp_path.iterdir()) == []


def test_missing_matplotlib_is_said_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(kernels, "run", lambda *a: pytest.fail("it ran"))
    result = invoke("kernels", "--elements", N, "-o", tmp_path)
    assert result.exit_code == 1
    assert 'pip install "zokern[bench]"' in result.output
    assert list(tmp_path.iterdir()) == []


def test_noise_of_ours_and_of_the_peers_has_one_scale() -> None:
    """A sanity check of the comparison: both perturb by eps z with z of variance 1."""
    z = noise(1 << 14, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = draw(torch.empty(1 << 14))
    assert float(z.std()) == pytest.approx(float(theirs.std()), rel=0.03)
