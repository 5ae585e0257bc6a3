"""The table of targets in docs/benchmarks.md: what is wanted on a GPU, what is predicted, what was measured.

Kernels are predicted by zokern/bench/model.py from results/machine_code.json. Steps of OPT-13B, 16 rows of 256 tokens:

    step = forwards * 2 N T / (0.65 * peak) + passes            N parameters, T tokens

passes: ours as predicted; of the published order of work its bytes over the copy bandwidth, which leaves out the
generator's arithmetic and the launches, so that ratios to it are at least those told here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from targets_measured import column
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zokern.bench import model, models, prediction
from zokern.bench.cases import Case
from zokern.bench.limits import bytes_per_element
from zokern.bench.peers import Published
from zokern.bench.record import RESULTS
from zokern.placement import stream

DEVICES = ("H200", "H100")
PEAK = 989e12  # dense bfloat16 FLOP/s of both data sheets
REACHED = 0.65  # of it by a forward of 4,096 tokens: an assumption
MODEL, TOKENS = "opt-13b", 16 * 256
ALLOCATIONS = ("empty", "detach", "alias", "view", "_to_copy")  # of an operation's name: moves nothing
HIZOO = Case("", "hizoo", "bfloat16")
PROBE = Case("", "scaled_axpy", "bfloat16")
FORK = Case("", "axpy", "bfloat16", stages=2, fork=True)


def axpy(dtype: str = "bfloat16", distribution: str = "normal") -> Case:
    return Case("", "axpy", dtype, distribution=distribution)


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


def published_bytes(method: str) -> int:
    """Of a bfloat16 parameter in one step of the published order; HiZOO's h in bfloat16 too."""
    w, h, sweep = [torch.zeros(64)], [torch.ones(64)], (1.0, 1e-3)
    if method == "mezo":
        return 2 * 4 * moves(lambda: Published().axpy(w, 0, sweep))
    update = moves(lambda: Published().hizoo(w, h, 0, 1.0, 1e-3, 0.1, 0.1))
    return 2 * (3 * moves(lambda: Published().scaled_axpy(w, h, 0, sweep)) + update)


class Prediction:
    """Of one device."""

    def __init__(self, device: str) -> None:
        stored = json.loads(prediction.MACHINE_CODE.read_text())
        self.basis = prediction.Basis(device, stored["kernels"], stored["compilers"])
        self.bandwidth = model.DEVICES[device].copy_bandwidth
        self.parameters = models.parameters(MODEL)
        self.forward = 2 * self.parameters * TOKENS / (REACHED * PEAK)

    def share(self, case: Case, backend: str = "cuda") -> float:
        share: float = prediction.of(case, backend, self.basis)["predicted_share"]
        return share

    def seconds(self, *cases: Case) -> float:
        """Of passes over the whole model."""
        return sum(self.parameters * bytes_per_element(c) / (self.bandwidth * self.share(c)) for c in cases)

    def published(self, method: str, forwards: int) -> float:
        """A step's seconds, at least."""
        return self.parameters * published_bytes(method) / self.bandwidth + forwards * self.forward

    def row(self) -> list[str]:
        """The cells of this device, in the order of `WANTED`."""
        mezo, pipelined = self.seconds(*[axpy()] * 3), self.seconds(axpy(), FORK)
        hizoo = self.seconds(PROBE, PROBE, HIZOO)
        one_sweep = published_bytes("mezo") / 4 / bytes_per_element(axpy()) * self.share(axpy())
        triton = self.share(axpy()) / self.share(axpy(), "triton") - 1
        faster = [self.published("mezo", 2) / (2 * self.forward + passes) for passes in (mezo, pipelined)]
        shares = [passes / (2 * self.forward + passes) for passes in (mezo, pipelined)]
        meta = models.build(MODEL, torch.bfloat16, torch.device("meta"))
        return [
            f"{self.share(axpy()):.0%}",
            f"{self.share(axpy('float32')):.0%}",
            f"{self.share(HIZOO):.0%}",
            f"{self.share(axpy(distribution='rademacher')):.0%}",
            f"{triton:+.0%}",
            f"at least {one_sweep:.1f} x",
            "not predicted",
            f"{shares[0]:.1%}; pipelined {shares[1]:.1%}",
            f"at least {faster[0]:.2f} x; pipelined {faster[1]:.2f} x",
            f"at least {self.published('hizoo', 4) / (3 * self.forward + hizoo):.2f} x",
            f"{stream.extra_bytes(meta) / (2 * self.parameters):.1%} (computed)",
        ]


WANTED = (
    ("axpy, bfloat16, share of the copy bandwidth", "at least 90%"),
    ("axpy, float32, the same", "at least 97%"),
    ("HiZOO update, bfloat16, h float32, the same", "at least 95%"),
    ("axpy, Rademacher, bfloat16, the same", "at least 97%"),
    ("Triton's time beside CUDA's, axpy, bfloat16", "at most +5%"),
    ("perturbation over `published`", "at least 8 x"),
    ("perturbation over `compiled`", "at least 1.5 x"),
    ("OPT-13B, 16x256 tokens: passes' share of a MeZO step", "at most 8%"),
    ("OPT-13B, 16x256 tokens: MeZO step over the published", "at least 1.5 x"),
    ("OPT-13B, 16x256 tokens: HiZOO step over the published", "at least 2 x"),
    ("OPT-13B: memory beyond a forward, `stream`", "at most 8%"),
)


def table() -> str:
    columns = [Prediction(device).row() for device in DEVICES]
    head = ["target", "wanted", *(f"predicted, {device}" for device in DEVICES), "measured"]
    lines = [head, ["---"] * len(head)]
    lines += [[*wanted, *cells] for wanted, *cells in zip(WANTED, *columns, column(RESULTS), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table())
