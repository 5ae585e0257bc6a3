"""The table of targets in docs/benchmarks.md: what is wanted on a GPU, what is predicted, what was measured.

Kernels are predicted by zokern/bench/model.py from results/machine_code.json. Steps of OPT-13B, 16 rows of 256 tokens:

    step = forwards * 2 N T / (0.65 * peak) + passes            N parameters, T tokens

passes: ours as predicted; of the published order of work its bytes over the copy bandwidth, which leaves out the
generator's arithmetic and the launches, so that ratios to it are at least those told here.

Measured is what the GPU suite stored of each card (kernels-*-cuda*.json, compiled/, step-cuda*.json); a figure is of the
first file that has the case. All of them are shares and ratios within one run: times of two cards are not compared.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.parts import Record, gpus, table
from zokern.bench import model, models, prediction
from zokern.bench.cases import Case
from zokern.bench.limits import bytes_per_element
from zokern.bench.peers import Published
from zokern.placement import stream

PEAK = 989e12  # dense bfloat16 FLOP/s of both data sheets
REACHED = 0.65  # of it by a forward of 4,096 tokens: an assumption
MODEL, TOKENS = "opt-13b", 16 * 256
STEP, SHORT_STEP = f"{MODEL} 16x256", f"{MODEL} 16x40"
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


@dataclass(frozen=True)
class Figure:
    """A share or a ratio, and what is to be said of it."""

    value: float
    note: str = ""


def _ways(results: Record, case: Case) -> Any:
    return results[case.title]["ways"]


def _share(case: Case) -> Callable[[Record], Figure]:
    return lambda r: Figure(_ways(r, case)["zokern cuda"]["share_of_copy"])


def _over(peer: str) -> Callable[[Record], Figure]:
    return lambda r: Figure(_ways(r, AXPY)["zokern cuda"]["speedup_over"][peer])


def _triton(results: Record) -> Figure:
    ways = _ways(results, AXPY)
    return Figure(ways["zokern triton"]["median"] / ways["zokern cuda"]["median"] - 1)


def step_of(results: Record, method: str, also: str = "", step: str = STEP) -> Any:
    """The fastest timed step of ours that has parts, or the one named."""
    found = [
        r for name, r in results.items()
        if name.startswith(f"{step} {method} ") and r["status"] == "timed" and not r["peer"] and "passes" in r
        and also in name
    ]  # fmt: skip
    if not found:
        raise KeyError(method)
    return min(found, key=lambda r: r["step"]["median"])


def _step_over(method: str, step: str = STEP) -> Callable[[Record], Figure]:
    def tell(results: Record) -> Figure:
        theirs, ours = results[f"{step} {method} published"], step_of(results, method, step=step)
        curvature = f" with h in {ours['curvature_dtype']}" if "curvature_dtype" in ours else ""
        return Figure(theirs["step"]["median"] / ours["step"]["median"], curvature)

    return tell


def _passes(results: Record) -> Figure:
    mezo = step_of(results, "mezo")
    return Figure(mezo["passes"] / mezo["step"]["median"])


def measured(folder: Path, pattern: str, tell: Callable[[Record], Figure]) -> Figure | str:
    """tell(results) of the first file that has the case, or why there is none; "compiled/" comes last."""
    stored = [json.loads(path.read_text()) for at in (folder, folder / "compiled") for path in sorted(at.glob(pattern))]
    for record in stored:
        try:
            return tell(record["results"])
        except KeyError:
            continue
    return "not in the run" if stored else "not yet run"


# ----------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Target:
    """wanted: the least of a figure, or with `at_most` the most. form: how a figure is written, as fine as decides."""

    title: str
    wanted: float
    form: str
    predict: Callable[[Prediction], str]
    pattern: str
    tell: Callable[[Record], Figure]
    at_most: bool = False

    def met(self, figure: Figure) -> bool:
        return figure.value <= self.wanted if self.at_most else figure.value >= self.wanted

    def told(self, figure: Figure | str) -> str:
        """Bold where it misses what is wanted."""
        if isinstance(figure, str):
            return figure
        text = self.form.format(figure.value) + figure.note
        return text if self.met(figure) else f"**{text}**"


KERNELS, STEPS = "kernels-axpy-cuda*.json", "step-cuda*.json"
SHARE, TIMES, MORE, COARSE = "{:.1%}", "{:.2f} x", "{:+.1%}", "{:.1f} x"
TARGETS = (
    Target("axpy, bfloat16, share of the copy bandwidth", 0.9, SHARE,
           lambda p: f"{p.share(AXPY):.0%}", KERNELS, _share(AXPY)),
    Target("axpy, float32, the same", 0.97, SHARE, lambda p: f"{p.share(AXPY_32):.0%}", KERNELS, _share(AXPY_32)),
    Target("HiZOO update, bfloat16, h float32, the same", 0.95, SHARE,
           lambda p: f"{p.share(HIZOO):.0%}", "kernels-hizoo-cuda.json", _share(HIZOO)),
    Target("axpy, Rademacher, bfloat16, the same", 0.97, SHARE,
           lambda p: f"{p.share(SIGNS):.0%}", "kernels-rademacher-cuda.json", _share(SIGNS)),
    Target("Triton's time beside CUDA's, axpy, bfloat16", 0.05, MORE,
           lambda p: f"{p.share(AXPY) / p.share(AXPY, 'triton') - 1:+.0%}", KERNELS, _triton, at_most=True),
    Target("perturbation over `published`", 8, COARSE,
           lambda p: f"at least {p.sweep():.1f} x", KERNELS, _over("published")),
    Target("perturbation over `compiled`", 1.5, COARSE, lambda p: "not predicted", KERNELS, _over("compiled")),
    Target("OPT-13B, 16x256 tokens: passes' share of a MeZO step", 0.08, SHARE,
           lambda p: f"{p.part(p.mezo):.1%}; pipelined {p.part(p.pipelined):.1%}", STEPS, _passes, at_most=True),
    Target("OPT-13B, 16x256 tokens: MeZO step over the published", 1.5, TIMES,
           lambda p: f"at least {p.faster(p.mezo):.2f} x; pipelined {p.faster(p.pipelined):.2f} x",
           STEPS, _step_over("mezo")),
    Target("OPT-13B, 16x256 tokens: HiZOO step over the published", 2, TIMES,
           lambda p: f"at least {p.published('hizoo', 4) / (3 * p.forward + p.hizoo):.2f} x",
           STEPS, _step_over("hizoo")),
    Target("OPT-13B, 16x40 tokens: MeZO step over the published, the best placement", 2.5, TIMES,
           lambda p: "not predicted", STEPS, _step_over("mezo", SHORT_STEP)),
    Target("OPT-13B: memory beyond a forward, `stream`", 0.08, SHARE,
           lambda p: f"{p.streamed():.1%} (computed)", STEPS,
           lambda r: Figure(step_of(r, "mezo", "stream")["extra_share"]), at_most=True),
)  # fmt: skip


def predictions(device: str) -> list[str]:
    if device not in model.DEVICES:
        return ["not predicted"] * len(TARGETS)
    told = Prediction(device)
    return [target.predict(told) for target in TARGETS]


def figures(folder: Path) -> list[Figure | str]:
    """What was measured, or why it was not, for each target."""
    return [measured(folder, target.pattern, target.tell) for target in TARGETS]


def _wanted(target: Target) -> str:
    number = f"{target.wanted:.0%}" if target.form in (SHARE, MORE) else f"{target.wanted:g} x"
    return f"{'at most' if target.at_most else 'at least'} {'+' * (target.form == MORE)}{number}"


def table_of_targets() -> str:
    columns, met = {}, []
    for gpu, folder in gpus().items():
        found = figures(folder)
        columns[f"predicted, {gpu}"] = predictions(gpu)
        columns[f"measured, {gpu}"] = [target.told(figure) for target, figure in zip(TARGETS, found, strict=True)]
        good = sum(isinstance(f, Figure) and target.met(f) for target, f in zip(TARGETS, found, strict=True))
        met.append(f"{good} of {len(TARGETS)} on the {gpu}")
    rows = zip((t.title for t in TARGETS), map(_wanted, TARGETS), *columns.values(), strict=True)
    told = table(["target", "wanted", *columns], list(rows))
    return f"{told}\n\nMet are {', '.join(met)}; what misses is in bold."
