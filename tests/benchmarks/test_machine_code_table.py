"""The stored machine code and what is predicted from it; slowly, the other architectures.

`make test-slow` compiles for every architecture, which takes minutes: `pytest -m slow_machine_code`.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import pages, parts
from benchmarks.machine_code import amd_page, page, rows
from zokern.bench import model
from zokern.bench.record import RESULTS
from zokern.contract.rules import RULES

ROOT = Path(__file__).resolve().parents[2]
STORED = json.loads(rows.STORED.read_text())
ROWS: list[dict[str, Any]] = STORED["kernels"]


def row(rule: str = "axpy", arch: int | str = 90, backend: str = "cuda", **more: Any) -> dict[str, Any]:
    """The stored row of a kernel; by default CUDA's for one seed, bfloat16, normals, nearest."""
    wanted = {"backend": backend, "rule": rule, "arch": arch, "dtype": "bfloat16", "state": "float32",
              "kernel": "pass", "distribution": "normal", "rounding": "nearest",
              "seeds": "one" if backend == "cuda" else "any"} | more  # fmt: skip
    (found,) = [r for r in ROWS if all(r[key] == value for key, value in wanted.items())]
    return found


# ------------------------------------------------------------------------------------------------------------ the rows


@pytest.mark.parametrize("arch", [*rows.ARCHS, *rows.AMD])
def test_every_kernel_is_stored_for_every_architecture(arch: int | str) -> None:
    mine = [r for r in ROWS if r["arch"] == arch]
    triton = {r["name"] for r in mine if r["backend"] == "triton"}
    assert {r["rule"] for r in mine if r["backend"] == "triton"} == set(RULES)
    assert triton == {r["name"] for r in ROWS if r["arch"] == 90 and r["backend"] == "triton"}
    if arch not in rows.AMD:
        cuda = {r["name"] for r in mine if r["backend"] == "cuda"}
        assert cuda == {r["name"] for r in ROWS if r["arch"] == 90 and r["backend"] == "cuda"}
        assert {r["rule"] for r in mine if r["backend"] == "cuda"} == set(RULES)
    for r in mine:
        assert 5 < r["slots"] == pytest.approx(sum(r["pipes"].values()), abs=1e-3)
        assert r["vector_bytes"] == 16
        assert r["spills"] == 0
        assert (r["slots_per_extra_seed"] is None) == (r["seeds"] == "one")
        assert ("slots_per_extra_rank" in r) == (r["distribution"] == "low_rank")
        assert ("scalar_registers" in r) == ("scalar_spills" in r) == (arch in rows.AMD)


def test_names_are_understood() -> None:
    name = ("zk::cuda::rule_kernel<__half, __nv_bfloat16, zk::gpu::HiZOO<true>, (zk::Distribution)2, (zk::Rounding)1, "
            "(zk::cuda::Seeds)1>")  # fmt: skip
    assert rows.kind(name) == {
        "backend": "cuda", "kernel": "pass", "name": name, "rule": "hizoo_restore", "dtype": "float16",
        "state": "bfloat16", "distribution": "any", "rounding": "stochastic", "seeds": "any",
    }  # fmt: skip
    name = "zk::cuda::chain_kernel<__nv_bfloat16, float, zk::gpu::HiZOO<false>>"
    assert rows.kind(name) == {
        "backend": "cuda", "kernel": "chain", "name": name, "rule": "hizoo", "dtype": "bfloat16", "state": "float32",
        "distribution": "any", "rounding": "any", "seeds": "any",
    }  # fmt: skip
    name = "zk::cuda::low_rank_chain_kernel<__half, float, zk::gpu::Adam>"
    assert rows.kind(name) == {
        "backend": "cuda", "kernel": "chain", "name": name, "rule": "adam", "dtype": "float16", "state": "float32",
        "distribution": "low_rank", "rounding": "any", "seeds": "any",
    }  # fmt: skip
    name = "zk::cuda::low_rank_kernel<float, __nv_bfloat16, zk::gpu::ScaledAxpy, (zk::Rounding)2>"
    assert rows.kind(name) == {
        "backend": "cuda", "kernel": "pass", "name": name, "rule": "scaled_axpy", "dtype": "float32",
        "state": "bfloat16", "distribution": "low_rank", "rounding": "any", "seeds": "any",
    }  # fmt: skip
    name = "triton helene<bf16, low_rank, nearest>"
    assert rows.kind(name) == {
        "backend": "triton", "kernel": "pass", "name": name, "rule": "helene", "dtype": "bfloat16", "state": "float32",
        "distribution": "low_rank", "rounding": "nearest", "seeds": "any",
    }  # fmt: skip
    with pytest.raises(ValueError, match="no name of a kernel"):
        rows.kind("vector_add")
    assert {rows.kind(r["name"])["rule"] for r in ROWS} == set(RULES)


def test_measured_shares_are_read_where_there_are_any(tmp_path: Path) -> None:
    assert page.measured(row(), tmp_path) == "not yet run"
    case = {"rule": "axpy", "dtype": "bfloat16", "distribution": "normal", "rounding": "nearest", "state_dtype": "float32",
            "seeds": 1, "stages": 1, "left_out": 0.0}  # fmt: skip
    ways = {"zokern cuda": {"share_of_copy": 0.5}, "zokern triton": {"share_of_copy": 0.25}}
    cases = [case, case, *(case | other for other in ({"seeds": 4}, {"stages": 8}, {"dtype": "float32"}))]
    run = {"machine": {"gpu": "a GPU"}, "results": {str(i): {"case": c, "ways": ways} for i, c in enumerate(cases)}}
    (tmp_path / "kernels-axpy-cuda.json").write_text(json.dumps(run))
    assert page.measured(row(), tmp_path) == "50%"
    assert page.measured(row(backend="triton"), tmp_path) == "25%"
    assert page.measured(row("hizoo"), tmp_path) == "not yet run"


# ----------------------------------------------------------------------------------------------------------- the model


def test_model_by_hand() -> None:
    """Issue-bound on sm_90: 26 instructions, 14 of them FP32, in four slots of five; on sm_80 FP32 and products share 64
    lanes."""
    pipes = {"fp32": 14.0, "imad": 1.0, "imad.wide": 2.5, "int": 6.5, "convert": 2.0}
    busy = model.clocks(pipes, 90)
    assert busy == {"fma": 20 / 128, "heavy": 6 / 64, "alu": 8.5 / 64, "xu": 0.0, "issue": 26 / (0.8 * 128)}
    assert model.clocks(pipes | {"xu": 1.5}, 80)["fma"] == 20 / 64
    assert model.clocks(pipes | {"xu": 1.5}, 80)["xu"] == 1.5 / 16
    kernel = {"arch": 90, "pipes": pipes}
    unit, seconds = model.compute_limit(kernel, "NVIDIA H200")
    assert unit == "issue"
    assert seconds == pytest.approx(26 / (0.8 * 128) / (132 * 1.98e9))
    memory = 4 / (0.9 * 4.8e12)
    assert model.predicted_share(kernel, 4, "H200") == pytest.approx((1 + (seconds / memory) ** 4) ** -0.25)


def test_a_packed_pair_takes_one_issue_slot_and_two_lanes() -> None:
    """14 FP32 operations, of them 12 packed: 8 instructions; as long in the FMA pipe, shorter in the schedulers."""
    rest = {"imad": 1.0, "imad.wide": 2.5, "int": 6.5, "convert": 2.0}
    apart, packed = (model.clocks(rest | fp32, 100) for fp32 in ({"fp32": 14.0}, {"fp32": 2.0, "fp32x2": 6.0}))
    assert packed["fma"] == apart["fma"] == (14 + 6) / 128
    assert (apart["issue"], packed["issue"]) == (26 / (0.8 * 128), 20 / (0.8 * 128))
    assert {unit: packed[unit] for unit in ("heavy", "alu", "xu")} == {
        unit: apart[unit] for unit in ("heavy", "alu", "xu")
    }
    faster = model.seconds({"arch": 100, "pipes": rest | {"fp32": 2.0, "fp32x2": 6.0}}, 4, "B200")
    assert faster < model.seconds({"arch": 100, "pipes": rest | {"fp32": 14.0}}, 4, "B200")


@pytest.mark.parametrize(("device", "copied", "slots"), [("H100", 3.0, 44), ("H200", 4.3, 31), ("B200", 7.2, 21)])
def test_figures_of_the_devices(device: str, copied: float, slots: int) -> None:
    """TB/s read and written, and the instructions for which a bfloat16 weight's copy leaves time."""
    assert model.DEVICES[device].copy_bandwidth / 1e12 == pytest.approx(copied, rel=0.01)
    assert model.slots_of_copy(4, device) == pytest.approx(slots, rel=0.02)


def test_share_at_the_ends() -> None:
    """No time for arithmetic, equal times, and arithmetic that takes a hundred times as long."""
    memory = 4 / model.DEVICES["H200"].copy_bandwidth
    equal = memory * 132 * 1.98e9 * 0.8 * 128
    for slots, share in ((0.01 * equal, 1.0), (equal, 0.5**0.25), (100 * equal, 0.01)):
        assert model.predicted_share({"arch": 90, "pipes": {"other": slots}}, 4, "H200") == pytest.approx(share)


def test_predictions_from_the_stored_rows_are_in_order() -> None:
    """More bytes, or fewer instructions, or a slower memory: a larger share."""
    bf16, fp32 = row(), row(dtype="float32")
    assert (model.bytes_moved(bf16), model.bytes_moved(fp32)) == (4, 8)
    assert model.bytes_moved(row("hizoo")) == 4 + 8
    assert model.bytes_moved(row("helene")) == 4 + 16
    share = model.predicted_share(bf16, 4, "H200")
    assert (
        0.8 < share < model.predicted_share(bf16, 4, "NVIDIA H100 80GB HBM3") < model.predicted_share(fp32, 8, "H100")
    )
    assert model.predicted_share(row(rounding="stochastic"), 4, "H200") < share
    assert model.predicted_share(row(arch=100), 4, "B200") < share  # 1.7 times the bandwidth, 1.1 times the issue
    assert 0 < model.predicted_share(row(arch=80), 4, "A100-SXM4-80GB") < 1


@pytest.mark.parametrize("gpu", ["H100", "H200"])
def test_predictions_are_what_was_measured(gpu: str) -> None:
    """The stored runs' shares of the copy bandwidth: every CUDA pass within a tenth, their mean within 4 %."""
    off = page.distances(ROWS, gpu, parts.gpus()[gpu], "cuda")
    assert len(off) > 25
    for title, distance in off.items():
        assert abs(distance) < 0.1, title
    assert sum(map(abs, off.values())) / len(off) < 0.04


def test_what_misses_its_prediction_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts, the mean and the farthest follow from the distances; nothing is said of what was not predicted."""
    off = {"cuda": {"a": 0.02, "b, c": -0.2, "d": 0.11}, "triton": {}}
    monkeypatch.setattr(page, "gpus", lambda: {"X": RESULTS})
    monkeypatch.setattr(page, "distances", lambda rows, gpu, folder, backend: off[backend])
    assert (
        page.held_part()
        == "- X, CUDA: 1 of 3 within 10%, the mean 11.0% off, the farthest −20.0% (b, c). Beyond: b, c; d."
    )


def test_instructions_of_seeds_and_stages_add_up() -> None:
    kernel = {"name": "toy", "pipes": {"fp32": 2.0, "int": 1.0}, "pipes_extra": {"fp32": 1.5}}
    assert model.instructions(kernel) == {"fp32": 2.0, "int": 1.0}
    assert model.instructions(kernel, seeds=3) == {"fp32": 5.0, "int": 1.0}
    chain = kernel | {"pipes_once": {"memory": 0.5}, "pipes_stochastic": {"fp32": 2.0, "int": 4.0}}
    assert model.instructions(chain, stages=3, stochastic=2) == {"fp32": 6.0, "int": 9.0, "memory": 0.5}
    assert model.instructions(chain, stages=2, seeds=2) == {"fp32": 7.0, "int": 2.0, "memory": 0.5}
    with pytest.raises(ValueError, match="a further seed was not counted in toy"):
        model.instructions(kernel | {"pipes_extra": {}}, seeds=2)


def test_cells_of_the_page_by_hand() -> None:
    """An element of 26 instructions on an H200, all of one scheduler; a pass that was not compiled."""
    toy = row(arch=90) | {"slots": 26.2, "pipes": {"other": 26.2}}
    wanted = ("axpy", "bfloat16", "normal", "nearest")
    memory, compute = 4 / (0.9 * 4.8e12), 26.2 / (0.8 * 128) / (132 * 1.98e9)
    share = (1 + (compute / memory) ** 4) ** -0.25
    assert page.told([toy], "cuda", wanted, "H200") == f"{share:.0%}, 26 of 31"
    assert page.told([toy], "cuda", wanted, "H100").endswith(", 26 of 44")
    assert page.told([toy], "cuda", wanted, "B200") == "-"
    assert page.told([toy], "triton", wanted, "H200") == "-"


def test_the_page_has_what_people_run() -> None:
    """Every rule is in it, with a number for each GPU in CUDA's table, and for each update a chain's gain."""
    assert {wanted[0] for wanted in page.PASSES.values()} == set(RULES)
    for table in (page.cuda_table(ROWS), page.other_table(ROWS)):
        assert [title for title, *_ in lines_of(table)] == list(page.PASSES)
    for _, *shares, further, _, _ in lines_of(page.cuda_table(ROWS)):
        assert all(re.fullmatch(r"\d+%, \d+ of \d+", share) for share in shares)
        assert 5 < int(further) < 40
    for title, *_, gains in lines_of(page.other_table(ROWS)):
        assert (gains == "-") == ("perturb" in title), title


def lines_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def test_the_csv_has_every_row_and_its_prediction() -> None:
    lines = list(csv.DictReader(page.table_of_all(ROWS).splitlines()))
    assert len(lines) == len(ROWS)
    for line, stored in zip(lines, ROWS, strict=True):
        assert (line["arch"], line["rule"], float(line["slots"])) == (
            str(stored["arch"]),
            stored["rule"],
            stored["slots"],
        )
        assert sum(float(line[pipe]) for pipe in stored["pipes"]) == pytest.approx(stored["slots"], abs=1e-3)
        for device, figures in model.DEVICES.items():
            mine = figures.arch == stored["arch"]
            chain, dense = stored["kernel"] == "chain", stored["distribution"] != "low_rank"
            assert (line[f"predicted_{device}"] != "") == (mine and not chain)
            assert (line[f"sweep_of_8_{device}"] != "") == (mine and chain and dense)
    (h200,) = [i for i, stored in enumerate(ROWS) if stored is row()]
    assert lines[h200]["predicted_H200"] == f"{model.predicted_share(row(), 4, 'H200'):.3f}"


def test_amds_cells_by_hand() -> None:
    """304 units of 64 lanes at 2.1 GHz, and 80 % of 5.3 TB/s: 38.5 instructions for the 4 bytes of a bfloat16 weight."""
    for device, slots in (("MI300X", 38.5), ("MI355X", 24.6)):
        assert amd_page.DEVICES[device].slots_of_copy(4) == pytest.approx(slots, abs=0.05)
    toy = {"pipes": {"valu": 10.0, "packed": 4.0, "product": 2.0, "cvt": 1.5, "spill": 0.5, "salu": 9.0, "wait": 9.0}}
    assert amd_page.turns(toy) == (18.0, 18.0 + 3 * 3.5)


def test_amds_table_has_what_people_run() -> None:
    lines = lines_of(amd_page.amd_table(ROWS))
    assert [title for title, *_ in lines] == list(page.PASSES)
    for _, *cells, further, registers in lines:
        for cell in cells:
            least, most, slots = map(int, re.fullmatch(r"(\d+) to (\d+) of (\d+)", cell).groups())
            assert 5 < least < most < 3 * slots
        assert all(5 < int(count) < 32 for count in further.split(", "))
        assert all(32 < int(count) <= 128 for count in registers.split(", "))


def test_a_csv_of_older_rows_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    older = tmp_path / "benchmarks" / "results" / "machine_code.csv"
    older.parent.mkdir(parents=True)
    older.write_text("older")
    name = str(older.relative_to(tmp_path))
    monkeypatch.setattr(parts, "ROOT", tmp_path)
    assert pages.main([name, "--check"]) == 1
    assert f"not what this would write: {name}; run" in capsys.readouterr().out
    assert older.read_text() == "older"
    older.write_text(page.table_of_all(ROWS))
    assert pages.main([name, "--check"]) == 0


def test_gain_of_a_chain_is_passes_over_a_sweep() -> None:
    chain = row(kernel="chain", dtype="float32", distribution="any", rounding="any", seeds="any")
    alone = row(dtype="float32")
    sweep = model.instructions(chain, stages=8)
    expected = 8 * model.seconds(alone, 8, "H200") / model.seconds(chain, 8, "H200", sweep)
    assert page.gain(ROWS, chain, "H200") == pytest.approx(expected)
    assert 1 < expected < 8


def test_model_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="device is 'GeForce'; there are figures of A100, H100"):
        model.predicted_share(row(), 4, "GeForce")
    with pytest.raises(ValueError, match="row is code for 90 and A100 has 80"):
        model.predicted_share(row(), 4, "A100")
    with pytest.raises(ValueError, match="arch is 75"):
        model.clocks({}, 75)
    assert model.device_named("sm_90") is model.DEVICES["H200"]


# -------------------------------------------------------------------------------------------------------- compiled anew


@pytest.mark.slow_machine_code
@pytest.mark.parametrize("arch", [*rows.ARCHS, *rows.AMD])
def test_stored_rows_are_what_the_compilers_make(arch: int | str, tmp_path: Path) -> None:
    """Every kernel of an architecture, with the compilers that the stored results name."""
    triton = pytest.importorskip("triton")
    here = {"triton": triton.__version__}
    if arch not in rows.AMD:
        if shutil.which("nvcc") is None:
            pytest.skip("nvcc is not on PATH")
        release = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
        here["nvcc"] = re.findall(r"release ([\d.]+)", release)[0]
    if any(STORED["compilers"][name] != version for name, version in here.items()):
        pytest.skip(f"the stored rows are of {STORED['compilers']}, here are {here}")
    out = tmp_path / "reports.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.machine_code", "--arch", str(arch), "--json", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    reports = {report["name"]: report for report in json.loads(out.read_text())}
    stored = {r["name"]: r for r in ROWS if r["arch"] == arch}
    assert set(reports) == set(stored)
    for name, report in reports.items():
        assert report["spills"] == 0, name
        assert report["barriers"] == 0, name
        assert report["registers"] == stored[name]["registers"], name
        assert report["slots"] == pytest.approx(stored[name]["slots"], abs=1e-3), name
        assert report.get("deviations", []) == [], name
