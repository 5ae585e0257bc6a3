"""The whole-step and the scaling benchmark: peers that do what they say, counts, parts that add up, files, refusals."""

from __future__ import annotations

import gc
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from tests.emulated_graph import ASKS, EmulatedGraph
from tests.models import Quadratic
from zokern import HiZOO, MeZO
from zokern.bench import commands_step, models, options, plots, scaling, split, step_peers, tables
from zokern.bench.budget import Budget, DoesNotFit, peak_bytes
from zokern.bench.step import Run
from zokern.bench.step_cases import Case, Settings, make, needed_bytes
from zokern.graphs import step as graphed
from zokern.journal import recording


@pytest.fixture(autouse=True)
def generators_of_the_suite() -> Iterator[None]:
    """Peers reseed torch's global generators."""
    with torch.random.fork_rng():
        yield


CPU = torch.device("cpu")
EPS, LR = 1e-3, 0.5


def noise_of(model: Quadratic, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.normal(0.0, 1.0, p.shape, generator=generator, dtype=p.dtype) for p in (model.a, model.b)]


def loss_at(model: Quadratic, theta: list[torch.Tensor], direction: list[torch.Tensor], scale: float) -> float:
    other = Quadratic()
    with torch.no_grad():
        for p, t, d in zip((other.a, other.b), theta, direction, strict=True):
            p.copy_(t + scale * d)
        return float(other())


@pytest.mark.parametrize("way", ["published", "foreach"])
def test_mezo_peers_move_weights_as_described(way: str) -> None:
    model = Quadratic()
    theta = [p.detach().clone() for p in (model.a, model.b)]
    peer = step_peers.PEERS["mezo"][way](model, LR, EPS, seed=3)
    for t in range(3):
        z = noise_of(model, 3 + t)
        c = (loss_at(model, theta, z, EPS) - loss_at(model, theta, z, -EPS)) / (2 * EPS)
        theta = [w - LR * 1e-3 * c * d for w, d in zip(theta, z, strict=True)]
        peer.lr = LR * 1e-3
        peer.step(model)
    torch.testing.assert_close([model.a.data, model.b.data], theta, rtol=1e-9, atol=1e-11)
    assert torch.equal(model.frozen, torch.ones(3, dtype=torch.float64))
    assert peer.counters == {"steps": 3, "forwards": 6, "passes": 12}


def test_hizoo_peer_moves_weights_as_described() -> None:
    model, a, lr = Quadratic(), 1e-3, 1e-3
    theta = [p.detach().clone() for p in (model.a, model.b)]
    h = [torch.ones_like(w) for w in theta]
    peer = step_peers.PublishedHiZOO(model, lr, EPS, seed=5, smoothing=a)
    for t in range(3):
        z = noise_of(model, 5 + t)
        probe = [d / s.sqrt() for d, s in zip(z, h, strict=True)]
        here, plus, minus = (loss_at(model, theta, probe, s * EPS) for s in (0, 1, -1))
        kappa = abs(plus + minus - 2 * here) / (2 * EPS**2)
        h = [(1 - a) * s + a * kappa * s * d * d for s, d in zip(h, z, strict=True)]
        c = (plus - minus) / (2 * EPS)
        theta = [w - lr * c * d / s.sqrt() for w, d, s in zip(theta, z, h, strict=True)]
        peer.step(model)
    torch.testing.assert_close([model.a.data, model.b.data], theta, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(peer.h, h, rtol=1e-5, atol=0)
    assert not torch.equal(h[0], torch.ones_like(h[0]))
    assert peer.counters == {"steps": 3, "forwards": 12, "passes": 12}


def test_compiled_peer_restores_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its graph run eagerly: whether it is compiled changes the noise, not the order of work."""
    monkeypatch.setattr(step_peers, "_fused", lambda: step_peers._add_noise)
    model = Quadratic().float()
    before = model.a.detach().clone()
    peer = step_peers.Compiled(model, 0.0, EPS)
    with torch.random.fork_rng(devices=[]):
        peer.step(model)
        torch.testing.assert_close(model.a.data, before, rtol=0, atol=1e-6)
        peer.sweep((2.0, 3.0))  # of the next step, whose seed is 1
        torch.manual_seed(1)
        torch.testing.assert_close(model.a.data, before + 6.0 * torch.randn_like(before), rtol=0, atol=1e-5)
    assert peer.counters["passes"] == 4


@pytest.mark.parametrize(
    "way", ["inplace", "shadow", "stream", "shadow-pipelined", "stream-pipelined", "stream-prefetch"]
)
def test_parts_of_a_step_add_up(way: str) -> None:
    with torch.no_grad():
        model = models.build("tiny-opt", torch.float32, CPU)
        closure = models.closure("tiny-opt", model, 2, 8, CPU)
        optimizer = make(Case("tiny-opt", 2, 8, "mezo", way), model)
        assert optimizer.pipelined == way.endswith("pipelined")
        assert optimizer.prefetch == way.endswith("prefetch")
        seconds = split.measure(optimizer, closure, CPU, steps=3)
    assert seconds["step"] == pytest.approx(sum(seconds[part] for part in split.PARTS), rel=1e-9)
    assert all(seconds[part] > 0 for part in split.PARTS)
    assert not {"run", "chain"} & vars(optimizer._passes).keys()
    passes = 7 if way == "shadow-pipelined" else 9
    assert optimizer.counters["passes"] == passes
    assert split.counted(optimizer, {"steps": 0, "passes": 0, "forwards": 0}) == {
        "passes_per_step": passes / 3,
        "forwards_per_step": 2,
    }


def test_a_chain_counts_as_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that moves by 1 at each look: two perturbations, the first of nothing from the second step on, and the
    chain that updates."""
    looks = iter(range(10**6))
    monkeypatch.setattr("zokern.finetune.clock.time.perf_counter", lambda: float(next(looks)))
    with torch.no_grad():
        model = models.build("tiny-opt", torch.float32, CPU)
        closure = models.closure("tiny-opt", model, 2, 8, CPU)
        optimizer = make(Case("tiny-opt", 2, 8, "mezo", "shadow-pipelined"), model)
        assert [split.measure(optimizer, closure, CPU, steps=1)["passes"] for _ in range(3)] == [3, 3, 3]


def test_pipelined_ways_are_timed_beside_the_others(tmp_path: Path) -> None:
    results = Run(
        settings(
            models=("tiny-opt",),
            methods=("mezo",),
            peers=False,
            placements=("stream-pipelined", "stream-prefetch", "shadow"),
        ),
        tmp_path / "s",
    ).run()
    rows = {name: (r["status"], r.get("placement")) for name, r in results.items()}
    assert rows == {
        "tiny-opt 2x8 mezo stream-pipelined": ("timed", "stream"),
        "tiny-opt 2x8 mezo stream-prefetch": ("timed", "stream"),
        "tiny-opt 2x8 mezo shadow": ("timed", None),
    }


def test_low_rank_directions_in_the_forward_are_timed_where_a_method_takes_them(tmp_path: Path) -> None:
    wanted = settings(
        models=("tiny-opt",), methods=("mezo", "hizoo"), placements=("inplace", "forward"), peers=False, rounds=1
    )
    run = Run(wanted, tmp_path / "step.json")
    results = run.run()
    assert set(results) == {"tiny-opt 2x8 mezo inplace", "tiny-opt 2x8 mezo forward", "tiny-opt 2x8 hizoo inplace"}
    low = results["tiny-opt 2x8 mezo forward"]
    assert (low["status"], low["forwards_per_step"]) == ("timed", 2)
    assert low["passes_per_step"] == 1  # no probe goes over the weights
    assert "full rank" in run.not_timed["hizoo forward"]
    model = models.build("tiny-opt", torch.float32, CPU)
    case = Case("tiny-opt", 2, 8, "mezo", "forward")
    opt = make(case, model)
    opt.step(models.closure("tiny-opt", model, 2, 8, CPU))
    assert sum(t.nbytes for t in opt._placement.memory()) == needed_bytes(case, model)


def test_folds_and_probes_in_one_forward_are_rows_too(tmp_path: Path) -> None:
    ways = ("forward-folds", "forward-batched")
    wanted = settings(models=("tiny-opt",), methods=("mezo", "fzoo", "hizoo"), placements=ways, peers=False, rounds=1)
    run = Run(wanted, tmp_path / "step.json")
    results = run.run()
    names = {f"tiny-opt 2x8 {method} {way}" for method in ("mezo", "fzoo") for way in ways}
    assert set(results) == names
    assert {"hizoo forward-folds", "hizoo forward-batched"} <= set(run.not_timed)
    for name, result in results.items():
        folds = name.endswith("folds")
        assert result["status"] == "timed"
        assert result["placement"] == "forward"
        assert result["passes_per_step"] == (1 / 8 if folds else 1)
        assert result["forwards_per_step"] == (1 if not folds else 9 if "fzoo" in name else 2)
        assert result["forwards"] > 0


def test_passes_inside_the_closure_are_not_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that moves by 1 at each look: stream's passes of blocks lie between looks of the closure."""
    looks = iter(range(10**6))
    monkeypatch.setattr("zokern.finetune.clock.time.perf_counter", lambda: float(next(looks)))
    with torch.no_grad():
        model = models.build("tiny-opt", torch.float32, CPU)
        closure = models.closure("tiny-opt", model, 2, 8, CPU)
        seconds = split.measure(MeZO(model, 1e-7, placement="stream"), closure, CPU, steps=1)
    # A forward perturbs what lies outside the blocks before the closure, and two blocks inside; then the update: each
    # takes 1. A closure with two of them takes 5, of which 2 are theirs.
    assert seconds["passes"] == 2 * (1 + 2) + 1
    assert seconds["forwards"] == 2 * (5 - 2)


def test_summary_is_of_one_round() -> None:
    rounds = [dict(zip(("step", *split.PARTS), (x, x - 3.0, 2.0, 1.0), strict=True)) for x in (9.0, 7.0, 8.0, 6.0)]
    told = split.summary(rounds)
    assert told["step"] == {"median": 7.0, "min": 6.0, "max": 9.0, "rounds": 4}
    assert [told[part] for part in split.PARTS] == [4.0, 2.0, 1.0]


def test_peak_bytes_counts_what_lives_at_once() -> None:
    held = []

    def call() -> None:
        a = torch.empty(1000)
        held.append(torch.empty(500))
        del a
        torch.empty(900)

    assert peak_bytes(call, CPU) == 4 * 1500
    w = nn.Parameter(torch.ones(1000))

    def replace() -> None:
        for _ in range(3):
            w.data = torch.neg(w.data)

    assert peak_bytes(replace, CPU, [w]) == 4 * 1000
    assert torch.equal(w.data, torch.full((1000,), -1.0))


def settings(**changes: Any) -> Settings:
    values: dict[str, Any] = {
        "models": ("tiny-opt", "tiny-encoder"),
        "methods": ("mezo", "hizoo"),
        "placements": ("auto", "stream"),
        "tokens": ((2, 8),),
        "dtype": "float32",
        "device": "cpu",
        "rounds": 2,
        "steps": 1,
    }
    return Settings(**{**values, **changes})


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.mark.parametrize("others", [0, 7])
def test_only_what_a_run_froze_is_unfrozen(others: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller who froze what is there, as servers do and this suite, would pay for it at each collection from then on."""
    done: list[str] = []
    monkeypatch.setattr(gc, "get_freeze_count", lambda: others)
    for name in ("freeze", "unfreeze"):
        monkeypatch.setattr(gc, name, lambda name=name: done.append(name))
    monkeypatch.setattr(Run, "_all", lambda run: done.append("run"))
    Run(settings(), tmp_path / "step.json").run()
    assert done == ["freeze", "run", "unfreeze"][: 2 if others else 3]


def test_record_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    Run(settings(), path).run()
    record = load(path)
    assert [p.name for p in tmp_path.iterdir()] == ["step.json"]
    assert record["settings"]["left_out"] == []
    results = record["results"]
    ways = ["mezo published", "mezo foreach", "hizoo published"]
    ways += [f"{m} {p}" for m in ("mezo", "hizoo") for p in ("inplace", "stream")]
    assert list(results) == [f"{model} 2x8 {way}" for model in ("tiny-opt", "tiny-encoder") for way in ways]
    weights = 4 * models.parameters("tiny-opt")
    for result in results.values():
        assert result["status"] == "timed"
        assert result["step"]["rounds"] == len(result["each"]) == 2
        assert result["step"]["min"] <= result["step"]["median"] <= result["step"]["max"]
        assert result["step"]["median"] == pytest.approx(sum(result[part] for part in split.PARTS))
        assert result["extra_share"] == result["extra_bytes"] / result["weights_bytes"]
    counts = {name: (r["forwards_per_step"], r["passes_per_step"]) for name, r in results.items()}
    assert counts["tiny-opt 2x8 mezo published"] == counts["tiny-opt 2x8 mezo foreach"] == (2, 4)
    assert counts["tiny-opt 2x8 mezo inplace"] == counts["tiny-opt 2x8 mezo stream"] == (2, 3)
    assert counts["tiny-opt 2x8 hizoo published"] == (4, 4)
    assert counts["tiny-opt 2x8 hizoo stream"] == (3, 3)
    assert results["tiny-opt 2x8 hizoo inplace"]["state_bytes"] == weights
    assert weights <= results["tiny-opt 2x8 hizoo inplace"]["extra_bytes"] < 1.1 * weights
    assert results["tiny-opt 2x8 mezo inplace"]["extra_bytes"] < 1000
    assert 0 < results["tiny-opt 2x8 mezo stream"]["extra_bytes"] < weights
    rows = tables.step_rows(results)
    assert {len(row) for row in rows} == {len(tables.STEP_COLUMNS)}
    assert rows[0][-1] == ""
    assert float(rows[1][-1]) > 0


def test_time_limit_leaves_a_valid_file_that_says_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    Run(settings(time_limit=0.0), path).run()
    record = load(path)
    assert {result["status"] for result in record["results"].values()} == {"left out"}
    assert len(record["settings"]["left_out"]) == len(record["results"]) == 14
    notes = tables.step_notes(record["results"])
    assert notes[0] == "tiny-opt 2x8 mezo published: left out: the time was up"
    assert len(notes) == 14
    assert tables.step_rows(record["results"]) == []


def test_time_limit_in_mid_run_keeps_the_rounds_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(
        settings(models=("tiny-opt",), methods=("mezo",), placements=("inplace",), time_limit=1e9), tmp_path / "s"
    )
    visits: list[str] = []
    now = run.budget.begun
    monkeypatch.setattr("zokern.bench.budget.time.monotonic", lambda: now + (2e9 if len(visits) >= 5 else 0))
    run.tick = visits.append
    run.run()
    record = load(tmp_path / "s")  # three cases: a round to weigh them, one timed round of two
    assert [r["status"] for r in record["results"].values()] == ["timed", "timed", "left out"]
    assert record["settings"]["left_out"] == ["tiny-opt 2x8 mezo inplace"]
    assert record["results"]["tiny-opt 2x8 mezo published"]["step"]["rounds"] == 1


def test_what_does_not_fit_is_recorded(tmp_path: Path) -> None:
    weights = 4 * models.parameters("tiny-opt")
    Run(settings(models=("tiny-opt",), memory_limit=weights - 1), tmp_path / "model").run()
    for result in load(tmp_path / "model")["results"].values():
        assert (result["status"], result["needed_bytes"], result["free_bytes"]) == (
            "does not fit",
            weights,
            weights - 1,
        )
    Run(settings(models=("tiny-opt",), memory_limit=2 * weights, rounds=1), tmp_path / "cases").run()
    results = load(tmp_path / "cases")["results"]
    assert results["tiny-opt 2x8 mezo inplace"]["status"] == "timed"
    assert results["tiny-opt 2x8 hizoo stream"]["status"] == "does not fit"
    assert results["tiny-opt 2x8 hizoo stream"]["needed_bytes"] > 2 * weights
    needs, has = re.findall(r"(0\.\d+) GB", tables.step_notes(results)[-1])
    assert float(needs) > float(has) > 0
    assert len(tables.step_rows(results)) + len(tables.step_notes(results)) == len(results)


@pytest.mark.parametrize("runs_out", ["before", "in the first step", "in the second"])
def test_a_smaller_curvature_is_timed_where_float32_does_not_fit(
    runs_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its place and by its own name; the case that did not fit says what it needs."""
    count = models.parameters("tiny-opt")
    wanted = {"models": ("tiny-opt",), "placements": ("inplace",), "peers": False, "dtype": "bfloat16"}
    results = Run(settings(**wanted), tmp_path / "all").run()
    assert list(results) == ["tiny-opt 2x8 mezo inplace", "tiny-opt 2x8 hizoo inplace"]
    assert "curvature_dtype" not in results["tiny-opt 2x8 hizoo inplace"]
    forward = results["tiny-opt 2x8 mezo inplace"]["forward_bytes"]
    if runs_out == "before":
        wanted["memory_limit"] = forward + 4 * count - 1
    else:
        rounds, steps = HiZOO.rounds, []

        def exhausted(self: HiZOO) -> Any:
            steps.append(self)
            if self.state_spec["h"][0] == torch.float32 and len(steps) >= (1 if "first" in runs_out else 2):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return rounds(self)

        monkeypatch.setattr(HiZOO, "rounds", exhausted)
    results = Run(settings(**wanted), tmp_path / "s").run()
    assert list(results) == [
        "tiny-opt 2x8 mezo inplace", "tiny-opt 2x8 hizoo inplace", "tiny-opt 2x8 hizoo inplace, h bfloat16"
    ]  # fmt: skip
    mezo, whole, half = results.values()
    known = "needed_bytes" if runs_out == "before" else "computed_bytes"  # which, once tried, is not the whole need
    assert (whole["status"], whole[known]) == ("does not fit", forward + 4 * count)
    assert ("needed_bytes" in whole) == (known == "needed_bytes")
    assert (half["status"], half["curvature_dtype"], half["method"]) == ("timed", "bfloat16", "hizoo")
    assert half["state_bytes"] == 2 * count
    assert mezo["step"]["rounds"] == 2
    assert half["step"]["rounds"] == (1 if runs_out == "in the second" else 2)
    assert half["forward_bytes"] == forward
    assert load(tmp_path / "s")["results"] == results
    wanted["memory_limit"] = forward + 2 * count - 1
    statuses = [r["status"] for r in Run(settings(**wanted), tmp_path / "none").run().values()]
    assert statuses == ["timed", "does not fit", "does not fit"]


def test_nothing_smaller_than_what_has_no_curvature(tmp_path: Path) -> None:
    """MeZOGV takes a curvature's type and by default has none: there is nothing to make smaller."""
    wanted = {"models": ("tiny-opt",), "placements": ("shadow",), "methods": ("mezo", "mezo-gv"), "peers": False}
    weights = 4 * models.parameters("tiny-opt")
    results = Run(settings(**wanted, memory_limit=weights + 1), tmp_path / "s").run()
    assert [(name.split()[-2], r["status"]) for name, r in results.items()] == [
        ("mezo", "does not fit"), ("mezo-gv", "does not fit")
    ]  # fmt: skip


def test_memory_that_runs_out_in_mid_step_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(self: MeZO) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(MeZO, "rounds", exhausted)
    results = Run(settings(models=("tiny-opt",), placements=("shadow",)), tmp_path / "s").run()
    tried = results["tiny-opt 2x8 mezo shadow"]
    assert tried["status"] == "does not fit"
    assert 4 * models.parameters("tiny-opt") < tried["computed_bytes"] < tried["free_bytes"]
    assert results["tiny-opt 2x8 hizoo shadow"]["status"] == "timed"


def test_a_forward_without_memory_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(self: Run, closure: Any) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Run, "_forward", exhausted)
    results = Run(settings(models=("tiny-opt",)), tmp_path / "s").run()
    assert {r["status"] for r in results.values()} == {"does not fit"}
    logits = models.logits_bytes("tiny-opt", 2, 8, 4)
    assert {r["computed_bytes"] for r in results.values()} == {logits}


@pytest.mark.parametrize("tried", [False, True])
@pytest.mark.parametrize("free", [99, 100, 101])
def test_a_need_is_told_only_where_it_is_more_than_what_is_free(
    free: int, tried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free memory that grows while one looks at it; a case that runs out of memory although what was computed was free."""
    looks = itertools.chain([free], itertools.repeat(10**6))
    monkeypatch.setattr("zokern.bench.budget.free_bytes", lambda device: next(looks))
    budget, facts = Budget(CPU), None

    def call() -> int:
        if tried:
            raise torch.OutOfMemoryError("CUDA out of memory")
        budget.require(100)
        return 7

    try:
        assert (budget.attempt(call, 100) if tried else call()) == 7
    except DoesNotFit as error:
        facts = error.facts
    assert (facts is None) == (not tried and free >= 100)
    if facts is not None:
        (told,) = tables.step_notes({"case": {k: 10**9 * v if k.endswith("bytes") else v for k, v in facts.items()}})
        if tried:
            assert facts == {"status": "does not fit", "computed_bytes": 100, "free_bytes": free}
            assert told == (
                f"case: does not fit: tried, and needs more than the {free}.0 GB that were free: its tensors take 100.0 GB"
            )
        else:
            assert facts["needed_bytes"] > facts["free_bytes"] == 99
            assert told == "case: does not fit: needs 100.0 GB, 99.0 GB free"


def test_on_a_gpu_what_the_allocator_held_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond what it held before; the figures are those of an H100 whose memory was in pieces."""
    monkeypatch.setattr("zokern.bench.budget.free_bytes", lambda device: 58_336_000_000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 25_830_000_000)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 84_151_000_000)

    def call() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(DoesNotFit) as caught:
        Budget(torch.device("cuda", 0)).attempt(call, 54_681_000_000)
    assert caught.value.facts["held_bytes"] == 58_321_000_000
    assert caught.value.__context__ is None  # which would keep the frames of the call, and their memory


def test_older_files_do_not_contradict_themselves() -> None:
    """Before, what was computed of a case that was tried was stored as what it needs."""
    older = {"status": "does not fit", "needed_bytes": 54_681_169_408, "free_bytes": 58_341_301_760}
    assert tables.step_notes({"case": older}) == [
        "case: does not fit: tried, and needs more than the 58.3 GB that were free: its tensors take 54.7 GB"
    ]
    by_a_byte = {"status": "does not fit", "needed_bytes": 54_681_169_408, "free_bytes": 54_681_169_407}
    told = "case: does not fit: needs 54.681169408 GB, 54.681169407 GB free"
    assert tables.step_notes({"case": by_a_byte}) == [told]
    held = {"status": "does not fit", "computed_bytes": 5e9, "free_bytes": 4e9, "held_bytes": 3.9e9}
    assert tables.step_notes({"case": held}) == [
        "case: does not fit: tried, and needs more than the 4.0 GB that were free: its tensors take 5.0 GB, and torch held "
        "3.9 GB when it got no more"
    ]


def test_skipped_updates_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "closure", lambda *args: lambda: torch.tensor(float("nan")))
    with pytest.raises((RuntimeError, Warning), match="not finite"):
        Run(settings(peers=False, placements=("inplace",)), tmp_path / "s").run()


def test_needs_are_those_of_the_documents() -> None:
    model = models.build("tiny-opt", torch.bfloat16, CPU)
    count = models.parameters("tiny-opt")
    assert needed_bytes(Case("tiny-opt", 1, 1, "mezo", "inplace"), model) == 0
    assert needed_bytes(Case("tiny-opt", 1, 1, "helene", "inplace"), model) == 8 * count
    assert needed_bytes(Case("tiny-opt", 1, 1, "hizoo", "shadow"), model) == (4 + 2) * count
    assert needed_bytes(Case("tiny-opt", 1, 1, "mezo", "foreach"), model) == 2 * count
    assert make(Case("tiny-opt", 1, 1, "lezo", "shadow"), model).layers.num_dropped == 1


@pytest.mark.parametrize(("name", "millions"), [
    ("demo", 22.565376), ("opt-125m", 125.239296), ("opt-1.3b", 1315.758080), ("opt-13b", 12853.473280),
    ("qwen-0.6b", 596.049920), ("qwen-8b", 8190.735360),
])  # fmt: skip
def test_shapes_are_those_of_the_models(name: str, millions: float) -> None:
    """Numbers of parameters of the published checkpoints; of the demo, those that `zokern finetune` trains."""
    assert models.parameters(name) / 1e6 == pytest.approx(millions, abs=1e-6)


def test_models_leave_torch_as_it_was() -> None:
    state = torch.random.get_rng_state()
    first, second = (models.build("tiny-qwen", torch.bfloat16, CPU) for _ in range(2))
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {p.dtype for p in first.parameters()} == {torch.bfloat16}
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


class Reads(TorchDispatchMode):
    """Notes what makes the host wait for values."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        if name in ASKS:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def looked_at(work: models.Work, monkeypatch: pytest.MonkeyPatch, capturing: bool) -> tuple[Any, list[Any], list[str]]:
    """A forward as if a stream were capturing, or not: the loss, each call of SDPA, and what the host read."""
    from transformers.utils import import_utils

    real, calls = nn.functional.scaled_dot_product_attention, []

    def spy(*args: Any, **options: Any) -> Any:
        mask = options.get("attn_mask")
        calls.append(options | {"attn_mask": None if mask is None else (mask.dtype, tuple(mask.shape))})
        return real(*args, **options)

    with monkeypatch.context() as patch, torch.no_grad(), Reads() as reads:
        patch.setattr(import_utils, "is_cuda_stream_capturing", lambda: capturing)
        patch.setattr(nn.functional, "scaled_dot_product_attention", spy)
        return work(), calls, reads.seen


@pytest.mark.parametrize("name", ["tiny-opt", "tiny-qwen", "tiny-encoder"])
def test_a_forward_is_the_same_work_in_a_graph_and_waits_for_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers by itself does otherwise: that is looked at too, so that this test can fail."""
    if models.attention() != models.UNMASKED:
        pytest.skip("transformers before 5 chooses by itself")
    model = models.build(name, torch.float32, CPU)
    work = models.closure(name, model, 2, 8, CPU)
    loss, calls, read = looked_at(work, monkeypatch, capturing=False)
    captured, calls_captured, read_captured = looked_at(work, monkeypatch, capturing=True)
    assert len(calls) == 2  # layers
    assert calls == calls_captured
    assert {call["attn_mask"] for call in calls} == {None}
    assert {call["is_causal"] for call in calls} == {name != "tiny-encoder"}
    assert read == read_captured == []
    assert torch.equal(loss, captured)
    model.set_attn_implementation("sdpa")
    plain, calls, read = looked_at(work, monkeypatch, capturing=False)
    assert torch.equal(loss, plain)
    if name == "tiny-qwen":
        assert read
        assert calls != looked_at(work, monkeypatch, capturing=True)[1]


def test_records_say_which_attention(tmp_path: Path) -> None:
    Run(settings(models=("tiny-opt",), time_limit=0.0), tmp_path / "s").run()
    assert load(tmp_path / "s")["settings"]["attention"] == models.attention()
    assert "without-mask" in models.attention() or "chooses" in models.attention()


def test_scaling(tmp_path: Path) -> None:
    wanted = scaling.Settings(
        (100_000, 400_000), ("float32", "bfloat16"), ("mezo", "hizoo"), ("auto",), device="cpu", rounds=2
    )
    scaling.Run(wanted, tmp_path / "s").run()
    rows = load(tmp_path / "s")["results"]
    assert len(rows) == 8
    for row in rows:
        size = {"float32": 4, "bfloat16": 2}[row["dtype"]]
        assert row["placement"] == {"float32": "inplace", "bfloat16": "stream"}[row["dtype"]]
        assert row["passes_per_step"] == 3
        assert row["weights_bytes"] == size * row["parameters"]
        assert row["state_bytes"] == (4 * row["parameters"] if row["method"] == "hizoo" else 0)
        assert row["extra_bytes"] >= row["state_bytes"]
        assert row["ns_per_parameter"]["rounds"] == len(row["each"]) == 2
    assert {len(row) for row in tables.scaling_rows(rows)} == {len(tables.SCALING_COLUMNS)}


def test_sizes_of_scaling_are_met() -> None:
    for size in (10**7, 10**8, 10**9):
        model = scaling.build(size, torch.float32, torch.device("meta"))
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(size, rel=0.1)


def test_scaling_records_what_it_leaves_out(tmp_path: Path) -> None:
    wanted = scaling.Settings(
        (100_000, 10**6), ("float32",), ("mezo",), ("auto",), device="cpu", rounds=1, memory_limit=10**6
    )
    rows = scaling.Run(wanted, tmp_path / "s").run()
    assert sorted(row["status"] for row in rows) == ["does not fit", "timed"]
    assert len(tables.scaling_notes(rows)) == len(tables.scaling_rows(rows)) == 1
    wanted = scaling.Settings((100_000,), ("float32",), ("mezo",), ("auto",), device="cpu", time_limit=0.0)
    scaling.Run(wanted, tmp_path / "s").run()
    assert [row["status"] for row in load(tmp_path / "s")["results"]] == ["left out"]


app = typer.Typer()
app.command()(commands_step.step)
app.command()(commands_step.scaling)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("step --model opt-2b", "--model: 'opt-2b' is not known"),
        ("step --methods mezzo", "--methods: 'mezzo' is not known"),
        ("step --placements inplace,up", "--placements: 'up' is not known"),
        ("step --tokens 16", "--tokens: '16' is not rows x length"),
        ("step --tokens 0x8", "--tokens: '0x8' is not rows x length"),
        ("step --model demo --tokens 8x1024", "--tokens: rows of demo have at most 512"),
        ("step --dtype float64", "--dtype: 'float64' is not known"),
        ("step --dtype float32,bfloat16", "--dtype: one is needed"),
        ("step --device tpu", "--device: 'tpu' is not a device"),
        ("step --device cuda:99", "--device: cuda:99 is not there"),
        ("step --rounds 0", "--rounds: is 0; allowed: at least 1"),
        ("step --steps 0", "--steps: is 0"),
        ("step --time-limit -1", "--time-limit: is -1.0"),
        ("step --memory-limit 0", "--memory-limit: is 0.0"),
        ("step --output no/such/x.json", "--output: there is no directory no/such"),
        ("scaling --sizes 3", "--sizes: '3' is not a number"),
        ("scaling --sizes 10M,many", "--sizes: 'many' is not a number"),
        ("scaling --dtypes int8", "--dtypes: 'int8' is not known"),
    ],
)
def test_bad_values_are_refused_by_name(command: str, message: str) -> None:
    done = CliRunner().invoke(app, command.split(), env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert f"Invalid value for {message}" in done.output


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = "step --model tiny-opt --tokens 2x8 --quick --device cpu"
    done = CliRunner().invoke(app, command.split(" "), env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "tiny-opt 2x8 mezo inplace" in done.output
    assert len(load(tmp_path / "step-cpu.json")["results"]) == 3
    done = CliRunner().invoke(app, ["scaling", "--sizes", "100k", "--quick", "--device", "cpu", "--output", "s.json"])
    assert done.exit_code == 0, done.output
    assert len(load(tmp_path / "s.json")["results"]) == 2


# ------------------------------------------------------------------------------------------------------- whole graphs


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed, "SUPPORTED", ("cuda", "cpu"))
    monkeypatch.setattr(graphed, "new_graph", EmulatedGraph)


def test_graphed_steps_are_timed_where_graphs_are(tmp_path: Path, emulated: None) -> None:
    """With the emulated graph of tests/graphs/test_graphed.py: the way, its counts, its one figure, and who cannot."""
    path = tmp_path / "step.json"
    wanted = settings(models=("tiny-opt",), methods=("mezo", "lezo"), placements=("inplace",), peers=False, rounds=1)
    Run(wanted, path).run()
    record = load(path)
    assert list(record["results"]) == [
        f"tiny-opt 2x8 {method} {way}" for method in ("mezo", "lezo") for way in ("inplace", "graphed")
    ]
    assert record["settings"]["not_timed"] == {}
    eager, graph, *_ = record["results"].values()
    assert (graph["status"], graph["placement"], graph["peer"]) == ("timed", "inplace", False)
    for count in ("passes_per_step", "forwards_per_step"):
        assert graph[count] == eager[count]
    assert graph["step"]["median"] > 0
    assert not set(split.PARTS) & graph.keys()
    row = tables.step_rows(record["results"])[1]
    assert len(row) == len(tables.STEP_COLUMNS)
    assert row[2:6] == [""] * 4
    pytest.importorskip("matplotlib")
    (drawn,) = plots.draw([path], tmp_path)
    assert drawn.stat().st_size > 5_000


def test_journalled_steps_are_timed(tmp_path: Path, emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each visit writes a journal of its own, which is whole and gone when the optimizer is let go."""
    path, ended = tmp_path / "step.json", []
    leave = recording._mark
    monkeypatch.setattr(recording, "_mark", lambda *args: (leave(*args), ended.append(args[0].counters["steps"]))[0])
    wanted = settings(
        models=("tiny-opt",), methods=("mezo",), placements=("inplace", "inplace-journal"), peers=False, rounds=1
    )
    Run(wanted, path).run()
    found = load(path)["results"]
    assert list(found) == [
        f"tiny-opt 2x8 mezo {way}" for way in ("inplace", "inplace-journal", "graphed", "graphed-journal")
    ]
    for way in ("inplace", "graphed"):
        plain, written = found[f"tiny-opt 2x8 mezo {way}"], found[f"tiny-opt 2x8 mezo {way}-journal"]
        assert plain["passes_per_step"] == written["passes_per_step"]
        assert written["step"]["median"] > 0
        assert ("passes" in plain) == ("passes" in written)
    gc.collect()
    assert len(ended) == 4
    assert min(ended) >= 1


def test_nothing_is_captured_while_the_clock_runs(
    tmp_path: Path, emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HELENE's steps are of two kinds, and each is captured when it first comes."""
    captured: list[tuple[int, int]] = []
    measure = split.measure

    def watched(stepper: Any, *arguments: Any) -> dict[str, float]:
        before = len(stepper._graph._graphs.kept) if hasattr(stepper, "_graph") else 0
        seconds = measure(stepper, *arguments)
        captured.append((before, len(stepper._graph._graphs.kept) if before else 0))
        return seconds

    monkeypatch.setattr(split, "measure", watched)
    wanted = settings(
        models=("tiny-opt",), methods=("helene",), placements=("inplace",), peers=False, rounds=1, steps=2
    )
    Run(wanted, tmp_path / "s").run()
    assert captured == [(0, 0), (2, 2)]


def test_graphed_steps_are_steps(emulated: None) -> None:
    """Weights move as in eager steps, and a batch is read anew."""
    with torch.no_grad():
        weights = []
        for way in ("inplace", "graphed"):
            model = models.build("tiny-encoder", torch.float32, CPU)
            work = models.closure("tiny-encoder", model, 2, 8, CPU)
            stepper = make(Case("tiny-encoder", 2, 8, "hizoo", way, "inplace" if way == "graphed" else ""), model)
            losses = []
            for rows in (work.batch["ids"], work.batch["ids"].flip(0)):
                work.batch["ids"] = rows
                losses.append(stepper.step(work))
            assert losses[0] != losses[1]
            weights.append([p.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    with pytest.raises(TypeError, match=r"closure must be a zokern.bench.models.Work, got function"):
        stepper.step(lambda: torch.zeros(()))


@pytest.mark.parametrize("error", ["capture", "memory"])
def test_a_step_that_cannot_be_captured_is_said_to_be(
    error: str, tmp_path: Path, emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture(self: EmulatedGraph, work: Any) -> None:
        raise torch.OutOfMemoryError("full") if error == "memory" else RuntimeError("a stream was waited for")

    monkeypatch.setattr(EmulatedGraph, "capture", capture)
    wanted = settings(models=("tiny-opt",), methods=("mezo",), placements=("inplace",), peers=False, rounds=1)
    results = Run(wanted, tmp_path / "s").run()
    assert results["tiny-opt 2x8 mezo inplace"]["status"] == "timed"
    (note,) = tables.step_notes(results)
    assert results["tiny-opt 2x8 mezo graphed"]["status"] == ("does not fit" if error == "memory" else "not captured")
    assert ("needs more than" if error == "memory" else "a stream was waited for") in note


def test_without_cuda_the_graph_is_left_out_and_said_to_be(tmp_path: Path) -> None:
    run = Run(settings(models=("tiny-opt",), methods=("mezo", "hizoo"), peers=False, rounds=1), tmp_path / "s")
    run.run()
    assert run.not_timed == {"graphed": "it replays a CUDA graph, and this run is on a CPU"}
    assert load(tmp_path / "s")["settings"]["not_timed"] == run.not_timed
    notes = tables.step_notes(run.results, run.not_timed)
    assert notes == ["graphed: not timed: it replays a CUDA graph, and this run is on a CPU"]
    assert run.visits == 4 * 2


def test_a_run_that_goes_on_is_not_complete(tmp_path: Path) -> None:
    budget = Budget(CPU)
    budget.save("step", {}, {"a": 1}, tmp_path / "s")
    assert load(tmp_path / "s")["complete"] is False
    budget.save("step", {}, {"a": 2}, tmp_path / "s")  # too soon after the one before
    assert load(tmp_path / "s")["results"] == {"a": 1}
    budget.save("step", {}, {"a": 3}, tmp_path / "s", last=True)
    assert (load(tmp_path / "s")["complete"], load(tmp_path / "s")["results"]) == (True, {"a": 3})


def test_output_may_be_a_directory(tmp_path: Path) -> None:
    assert options.output_path(tmp_path, "step", CPU) == tmp_path / "step-cpu.json"
    assert options.output_path(tmp_path / "x.json", "step", CPU) == tmp_path / "x.json"
    assert options.output_path(None, "scaling", CPU) == Path("scaling-cpu.json")
