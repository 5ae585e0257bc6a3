"""What has run on a GPU, for docs/passes.md, from what keep.py kept of the suite."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from benchmarks.gpu.sections import SANITIZERS
from benchmarks.parts import Record, load, table

TESTS = ("tests-gpu", "tests")


def _bits(name: str) -> tuple[str, str]:
    """How many cases of how many elements, and what came of them."""
    run = load(name)
    settings, wrong = run["settings"], sum(row["different"] for row in run["results"])
    cases = f"{settings['compared']}" + (f" of {settings['cases']}" if settings["compared"] < settings["cases"] else "")
    return f"{cases} cases of {settings['elements'] / 1e6:.0f} million elements (`{name}`)", f"{wrong or 'no'}"


def counts(why: str) -> tuple[int, int, int]:
    """Passed, failed and skipped, of the note of a section of tests."""
    found = re.match(r"(\d+) passed, (\d+) failed, (\d+) skipped", why)
    assert found is not None, why
    passed, failed, skipped = map(int, found.groups())
    return passed, failed, skipped


def _tests(sections: Mapping[str, Record]) -> str:
    passed, failed, skipped = zip(*(counts(sections[name]["why"]) for name in TESTS), strict=True)
    fails = "none fails" if not any(failed) else f"{sum(failed)} fail"
    return f"{' and '.join(map(str, passed))} pass, {fails}; {' and '.join(map(str, skipped))} are skipped"


def _sanitizers() -> tuple[str, str]:
    run = load("sanitizer-cuda.json")["results"]
    found = sum(tool["found"] + tool["wrong_bits"] for tool in run.values())
    cut = [f"{name} {run[name]['cuda']} of {run[name]['of']}" for name in run if run[name]["cuda"] < run[name]["of"]]
    every = max(tool["of"] for tool in run.values())
    what = f"{', '.join(name for name in SANITIZERS if name in run)} over {every} passes of CUDA and "
    what += f"{next(iter(run.values()))['triton']} of Triton (`sanitizer-cuda.json`)"
    rest = f"; for lack of time {', '.join(cut)}" if cut else ""
    return what, ("no error, no hazard" if found == 0 else f"{found} errors") + rest


def ran_part() -> str:
    """docs/passes.md's table of what has run."""
    truth, speed = load("gpu-suite-truth.json"), load("gpu-suite-speed.json")
    sections: dict[str, Any] = {section["name"]: section for section in truth["sections"]}
    assert truth["commit"] == speed["commit"], "the two parts of the suite are of two commits"
    (small, wrong), (large, also), (watched, errors) = (
        _bits("equality-cuda.json"), _bits("equality-large-cuda.json"), _sanitizers(),
    )  # fmt: skip
    sums = load("checksum-cuda.json")["results"]
    versions = truth["versions"]
    rows = [
        ["bits of CUDA and of Triton against the CPU's: every rule, dtype, rounding and distribution, up to 130 "
         f"directions, {small}, {large}", f"{wrong} and {also} bits differ" if wrong != also else f"{wrong} bit differs"],
        [f"all 2^32 words of the noise, on {' and on '.join({'cuda': 'CUDA', 'triton': 'Triton'}[name] for name in sums)}",
         "the checksum of [noise](noise.md)" if all(s["right"] for s in sums.values()) else "WRONG"],
        [watched, errors],
        ["`pytest -m gpu`, and the tests of every backend: no host synchronisation, captured steps with the bits of eager "
         "ones, streams, more than 2^31 elements (`gpu-suite-truth.json`)", _tests(sections)],
        ["every kernel's time, whole steps of OPT-1.3B and OPT-13B, torch.compile beside them",
         "[benchmarks](benchmarks.md), [steps](steps.md)"],
    ]  # fmt: skip
    head = (
        f"On one {truth['gpu']['name']} (driver {truth['gpu']['driver']}, CUDA {truth['nvcc']}, torch {versions['torch']}, "
        f"Triton {versions['triton']}), on {truth['date'][:10]}, commit {truth['commit'][:12]}, by "
        "`bash benchmarks/gpu_suite.sh OUTDIR --part truth` and `--part speed`; files are in `benchmarks/results`:"
    )
    return f"{head}\n\n{table(['what', 'outcome'], rows, tight=True)}"


PAGES = {"docs/passes.md": {"ran": ran_part}}
