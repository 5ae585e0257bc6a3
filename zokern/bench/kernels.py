"""Runs kernel benchmarks: every case on every backend of the device, with its peers and a copy, in one run.

Stores <output>/kernels-<benchmark>-<device>.json after every case, so that a run that is killed leaves what it had.
The layout of "results" is {title of the case: see `measure`}.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from zokern.bench import limits, prediction
from zokern.bench.cases import Case, cases_of
from zokern.bench.peers import Peer, peers
from zokern.bench.record import store
from zokern.bench.shapes import block_shapes
from zokern.bench.timing import time_in_rounds
from zokern.bench.workload import EPS, Workload, choose_backends

ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 30}
QUICK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}
ROUNDS = {"cpu": 7, "cuda": 30}
QUICK_ROUNDS = 3


@dataclass(frozen=True)
class Settings:
    """Of a run. elements: of the whole model; rounds: timed calls of each candidate; compiled: time torch.compile too.

    deadline: of time.monotonic(), after which no case is begun; None for none.
    """

    device: torch.device
    dtypes: tuple[str, ...]
    elements: int
    rounds: int
    compiled: bool
    output: Path
    deadline: float | None = None


def default_elements(device: torch.device, names: list[str], dtypes: Sequence[str], quick: bool) -> int:
    """The device's default, halved until the largest case fits into nine tenths of a GPU's free memory."""
    elements = (QUICK_ELEMENTS if quick else ELEMENTS)[device.type]
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        while _largest(names, dtypes, elements) > 0.9 * free and elements > 1 << 20:
            elements //= 2
    return elements


def check_memory(device: torch.device, names: list[str], dtypes: Sequence[str], elements: int) -> str | None:
    """Why `elements` do not fit on a GPU, or None. Said before a run rather than in the middle of it."""
    if device.type != "cuda":
        return None
    need, free = _largest(names, dtypes, elements), torch.cuda.mem_get_info(device)[0]
    if need <= free:
        return None
    return f"{elements:,} need about {need / 1e9:.1f} GB of GPU memory and {free / 1e9:.1f} GB are free; give fewer"


def _largest(names: list[str], dtypes: Sequence[str], elements: int) -> int:
    return max((limits.memory_needed(case, elements) for case in cases_of(names, dtypes)), default=0)


def measure(
    case: Case, settings: Settings, backends: list[str], others: Sequence[Peer], progress: Progress | None = None
) -> dict[str, Any]:
    """Times a case against `others`.

    {"case", "elements" (active), "tensors", "blocks", "blocks_active", "bytes_per_element", "operations_per_element",
    "bytes" (that the pass must move), "ways": {label: {"median", "min", "max" (seconds), "rounds", "ns_per_element",
    "gb_per_s" (of those bytes), "share_of_copy", "speedup_over": {peer or copy: its time over this}}}}. `run` adds what is
    predicted of ours (prediction.py).
    """
    work = Workload(case, settings.elements, settings.device)
    calls = work.candidates(backends, others)
    times = time_in_rounds(calls, settings.device, settings.rounds, case.title, progress=progress, device_only=True)
    theirs = {label: t["median"] for label, t in times.items() if not label.startswith("zokern")}
    return {
        "case": asdict(case),
        "elements": work.active,
        "tensors": len(work.members),
        "blocks": work.blocks,
        "blocks_active": work.blocks_active,
        "bytes_per_element": limits.bytes_per_element(case),
        "operations_per_element": limits.operations_per_element(case),
        "bytes": work.nbytes,
        "ways": {
            label: {
                **t,
                "ns_per_element": t["median"] / work.active * 1e9,
                "gb_per_s": work.nbytes / t["median"] / 1e9,
                "share_of_copy": theirs["copy"] / t["median"],
                "speedup_over": {other: seconds / t["median"] for other, seconds in theirs.items()},
            }
            for label, t in times.items()
        },
    }


def run(
    name: str,
    settings: Settings,
    progress: Progress | None = None,
    done: Callable[[str, dict[str, Any]], None] | None = None,
) -> Path | None:
    """One benchmark with all its cases; the path of its JSON, None where there was no time. `done` is told of each case.

    Raises:
        ValueError: where the dtypes leave no case. RuntimeError: where no backend runs on the device.
    """
    device = settings.device
    cases = cases_of([name], settings.dtypes)
    if not cases:
        raise ValueError(f"{name} has nothing to time for {', '.join(settings.dtypes)}; give a 16-bit dtype")
    names, refused = choose_backends(device)
    if not names:
        raise RuntimeError(f"no backend runs on {device}: " + "; ".join(f"{n}: {why}" for n, why in refused.items()))
    basis = prediction.basis(device)
    said = {key: getattr(settings, key) for key in ("elements", "rounds", "dtypes", "compiled")}
    said |= {"eps": EPS, "backends": names, "backends_refused": refused}
    said["prediction"] = {"unknown": basis} if isinstance(basis, str) else basis.facts()
    path, results = settings.output / f"kernels-{name}-{device.type}.json", dict[str, Any]()
    others, before = list[Peer](), tuple[str, ...]()
    for case in cases:
        if settings.deadline is not None and time.monotonic() > settings.deadline:
            break
        kind = (case.rule, case.dtype, case.state_dtype)
        if kind != before:
            if settings.compiled:
                torch.compiler.reset()  # PyTorch compiles a function for eight kinds of input at most
            others, before = peers(compiled=settings.compiled, group=len(block_shapes(1))), kind
        result = measure(case, settings, names, others, progress)
        for backend in names:
            result["ways"][f"zokern {backend}"] |= prediction.of(case, backend, basis)
        results[case.title] = result
        store(f"kernels-{name}", device, said, results, path, complete=case is cases[-1])
        if done is not None:
            done(case.title, result)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the next case's tensors have other sizes
    return path if results else None
