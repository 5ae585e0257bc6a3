"""The table of targets in docs/benchmarks.md: what is wanted on a GPU, what is predicted, what was measured.

Kernels are predicted by zokern/bench/model.py from results/machine_code.json. Steps of OPT-13B, 16 rows of 256 tokens:

    step = forwards * 2 N T / (0.65 * peak) + passes            N parameters, T tokens

passes: ours as predicted; of the published order of work its bytes over the copy bandwidth, which leaves out the
generator's arithmetic and the launches, so that ratios to it are at least those told here.

Measured is what the GPU suite stored (results/kernels-*-cuda*.json, compiled/, step-cuda*.json); a figure is of the first
file that has the case.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.parts import RESULTS, Record, table
from zokern.bench import model, models, prediction
from zokern.bench.cases import Case
from zokern.bench.limits import bytes_per_element
from zokern.bench.peers import Published
from zokern.placement import stream

DEVICES = ("H200", "H100")
PEAK = 989e12  # dense bfloat16 FLOP/s of both data sheets
REACHED = 0.65  # of it by a forward of 4,096 tokens: an assumption
MODEL, TOKENS = "opt-13b", 16 * 256
STEP = f"{MODEL} 16x256"
ALLOCATIONS = ("empty", "detach", "alias", "view", "_to_copy")  # of an operation's name: moves nothing
HIZOO = Case("HiZOO update, h float32", "hizoo", "bfloat16")
PROBE = Case("", "scaled_axpy", "bfloat16")
FORK = Case("", "axpy", "bfloat16", stages=2, fork=True)
AXPY, AXPY_32 = (Case("axpy, K = 1", "axpy", dtype) for dtype in ("bfloat16", "float32"))
SIGNS = Case("axpy, Rademacher", "axpy", "bfloat16", distribution="rademacher")


# ----------------------------------------------------------------------------------------------------------- predicted


class _Moves(TorchDispatchMode):
    """Counts the tensors that operations read and write: for each element, moves between memory and processor."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not name.startswith(ALLOCATIONS):
            read = {id(a) for a in args if isinstance(a, Tensor) and a.numel() > 1}
            self.count += 1 + (0 if name.startswith("normal") else len(read))
        return func(*args, **(kwargs or {}))


def moves(call: Callable[[], None]) -> int:
    """Element moves of a pass in plain torch, for each element of one tensor."""
    with torch.random.fork_rng(), _Moves() as counter:
        call()
    return counter.count


@functools.cache
def published_bytes(method: str) -> int:
    """Of a bfloat16 parameter in one step of the published order; HiZOO's h in bfloat16 too."""
    w, h, sweep = [torch.zeros(64)], [torch.ones(64)], (1.0, 1e-3)
    if method == "mezo":
        return 2 * 4 * moves(lambda: Published().axpy(w, 0, sweep))
    update = moves(lambda: Published().hizoo(w, h, 0, 1.0, 1e-3, 0.1, 0.1))
    return 2 * (3 * moves(lambda: Published().scaled_axpy(w, h, 0, sweep)) + update)


class Prediction:
    """Of one device: shares of the copy bandwidth, and seconds over the whole model."""

    def __init__(self, device: str) -> None:
        stored = json.loads(prediction.MACHINE_CODE.read_text())
        self.basis = prediction.Basis(device, stored["kernels"], stored["compilers"])
        self.bandwidth = model.DEVICES[device].copy_bandwidth
        self.parameters = models.parameters(MODEL)
        self.forward = 2 * self.parameters * TOKENS / (REACHED * PEAK)
        self.mezo, self.pipelined = self.seconds(*[AXPY] * 3), self.seconds(AXPY, FORK)
        self.hizoo = self.seconds(PROBE, PROBE, HIZOO)

    def share(self, case: Case, backend: str = "cuda") -> float:
        share: float = prediction.of(case, backend, self.basis)["predicted_share"]
        return share

    def seconds(self, *cases: Case) -> float:
        """Of passes over the whole model."""
        return sum(self.parameters * bytes_per_element(c) / (self.bandwidth * self.share(c)) for c in cases)

    def published(self, method: str, forwards: int) -> float:
        """A step's seconds, at least."""
        return self.parameters * published_bytes(method) / self.bandwidth + forwards * self.forward

    def part(self, passes: float) -> float:
        """Of a MeZO step that the passes are."""
        return passes / (2 * self.forward + passes)

    def faster(self, passes: float) -> float:
        """The published MeZO step over one with these passes."""
        return self.published("mezo", 2) / (2 * self.forward + passes)

    def sweep(self) -> float:
        """The published perturbation over ours."""
        return published_bytes("mezo") / 4 / bytes_per_element(AXPY) * self.share(AXPY)

    def streamed(self) -> float:
        """Memory beyond a forward's, in shares of the weights."""
        meta = models.build(MODEL, torch.bfloat16, torch.device("meta"))
        return stream.extra_bytes(meta) / (2 * self.parameters)


# ------------------------------------------------------------------------------------------------------------ measured


def _ways(results: Record, case: Case) -> Any:
    return results[case.title]["ways"]


def _share(case: Case) -> Callable[[Record], str]:
    return lambda r: f"{_ways(r, case)['zokern cuda']['share_of_copy']:.0%}"


def _over(peer: str) -> Callable[[Record], str]:
    return lambda r: f"{_ways(r, AXPY)['zokern cuda']['speedup_over'][peer]:.1f} x"


def _triton(results: Record) -> str:
    ways = _ways(results, AXPY)
    return f"{ways['zokern triton']['median'] / ways['zokern cuda']['median'] - 1:+.0%}"


def _step(results: Record, method: str, also: str = "") -> Any:
    """The fastest timed step of ours that has parts, or the one named."""
    found = [
        r for name, r in results.items()
        if name.startswith(f"{STEP} {method} ") and r["status"] == "timed" and not r["peer"] and "passes" in r
        and also in name
    ]  # fmt: skip
    if not found:
        raise KeyError(method)
    return min(found, key=lambda r: r["step"]["median"])


def _step_over(method: str) -> Callable[[Record], str]:
    def tell(results: Record) -> str:
        theirs, ours = results[f"{STEP} {method} published"], _step(results, method)
        curvature = f" with h in {ours['curvature_dtype']}" if "curvature_dtype" in ours else ""
        return f"{theirs['step']['median'] / ours['step']['median']:.2f} x{curvature}"

    return tell


def _passes(results: Record) -> str:
    mezo = _step(results, "mezo")
    return f"{mezo['passes'] / mezo['step']['median']:.1%}"


def measured(folder: Path, pattern: str, tell: Callable[[Record], str]) -> str:
    """tell(results) of the first file that has the case, with the GPU's name; "compiled/" comes last."""
    stored = [json.loads(path.read_text()) for at in (folder, folder / "compiled") for path in sorted(at.glob(pattern))]
    for record in stored:
        try:
            return f"{tell(record['results'])} ({record['machine']['gpu']})"
        except KeyError:
            continue
    return "not in the run" if stored else "not yet run"


# ----------------------------------------------------------------------------------------------------------- the table

KERNELS, STEPS = "kernels-axpy-cuda*.json", "step-cuda*.json"
# What is wanted, how much of it, what is predicted, and where and how it was measured.
TARGETS: tuple[tuple[str, str, Callable[[Prediction], str], str, Callable[[Record], str]], ...] = (
    ("axpy, bfloat16, share of the copy bandwidth", "at least 90%",
     lambda p: f"{p.share(AXPY):.0%}", KERNELS, _share(AXPY)),
    ("axpy, float32, the same", "at least 97%",
     lambda p: f"{p.share(AXPY_32):.0%}", KERNELS, _share(AXPY_32)),
    ("HiZOO update, bfloat16, h float32, the same", "at least 95%",
     lambda p: f"{p.share(HIZOO):.0%}", "kernels-hizoo-cuda.json", _share(HIZOO)),
    ("axpy, Rademacher, bfloat16, the same", "at least 97%",
     lambda p: f"{p.share(SIGNS):.0%}", "kernels-rademacher-cuda.json", _share(SIGNS)),
    ("Triton's time beside CUDA's, axpy, bfloat16", "at most +5%",
     lambda p: f"{p.share(AXPY) / p.share(AXPY, 'triton') - 1:+.0%}", KERNELS, _triton),
    ("perturbation over `published`", "at least 8 x",
     lambda p: f"at least {p.sweep():.1f} x", KERNELS, _over("published")),
    ("perturbation over `compiled`", "at least 1.5 x",
     lambda p: "not predicted", KERNELS, _over("compiled")),
    ("OPT-13B, 16x256 tokens: passes' share of a MeZO step", "at most 8%",
     lambda p: f"{p.part(p.mezo):.1%}; pipelined {p.part(p.pipelined):.1%}", STEPS, _passes),
    ("OPT-13B, 16x256 tokens: MeZO step over the published", "at least 1.5 x",
     lambda p: f"at least {p.faster(p.mezo):.2f} x; pipelined {p.faster(p.pipelined):.2f} x", STEPS, _step_over("mezo")),
    ("OPT-13B, 16x256 tokens: HiZOO step over the published", "at least 2 x",
     lambda p: f"at least {p.published('hizoo', 4) / (3 * p.forward + p.hizoo):.2f} x", STEPS, _step_over("hizoo")),
    ("OPT-13B: memory beyond a forward, `stream`", "at most 8%",
     lambda p: f"{p.streamed():.1%} (computed)", STEPS, lambda r: f"{_step(r, 'mezo', 'stream')['extra_share']:.1%}"),
)  # fmt: skip


def predictions(device: str) -> list[str]:
    told = Prediction(device)
    return [predict(told) for _, _, predict, _, _ in TARGETS]


def column(folder: Path) -> list[str]:
    """What was measured."""
    return [measured(folder, pattern, tell) for _, _, _, pattern, tell in TARGETS]


def table_of_targets() -> str:
    columns = [predictions(device) for device in DEVICES]
    rows = zip(*([target[i] for target in TARGETS] for i in (0, 1)), *columns, column(RESULTS), strict=True)
    return table(["target", "wanted", *(f"predicted, {device}" for device in DEVICES), "measured"], list(rows))
