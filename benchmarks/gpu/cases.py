"""Every kind of pass, on tensors that are hard to get right, for programs that compare backends bit for bit.

A case says which arithmetic; `inputs` makes its tensors: a large one, a shard that begins and ends in the middle of
blocks, one off 16-byte boundaries beyond index 2^36, and a single element, in two groups. `apply` runs one backend,
`compare` several beside a baseline.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from zokern import backends, directions, sweep
from zokern.contract import reference
from zokern.contract.rules import RULES
from zokern.passes.operands import Operands
from zokern.passes.spec import PassNumbers, PassSpec

CPU = torch.device("cpu")
SCALARS = {
    "decay": 0.875, "smoothing": 0.125, "beta": 0.9, "beta1": 0.9, "beta2": 0.99, "step": -0.01, "gamma": 1.5,
    "floor": 0.25, "delta": 1e-3, "ratio": 0.7,
}  # fmt: skip
SPECIAL = (float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1e-45, -1e-39, 3e38, 65519.0, 2.0**-25, -(2.0**-133))
MANY_SEEDS = 130  # more than the 128 whose keys a CUDA block keeps in shared memory


@dataclasses.dataclass(frozen=True)
class Case:
    """`seeds_on_device`: the seeds lie in the backend's memory, for which CUDA has kernels of their own."""

    rule: str
    dtype: torch.dtype
    state_dtype: torch.dtype = torch.float32
    distribution: str = "normal"
    rounding: str = "nearest"
    seeds: int = 1
    seeds_on_device: bool = False
    square_of_sum: bool = False
    keep_second: bool = False
    decayed: bool = True
    out_of_place: bool = False

    def label(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return {k: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v for k, v in values.items()}


@dataclasses.dataclass
class Tensors:
    weights: list[Tensor]
    states: list[list[Tensor]]  # one list for each state of the rule
    offsets: list[int]


def all_cases(rules: Sequence[str] = tuple(RULES), seeds: Sequence[int] = (1, 3)) -> Iterator[Case]:
    """Every rule, dtype, rounding and distribution with each number of seeds, and each rule's own variants."""
    for name in rules:
        rule = RULES[name]
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for rounding in ("nearest",) if dtype == torch.float32 else ("nearest", "stochastic"):
                states = (torch.float32, torch.bfloat16) if rule.states == ("h",) else (torch.float32,)
                for state in states:
                    for distribution in ("normal", "rademacher"):
                        for k in seeds:
                            yield Case(name, dtype, state, distribution, rounding, k)
                    yield Case(name, dtype, state, "normal", rounding, 1, seeds_on_device=True)
            yield Case(name, dtype, decayed=False, out_of_place=True)
            if "V" in rule.coefs:
                yield Case(name, dtype, seeds=3, square_of_sum=True)
            if rule.written == 2:
                yield Case(name, dtype, keep_second=True)
        if name == "axpy":
            for k in (0, 33, MANY_SEEDS):
                yield Case(name, torch.bfloat16, rounding="stochastic", seeds=k)
                yield Case(name, torch.float32, distribution="rademacher", seeds=k)


def inputs(case: Case, elements: int, device: torch.device) -> Tensors:
    """About `elements` elements of normal weights, with SPECIAL ones among them, and positive states."""
    sizes = [max(elements * 3 // 4, 1), max(elements // 8, 1), max(elements // 8 - 3, 1), 1]
    offsets, off = [0, 5, 2**36 + 3, 2**13 - 1], [0, 5, 1, 0]
    generator = torch.Generator(device).manual_seed(elements)
    weights = []
    for size, shift in zip(sizes, off, strict=True):
        w = _view(size, case.dtype, shift, device)
        w.copy_(torch.randn(size, generator=generator, device=device) * 0.05)
        count = min(len(SPECIAL), size // 16)  # the single element stays an ordinary number
        w[: count * 7 : 7] = torch.tensor(SPECIAL[:count], device=device).to(case.dtype)
        weights.append(w)
    states = []
    for _ in RULES[case.rule].states:
        kept = [_view(size, case.state_dtype, shift, device) for size, shift in zip(sizes, off, strict=True)]
        for t in kept:  # over several orders of magnitude
            t.copy_(torch.randn(t.numel(), generator=generator, device=device).exp_())
        states.append(kept)
    return Tensors(weights, states, offsets)


def _view(size: int, dtype: torch.dtype, shift: int, device: torch.device) -> Tensor:
    """`size` zeros that begin `shift` elements behind a 16-byte boundary, which is where torch's allocations begin."""
    return torch.zeros(size + shift, dtype=dtype, device=device)[shift:]


def copy(tensors: Tensors, device: torch.device) -> Tensors:
    """The same values, off boundaries by as much."""

    def clones(of: list[Tensor]) -> list[Tensor]:
        return [_view(t.numel(), t.dtype, t.storage_offset(), device).copy_(t) for t in of]

    return Tensors(clones(tensors.weights), [clones(kept) for kept in tensors.states], tensors.offsets)


def apply(case: Case, tensors: Tensors, backend: str) -> list[Tensor]:
    """Runs the pass on `tensors`, which change; the new weights, then the states."""
    rule = RULES[case.rule]
    device, count = tensors.weights[0].device, len(tensors.weights)
    seeds = torch.tensor([reference.derive_seed(1, 2, k) for k in range(case.seeds)], dtype=torch.int64)
    generator = torch.Generator().manual_seed(case.seeds)
    coefs = torch.randn(2, len(rule.coefs), case.seeds, generator=generator) * 0.05
    if "V" in rule.coefs:
        coefs[:, -1] = coefs[:, -1].abs()
    shared = torch.tensor([[SCALARS[name] * scale for name in rule.scalars] for scale in (1.0, 0.75)])
    if not case.decayed:
        shared[:, 0] = 1.0
    out = [_view(w.numel(), w.dtype, w.storage_offset(), device) for w in tensors.weights]
    random = case.rounding == "stochastic" or case.state_dtype != torch.float32
    spec = PassSpec(rule, directions.parse(case.distribution), case.rounding, case.square_of_sum, case.keep_second)
    rounding_seed = torch.tensor([11, 12]) if random else None
    numbers = PassNumbers(seeds.to(device) if case.seeds_on_device else seeds, coefs, shared, rounding_seed)
    ids, groups = [3 + i for i in range(count - 1)] + [2**32 - 1], [i % 2 for i in range(count)]
    dst = out if case.out_of_place else None
    sweep.run(Operands(tensors.weights, dst, tensors.states, ids, tensors.offsets, groups), spec, numbers, backend)
    return [*(out if case.out_of_place else tensors.weights), *(t for kept in tensors.states for t in kept)]


def different(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors' bits differ, every NaN counting as the same: its payload is no part of the contract."""
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    return (a.view(bits) != b.view(bits)) & ~(a.isnan() & b.isnan())


def require(parser: Any, names: Sequence[str], device: torch.device) -> None:
    """Refuses backends that do not run on `device`."""
    for name in names:
        if (reason := backends.unavailable_reason(name, device)) is not None:
            parser.error(f"backend {name} cannot run on {device}: {reason}")


def compare(
    case: Case, elements: int, where: torch.device, device: torch.device, baseline: str, candidates: Sequence[str]
) -> list[dict[str, Any]]:
    """One row for each candidate: elements compared, how many differ from the baseline's, and where the first of them is.

    where: the device that makes the tensors and compares them. The baseline runs on the CPU, candidates on `device`.
    """
    start, rows = inputs(case, elements, where), []
    wanted = [want.to(where) for want in apply(case, copy(start, CPU), baseline)]
    for backend in candidates:
        row = {**case.label(), "backend": backend, "against": baseline, "elements": 0, "different": 0, "first": None}
        for number, (got, want) in enumerate(zip(apply(case, copy(start, device), backend), wanted, strict=True)):
            wrong = different(mine := got.to(where), want)
            count = int(wrong.sum())
            if count and row["first"] is None:
                at = int(wrong.nonzero()[0])
                row["first"] = {"tensor": number, "element": at, "got": float(mine[at]), "wanted": float(want[at])}
            row["elements"] += got.numel()
            row["different"] += count
        rows.append(row)
    return rows
